//go:build root

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"metad/internal/testdocker"
	"metad/pkg/admin"
)

// chaos is a host on a bad day. METAD_CHAOS is how long the day is ("2m"; 30 seconds without it),
// METAD_CHAOS_SEED is the seed of an earlier day, to have it again.
type chaos struct {
	t    *testing.T
	host *testdocker.Host
	rand *rand.Rand
	d    *process // the metad that serves, or is to serve again

	runDir string

	known atomic.Pointer[[]string] // the ARNs of all tasks
	hangs []time.Duration          // of metad: begin, end, begin, …
	// begun and ended: an observation that one falls into says nothing
	faults  atomic.Int64
	seen    atomic.Int64           // observations that say something
	partial atomic.Pointer[string] // one that must not be
}

// longestHang is the longest that metad is stopped, well within the time that the load waits for an
// answer.
const longestHang = 3 * time.Second

// fault is one thing that goes wrong, and what puts an end to it.
type fault struct {
	name       string
	begin, end func()
}

func newChaos(t *testing.T) *chaos {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("METAD_CHAOS_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("METAD_CHAOS_SEED: %v", err)
		}
	}
	t.Logf("METAD_CHAOS_SEED=%d", seed)
	return &chaos{t: t, host: testdocker.Start(t), rand: rand.New(rand.NewPCG(seed, 0))}
}

func (c *chaos) length() time.Duration {
	length, err := time.ParseDuration(os.Getenv("METAD_CHAOS"))
	if err != nil {
		return 30 * time.Second
	}
	return length
}

func (c *chaos) signal(pid int, s syscall.Signal) {
	if err := syscall.Kill(pid, s); err != nil {
		c.t.Fatalf("signal %v to process %d: %v", s, pid, err)
	}
}

func (c *chaos) dockerd() int {
	pid, err := strconv.Atoi(
		strings.TrimSpace(readFile(filepath.Join(c.host.Dir, "docker.pid"))))
	if err != nil {
		c.t.Fatal(err)
	}
	return pid
}

func (c *chaos) metadFaults() []fault {
	var hung struct {
		process *os.Process
		enough  *time.Timer
	}
	hang := func() {
		c.hangs = append(c.hangs, time.Since(loadStart))
		c.signal(c.d.cmd.Process.Pid, syscall.SIGSTOP)
		p := c.d.cmd.Process
		// A dockerd that is stopped meanwhile may need longer than a request waits.
		hung.process, hung.enough = p, time.AfterFunc(longestHang, func() {
			_ = p.Signal(syscall.SIGCONT)
		})
	}
	wake := func() {
		hung.enough.Stop()
		// It may have been replaced since it was woken.
		if err := hung.process.Signal(syscall.SIGCONT); err != nil &&
			!errors.Is(err, os.ErrProcessDone) {
			c.t.Fatalf("wake metad: %v", err)
		}
		c.hangs = append(c.hangs, time.Since(loadStart))
	}
	var next *process
	return []fault{
		{"metad killed", func() { c.d.kill() }, func() { c.d.start() }},
		{"metad stopped", func() {
			if code := c.d.stop(); code != 0 {
				c.t.Errorf("stopped metad: got exit code %d, want 0\n%s", code,
					c.d.out)
			}
		}, func() { c.d.start() }},
		{"metad hung", hang, wake},
		{"metad hung beside another", func() { hang(); next = c.another() }, func() { wake(); c.replaced(next) }},
		{"another metad", func() { next = c.another() }, func() { c.replaced(next) }},
	}
}

func (c *chaos) another() *process {
	next := &process{t: c.t, host: c.host, dir: c.d.dir, pins: c.d.pins}
	c.t.Cleanup(next.kill)
	next.start()
	return next
}

// replaced returns when one of the two has left. A metad that does not serve yet is not taken over
// from.
func (c *chaos) replaced(next *process) {
	select {
	case <-c.d.done:
		c.d = next
	case <-next.done:
		if !strings.Contains(next.out.String(), "does not serve yet") {
			c.t.Errorf("the other metad ended:\n%s", next.out)
		}
	case <-time.After(time.Minute):
		c.t.Fatalf("neither of two metads has left:\n%s\nthe new one:\n%s", c.d.out,
			next.out)
	}
}

func (c *chaos) dockerFaults() []fault {
	start := func() { c.host.StartDocker(c.t) }
	return []fault{
		{"dockerd killed", func() { c.host.KillDocker(c.t) }, start},
		{"dockerd stopped", func() { c.host.StopDocker(c.t) }, start},
		{"dockerd hung", func() { c.signal(c.dockerd(), syscall.SIGSTOP) }, func() { c.signal(c.dockerd(), syscall.SIGCONT) }},
	}
}

// unexcused are the slow requests during which metad did not hang.
func (c *chaos) unexcused(slow []failure) (rest []failure) {
	for _, f := range slow {
		if i, hung := slices.BinarySearch(c.hangs, f.at); !hung && i%2 == 0 &&
			(i == len(c.hangs) || f.at+f.took < c.hangs[i]) {
			rest = append(rest, f)
		}
	}
	return rest
}

// pick returns one or two faults, of metad, of dockerd, or of both, in any order.
func (c *chaos) pick() []fault {
	m, d := c.metadFaults(), c.dockerFaults()
	faults := []fault{m[c.rand.IntN(len(m))], d[c.rand.IntN(len(d))]}
	c.rand.Shuffle(2, func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
	return faults[:1+c.rand.IntN(2)]
}

// round has faults begin and end.
func (c *chaos) round(faults []fault) {
	pause := func() { time.Sleep(time.Duration(c.rand.IntN(500)) * time.Millisecond) }
	for _, f := range faults {
		c.faults.Add(1)
		f.begin()
		pause()
	}
	c.rand.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
	for _, f := range faults {
		f.end()
		c.faults.Add(1)
		pause()
	}
}

// watch looks whether metad says that it is ready while it does not know every task, until stop.
func (c *chaos) watch(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(20 * time.Millisecond):
		}
		known, before := *c.known.Load(), c.faults.Load()
		code, _, err := get(c.host, defaultAdmin, "/readyz")
		if err != nil || code != 200 {
			continue
		}
		tasks, err := fetchTasks(c.t.Context(), c.runDir, false)
		if err != nil || c.faults.Load() != before {
			continue
		}
		c.seen.Add(1)
		for _, arn := range known {
			if !slices.ContainsFunc(tasks.Tasks, func(t admin.Task) bool {
				return t.ARN == arn
			}) {
				text := fmt.Sprintf("without %s: %+v", arn, tasks)
				c.partial.Store(&text)
			}
		}
	}
}

// On a bad day dockerd and metad are killed, stopped, hung and replaced, one or both: nobody gets a
// wrong answer, no request waits in vain, and metad is never ready with only some of the tasks.
func TestRootChaos(t *testing.T) {
	c := newChaos(t)
	putAgentBehind(t, c.host)
	c.d = startMetad(t, c.host)
	c.runDir = c.d.runDir()
	l := startLoad(t, c.host, 4, 16)
	tasks := slices.Clone(l.tasks)
	know := func() {
		waitFor(t, "every task to be in the snapshot", func() bool {
			return saved(c.runDir, tasks)
		})
		var known []string
		for _, k := range tasks {
			known = append(known, k.arn)
		}
		c.known.Store(&known)
	}
	know()
	stop, watched := make(chan struct{}), make(chan struct{})
	go func() { defer close(watched); c.watch(stop) }()

	rounds, end := 0, time.Now().Add(c.length())
	for ; time.Now().Before(end); rounds++ {
		faults := c.pick()
		names := make([]string, len(faults))
		for i, f := range faults {
			names[i] = f.name
		}
		t.Logf("%v: %s", time.Since(loadStart).Round(time.Millisecond),
			strings.Join(names, ", "))
		c.round(faults)
		c.d.waitReady()
		n := l.rightNow()
		waitFor(t, "right answers after "+strings.Join(names, ", "), func() bool { return l.rightNow() > n })
		if rounds%4 == 3 {
			task := c.host.RunTask(t, testdocker.Task{ID: fmt.Sprint("late-", rounds),
				Containers: []testdocker.Container{{Name: "app"}}})
			tasks = append(tasks, loadTask{arn: task.ARN, addr: task.Port.Addr})
			know()
		}
	}
	close(stop)
	<-watched
	l.end()
	hung, slow := l.hung(), c.unexcused(l.slow)
	t.Logf("%d rounds: %d requests, %d right, %d by the agent, %d wrong, %d refused or "+
		"reset, %d hung; "+
		"%d slower than a second, %d of them while metad was not stopped: %v; ready %d "+
		"times",
		rounds, l.requests(), l.right, l.agent, len(l.wrong), len(l.failed), len(hung),
		len(l.slow), len(slow), first(slow), c.seen.Load())
	if len(l.wrong) > 0 || len(hung) > 0 || c.seen.Load() == 0 {
		t.Errorf("wrong: %v, hung: %v", first(l.wrong), first(hung))
	}
	if text := c.partial.Load(); text != nil {
		t.Errorf("ready %s", *text)
	}
	if code := c.d.stop(); code != 0 {
		t.Errorf("the last metad: got exit code %d, want 0\n%s", code, c.d.out)
	}
}
