//go:build root

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"metad/internal/child"
	"metad/internal/expect"
	"metad/internal/testdocker"
)

// asMetad in the environment makes the test binary be metad: kill -9 needs a process of its own.
const asMetad = "METAD_TEST_AS_METAD"

func TestMain(m *testing.M) {
	if os.Getenv(asMetad) != "" {
		go func() { // a killed test must not leave a metad behind
			for parent := os.Getppid(); os.Getppid() == parent; {
				time.Sleep(100 * time.Millisecond)
			}
			os.Exit(3)
		}()
		if file := os.Getenv(asManaged); file != "" {
			askManager = managedBy(file)
		}
		filterMe()
		main()
	}
	os.Exit(testdocker.Main(m))
}

// process is a metad process in a test host.
type process struct {
	t    testing.TB
	host *testdocker.Host
	dir  string // run directory, data directory
	pins string
	proc *child.Process // nil before the first start; the next three are its parts
	cmd  *exec.Cmd
	out  *child.Output
	done chan struct{} // closed when the process has ended

	wrap []string // a command that runs metad, which is its last arguments
	env  []string // beside the test's own
	// open in the process, from 3 on
	files []*os.File
}

// newProcess prepares a metad in h; start starts it. Pins and processes go with the test.
func newProcess(t testing.TB, h *testdocker.Host) *process {
	t.Helper()
	pins, err := os.MkdirTemp("/sys/fs/bpf", "metad-test-")
	if err != nil {
		t.Fatalf("is bpffs mounted? %v", err)
	}
	d := &process{t: t, host: h, dir: t.TempDir(), pins: pins}
	t.Cleanup(func() {
		d.kill()
		if err := os.RemoveAll(pins); err != nil {
			t.Error(err)
		}
		if t.Failed() && d.out != nil {
			t.Logf("metad said:\n%s", d.out)
		}
	})
	return d
}

// startMetad starts metad in h and waits until it is ready.
func startMetad(t testing.TB, h *testdocker.Host, args ...string) *process {
	t.Helper()
	d := newProcess(t, h)
	d.start(args...)
	d.waitReady()
	return d
}

func (d *process) command(args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		d.t.Fatal(err)
	}
	all := append(append(slices.Clone(d.wrap), self), args...)
	cmd := d.host.Command(all[0], all[1:]...)
	cmd.Env = append(append(os.Environ(), asMetad+"=1"), d.env...)
	cmd.ExtraFiles = d.files
	return cmd
}

func (d *process) runDir() string { return filepath.Join(d.dir, "run") }

func (d *process) start(args ...string) {
	d.t.Helper()
	cmd := d.command(append([]string{"serve",
		"--docker-host", "unix://" + d.host.Socket,
		"--bundle-dirs", d.host.BundleDir(),
		"--pin-dir", d.pins,
		"--run-dir", d.runDir(),
		"--data-dir", filepath.Join(d.dir, "data"),
		"--docker-proxy", "",
		"--log-level", "debug",
	}, args...)...)
	p := child.Start(d.t, cmd, nil)
	d.proc, d.cmd, d.out, d.done = p, p.Cmd, p.Out, p.Done
}

// waitReady waits until metad says that it answers from a complete list.
func (d *process) waitReady() {
	d.t.Helper()
	d.waitFor("metad to be ready", func() bool {
		select {
		case <-d.done:
			d.t.Fatalf("metad ended: %v\n%s", d.cmd.ProcessState, d.out)
		default:
		}
		code, _, err := d.get("127.0.0.1:51683", "/readyz")
		return err == nil && code == 200
	})
}

func (d *process) waitFor(what string, ok func() bool) {
	d.t.Helper()
	waitFor(d.t, what, ok)
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	expect.Until(t, what, ok)
}

// stop ends metad by SIGTERM and returns its exit code.
func (d *process) stop() int {
	d.t.Helper()
	d.proc.Stop(d.t, 20*time.Second)
	return d.cmd.ProcessState.ExitCode()
}

// kill ends metad by SIGKILL, if it runs.
func (d *process) kill() {
	if d.proc != nil {
		d.proc.Kill()
	}
}

// get asks an address in the host's namespace.
func (d *process) get(addr, path string) (code int, body string, err error) {
	return get(d.host, addr, path)
}

func get(h *testdocker.Host, addr, path string) (code int, body string, err error) {
	err = h.Do(func() error {
		c, err := net.DialTimeout("tcp4", addr, 3*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path,
			addr)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		code, body = resp.StatusCode, string(b)
		return err
	})
	return code, body, err
}

// run runs another command of metad in the host and returns its output and exit code.
func (d *process) run(args ...string) (string, int) {
	d.t.Helper()
	cmd := d.command(args...)
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		d.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// ask asks the endpoint from inside a container, by busybox wget.
func ask(t testing.TB, h *testdocker.Host, container, path string) string {
	t.Helper()
	return h.Exec(t, container, "wget", "-qO-", "http://169.254.170.2"+path)
}

// status asks the endpoint from inside a container and returns the status line's code as text.
func status(t testing.TB, h *testdocker.Host, container, path string) string {
	t.Helper()
	out, _, err := h.TryExec(container, "sh", "-c",
		"printf 'GET "+path+
			" HTTP/1.1\\r\\nHost: 169.254.170.2\\r\\nConnection: close\\r\\n\\r\\n' "+
			"| nc 169.254.170.2 80")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(out, " ")
	code, _, _ := strings.Cut(rest, " ")
	return code
}

// startAgent starts a stand-in for the ECS agent at 127.0.0.1:51679 of the host. kill ends it and
// cuts its connections.
func startAgent(t testing.TB, h *testdocker.Host, handler http.Handler) (kill func()) {
	t.Helper()
	var ln net.Listener
	if err := h.Do(func() (err error) {
		ln, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp4",
			"127.0.0.1:51679")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: handler}
	go s.Serve(ln)
	kill = func() { s.Close() }
	t.Cleanup(kill)
	return kill
}
