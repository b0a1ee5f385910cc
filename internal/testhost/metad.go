package testhost

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"metad/internal/child"
	"metad/internal/testnet"
)

const adminAddr = "127.0.0.1:51683"

// Build returns the path of metad's binary, made for this test.
func Build(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "metad")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path,
		"metad/cmd/metad")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build metad: %v\n%s", err, out)
	}
	return path
}

// Metad is a metad process on a made-up host.
type Metad struct {
	*child.Process

	t       testing.TB
	h       *Host
	runDir  string
	started time.Time
}

// Start starts metad with as many file descriptors as limit, 0: no change.
func (h *Host) Start(binary string, limit int, args ...string) *Metad {
	h.t.Helper()
	dir := h.t.TempDir()
	shell := `exec nice -n -10 "$0" "$@"` // as its unit has it
	if limit != 0 {
		shell = fmt.Sprintf("ulimit -n %d && %s", limit, shell)
	}
	m := &Metad{t: h.t, h: h, runDir: dir + "/run"}
	cmd := exec.Command("/bin/sh", append([]string{"-c", shell, binary, "serve",
		"--docker-host", "unix://" + h.Engine.Socket, "--bundle-dirs", h.Bundles,
		"--pin-dir", testnet.PinDir(h.t), "--run-dir", m.runDir, "--data-dir",
		dir + "/data",
		"--docker-proxy", "", "--agent-url", "", "--agent-introspection-url", ""},
		args...)...)
	m.started = time.Now()
	// The child lives in the namespace of the thread that starts it, and does not end with it.
	m.Process = child.Start(h.t, cmd, func(start func() error) error {
		return testnet.In(h.NS, start)
	})
	h.t.Cleanup(func() {
		m.Kill()
		if h.t.Failed() {
			h.t.Logf("metad said:\n%s", m.Out.Tail(4096))
		}
	})
	return m
}

// Get asks metad's admin address.
func (m *Metad) Get(path string) (int, string, error) {
	c, err := testnet.Dial(m.h.NS, "", adminAddr, 5*time.Second)
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	return testnet.GetOn(c, path, 10*time.Second)
}

// Hot requests the statistics of all tasks until each container has been sampled every second,
// more than once.
func (m *Metad) Hot(tasks []*Task) {
	m.t.Helper()
	Ask(tasks, "/v2/stats", Statistics)
	before, all := m.Metric(rendered), 0
	for _, t := range tasks {
		all += len(t.Containers)
	}
	m.WaitSampled(int(before) + 3*all)
}

// WaitSampled waits until metad has taken so many samples since its start.
func (m *Metad) WaitSampled(n int) {
	m.t.Helper()
	m.wait("the containers have been sampled", func() bool {
		return m.Metric(rendered) >= float64(n)
	})
}

const rendered = `metad_samples_total{outcome="rendered"}`

// Profile returns a profile of metad, which runs with --pprof: "heap", "profile?seconds=5".
func (m *Metad) Profile(name string) (string, error) {
	c, err := net.Dial("unix", m.runDir+"/admin.sock")
	if err != nil {
		return "", err
	}
	defer c.Close()
	code, body, err := testnet.GetOn(c, "/debug/pprof/"+name, time.Minute)
	if err == nil && code != 200 {
		err = fmt.Errorf("%s: %d %s", name, code, body)
	}
	return body, err
}

// WaitReady waits until metad answers from a complete list, and returns how long that was after its
// start.
func (m *Metad) WaitReady() time.Duration {
	m.t.Helper()
	m.wait("metad is ready", func() bool {
		code, _, err := m.Get("/readyz")
		return err == nil && code == 200
	})
	return time.Since(m.started)
}

// WaitHooked waits until all ports have metad's program, and returns how long that was after its
// start.
func (m *Metad) WaitHooked(ports int) time.Duration {
	m.t.Helper()
	m.wait("all ports are hooked", func() bool {
		return m.Metric("metad_ports") >= float64(ports) &&
			m.Metric("metad_ports_pending") == 0
	})
	return time.Since(m.started)
}

// wait waits for a condition. The limit is generous because the machine may be busy.
func (m *Metad) wait(what string, ok func() bool) {
	m.t.Helper()
	for end := time.Now().Add(5 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		select {
		case <-m.Done:
			m.t.Fatalf("metad ended: %v", m.Cmd.ProcessState)
		default:
		}
		if time.Now().After(end) {
			m.t.Fatalf("waited five minutes until %s", what)
		}
	}
}

// Metric returns the value of a metric, which is named with its labels as /metrics shows it. 0:
// there is none.
func (m *Metad) Metric(name string) float64 {
	m.t.Helper()
	_, body, err := m.Get("/metrics")
	if err != nil {
		m.t.Fatalf("metrics: %v", err)
	}
	match := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (.*)$`).FindStringSubmatch(
		body)
	if match == nil {
		return 0
	}
	v, err := strconv.ParseFloat(match[1], 64)
	if err != nil {
		m.t.Fatal(err)
	}
	return v
}

// CPU returns the CPU time that the process has taken.
func (m *Metad) CPU() time.Duration {
	m.t.Helper()
	var ts unix.Timespec
	// CPUCLOCK_SCHED of the whole process: include/linux/posix-timers.h
	if err := unix.ClockGettime(int32(^uint32(m.Cmd.Process.Pid)<<3|2), &ts); err != nil {
		m.t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// RSS returns the process's resident bytes, and how many of them are pages of files: the binary's.
func (m *Metad) RSS() (all, files int) {
	m.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", m.Cmd.Process.Pid))
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), new(int), &all, &files); err != nil {
		m.t.Fatal(err)
	}
	return all * os.Getpagesize(), files * os.Getpagesize()
}

// Descriptors returns how many descriptors the process has open.
func (m *Metad) Descriptors() int {
	m.t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.Cmd.Process.Pid))
	if err != nil {
		m.t.Fatal(err)
	}
	return len(list)
}

// Stop ends metad by SIGTERM and returns how long that took.
func (m *Metad) Stop() time.Duration {
	m.t.Helper()
	start := time.Now()
	m.Process.Stop(m.t, 2*time.Minute)
	return time.Since(start)
}

// Answers sums up the answers to a number of requests.
type Answers struct {
	Asked int
	Wrong []string // answers that were not right, and errors
	Times []time.Duration
}

// Quantile returns the time within which the share q of the requests was answered.
func (a *Answers) Quantile(q float64) time.Duration {
	if len(a.Times) == 0 {
		return 0
	}
	slices.Sort(a.Times)
	return a.Times[min(int(q*float64(len(a.Times))), len(a.Times)-1)]
}

// Ask requests path from each of the tasks, one after the other, on a connection of its own. An
// answer is right if its status is 200 and right returns true.
func Ask(tasks []*Task, path string, right func(*Task, string) bool) *Answers {
	a := &Answers{}
	for _, t := range tasks {
		start := time.Now()
		code, body, err := t.Get(path, 5*time.Second)
		a.Times = append(a.Times, time.Since(start))
		a.Asked++
		if err != nil || code != 200 || !right(t, body) {
			a.Wrong = append(a.Wrong, fmt.Sprintf("task %s: %d %.200s %v", t.ID, code,
				body, err))
		}
	}
	return a
}

// Own reports whether body is the task's metadata, with any number of its containers.
func Own(t *Task, body string) bool { return strings.Contains(body, `"TaskARN":"`+t.ARN+`"`) }

// Metadata reports whether body is the task's metadata with all its containers.
func Metadata(t *Task, body string) bool { return Own(t, body) && hasAll(t, body) }

// Statistics reports whether body has numbers of all the task's containers.
func Statistics(t *Task, body string) bool {
	return hasAll(t, body) && strings.Count(body, `"read":"`) == len(t.Containers) &&
		strings.Contains(body, `"eth0"`)
}

func hasAll(t *Task, body string) bool {
	for _, c := range t.Containers {
		if !strings.Contains(body, c.ID) {
			return false
		}
	}
	return true
}
