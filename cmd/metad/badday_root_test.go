//go:build root

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"metad/internal/testdocker"
)

// Somebody sits on the admin port: containers are answered, the log says once what is missing, and
// metad has the port when it is free.
func TestRootAdminPortTaken(t *testing.T) {
	h := testdocker.Shared(t)
	id := h.Run(t, testdocker.Container{})
	var squatter net.Listener
	if err := h.Do(func() (err error) {
		squatter, err = net.Listen("tcp4", defaultAdmin)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	d := newProcess(t, h)
	d.start()
	waitFor(t, "an answer", func() bool {
		out, _, err := h.TryExec(id, "wget", "-qO-", "http://169.254.170.2/v2/metadata")
		return err == nil && strings.Contains(out, id)
	})
	const line = "listener unavailable, retrying"
	waitFor(t, "the line in the log", func() bool { return strings.Contains(d.out.String(), line) })
	squatter.Close()
	d.waitReady()
	if out := d.out.String(); strings.Count(out, line) != 1 ||
		strings.Count(out, "listener available") != 1 {
		t.Errorf("want one line for each change:\n%s", out)
	}
	if code := d.stop(); code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
}

// front is a socket before the Engine's. hold reports whether a request is held until the test
// ends.
func front(t *testing.T, h *testdocker.Host,
	hold func(*http.Request) <-chan struct{}) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "front.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	back := &httputil.ReverseProxy{
		FlushInterval: -1,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: "docker"})
		},
		Transport: &http.Transport{DialContext: func(ctx context.Context, _,
			_ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", h.Socket)
		}},
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if wait := hold(r); wait != nil {
			select {
			case <-wait:
			case <-r.Context().Done():
				return
			}
		}
		back.ServeHTTP(w, r)
	})}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return socket
}

// At a first start beside an agent, packets come to metad when it has the list of containers, and
// not before: until then the agent knows more.
func TestRootFirstStartWaitsForTheList(t *testing.T) {
	h := testdocker.Start(t) // with an agent's rule: not the shared one
	putAgentBehind(t, h)
	id := h.RunTask(t, testdocker.Task{ID: "known",
		Containers: []testdocker.Container{{Name: "app"}}}).Containers[0]
	list := make(chan struct{})
	socket := front(t, h, func(r *http.Request) <-chan struct{} {
		if strings.HasSuffix(r.URL.Path, "/containers/json") {
			return list
		}
		return nil
	})
	d := newProcess(t, h)
	d.start("--docker-host", "unix://"+socket)
	code := 0
	waitFor(t, "admin address", func() bool {
		var err error
		code, _, err = d.get(defaultAdmin, "/readyz")
		return err == nil
	})
	// Longer than the five seconds after which metad once gave up waiting.
	for end := time.Now().Add(6 * time.Second); time.Now().Before(end); time.Sleep(
		200 * time.Millisecond) {
		if code == http.StatusOK {
			t.Fatal("ready without a list")
		}
		if got := ask(t, h, id, "/v2/metadata"); got != agentAnswer {
			t.Fatalf("before the list: got %s, want the agent's answer", got)
		}
		code, _, _ = d.get(defaultAdmin, "/readyz")
	}
	close(list)
	d.waitReady()
	if got := ask(t, h, id, "/v2/metadata"); !strings.Contains(got, "/known") {
		t.Errorf("after the list: got %s", got)
	}
}

// A container whose inspect hangs stays with the agent, while the others are answered by metad;
// where no rule leads to the agent it is refused. Once the Engine answers, metad does.
func TestRootHungInspectStaysWithTheAgent(t *testing.T) {
	h := testdocker.Start(t) // with an agent's rule: not the shared one
	putAgentBehind(t, h)
	known, hung := h.Run(t, testdocker.Container{}), h.Run(t, testdocker.Container{})
	answers := make(chan struct{})
	socket := front(t, h, func(r *http.Request) <-chan struct{} {
		if strings.HasSuffix(r.URL.Path, "/containers/"+hung+"/json") {
			return answers
		}
		return nil
	})
	d := newProcess(t, h)
	d.start("--docker-host", "unix://"+socket)
	waitFor(t, "metad's answer to the one that is known", func() bool {
		return strings.Contains(ask(t, h, known, "/v2/metadata"), known)
	})
	for _, netfilter := range []string{"1", "0"} {
		if out, err := h.Command("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+
			netfilter).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for range 5 {
			if got := ask(t, h, hung, "/v2/metadata"); got != agentAnswer {
				t.Errorf("netfilter on bridges %s: got %q, want the agent's answer",
					netfilter, got)
			}
		}
	}
	if out, err := h.Command("iptables", "-w", "-t", "nat", "-F",
		"PREROUTING").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, _, err := h.TryExec(hung, "wget", "-qO-",
		"http://169.254.170.2/v2/metadata"); err != nil ||
		!strings.Contains(out, "Connection refused") {
		t.Errorf("without the agent's rule: got %q, %v, want that it is refused", out, err)
	}
	close(answers)
	waitFor(t, "metad's answer when the Engine answers", func() bool {
		return strings.Contains(ask(t, h, hung, "/v2/metadata"), hung)
	})
}

// frozenFS is a file system that can be frozen: any write to it waits until it is thawed.
type frozenFS struct {
	dir  string
	thaw func()
}

func newFrozenFS(t *testing.T) *frozenFS {
	t.Helper()
	f := &frozenFS{dir: filepath.Join(t.TempDir(), "mnt")}
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(f.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	must := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
	}
	must("truncate", "-s", "32M", image)
	must("mkfs.ext4", "-q", image)
	must("mount", "-o", "loop", image, f.dir)
	f.thaw = func() {}
	t.Cleanup(func() {
		f.thaw()
		must("umount", f.dir)
	})
	return f
}

func (f *frozenFS) freeze(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("fsfreeze", "-f", f.dir).CombinedOutput(); err != nil {
		t.Fatalf("freeze: %v: %s", err, out)
	}
	f.thaw = sync.OnceFunc(func() {
		if out, err := exec.Command("fsfreeze", "-u", f.dir).CombinedOutput(); err != nil {
			t.Errorf("thaw: %v: %s", err, out)
		}
	})
}

// The disk of the metadata files is frozen while one of them must be written. A container that
// comes then is told who it is, another metad takes over, and that one stops: the next has its
// place.
func TestRootFrozenDataDirectory(t *testing.T) {
	h := testdocker.Shared(t)
	disk := newFrozenFS(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	args := []string{"--docker-proxy", socket, "--container-metadata", "--data-dir",
		filepath.Join(disk.dir, "data")}
	d := startMetad(t, h, args...)
	// before metad is killed: one that waits for the disk does not die
	t.Cleanup(func() { disk.thaw() })
	withFile := dockerAt(t, h, socket)("create", "--name", "with-file", testdocker.BusyboxImage)
	t.Cleanup(func() { h.Remove(t, withFile) })

	disk.freeze(t)
	h.StartContainer(t, withFile) // its file is to be written
	answered := func(what string) {
		t.Helper()
		id := h.Run(t, testdocker.Container{})
		waitFor(t, what, func() bool {
			out, _, err := h.TryExec(id, "wget", "-qO-",
				"http://169.254.170.2/v2/metadata")
			return err == nil && strings.Contains(out, id)
		})
	}
	answered("a container that comes while the disk is frozen")
	without := dockerAt(t, h, socket)("create", "--name", "without-file",
		testdocker.BusyboxImage)
	t.Cleanup(func() { h.Remove(t, without) })
	if out := d.out.String(); !strings.Contains(out, "created without its metadata file") {
		t.Error("no line about the container without a file")
	}

	// A process with a thread that waits for the disk is not gone before the disk is back. All
	// that others could wait for is: the endpoint, the pins, the sockets.
	next := &process{t: t, host: h, dir: d.dir, pins: d.pins}
	t.Cleanup(func() { disk.thaw(); next.kill() })
	next.start(args...)
	waitFor(t, "the takeover", func() bool { return strings.Contains(next.out.String(), "taken over") })
	next.waitReady()
	answered("a container that comes after the takeover")

	if err := next.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "metad0 to go", func() bool { return h.Command("ip", "link", "show", "metad0").Run() != nil })
	last := &process{t: t, host: h, dir: d.dir, pins: d.pins}
	t.Cleanup(func() { disk.thaw(); last.kill() })
	last.start(args...)
	last.waitReady()
	answered("a container that comes after the stop")

	disk.thaw()
	for _, p := range []*process{d, next} {
		<-p.done
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("got exit code %d, want 0:\n%s", code, p.out)
		}
	}
	if code := last.stop(); code != 0 {
		t.Errorf("the last: got exit code %d, want 0", code)
	}
}

// A metad that is stopped by a signal, as one that hangs, proves nothing to the service manager,
// which ends it then; one that goes on proves it again.
func TestRootWatchdog(t *testing.T) {
	h := testdocker.Shared(t)
	manager := notifySocket(t)
	t.Setenv("WATCHDOG_USEC", "2000000")
	d := startMetad(t, h)
	if got := told(t, manager); got != "READY=1" {
		t.Errorf("first: got %q, want READY=1", got)
	}
	for range 2 {
		if got := told(t, manager); got != "WATCHDOG=1" {
			t.Errorf("got %q, want WATCHDOG=1", got)
		}
	}
	if err := d.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "metad to be stopped", func() bool {
		return strings.Contains(readFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid)),
			") T ")
	})
	n := drainMessages(t, manager, 100*time.Millisecond)
	if more := drainMessages(t, manager, 3*time.Second); more > 0 {
		t.Errorf("a stopped metad proved itself %d times", more)
	}
	t.Logf("%d proofs were under way", n)
	if err := d.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if got := told(t, manager); got != "WATCHDOG=1" {
		t.Errorf("after it: got %q, want WATCHDOG=1", got)
	}
	if code := d.stop(); code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
	for got := ""; got != "STOPPING=1"; {
		if got = told(t, manager); got != "STOPPING=1" && got != "WATCHDOG=1" {
			t.Errorf("at the end: got %q", got)
		}
	}
}

// drainMessages reads messages to the service manager until there is none within quiet, and returns
// their number.
func drainMessages(t *testing.T, c *net.UnixConn, quiet time.Duration) (n int) {
	t.Helper()
	for {
		if err := c.SetReadDeadline(time.Now().Add(quiet)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1024)); err != nil {
			return n
		}
		n++
	}
}
