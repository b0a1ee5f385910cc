//go:build root

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"metad/internal/expect"
	"metad/internal/testdocker"
	"metad/internal/testnet"
)

// asManaged in the environment names the file in which a supervisor says what systemd would say.
const asManaged = "METAD_TEST_MANAGER"

func managedBy(file string) func(context.Context) (unitState, error) {
	return func(context.Context) (unitState, error) {
		var said struct {
			Restarting bool
			Kept       int
		}
		b, err := os.ReadFile(file)
		if err == nil {
			err = json.Unmarshal(b, &said)
		}
		return unitState{said.Restarting, said.Kept}, err
	}
}

// supervisor plays systemd's part towards a metad: it reads what metad notifies, keeps the files
// that it stores, and hands them to the next process.
type supervisor struct {
	t    testing.TB
	d    *process
	wrap []string // as process.wrap
	file string   // what managedBy reads
	sock *net.UnixConn

	mu         sync.Mutex // guards what follows
	restarting bool
	kept       []*os.File
}

// supervise starts metad in h under a supervisor.
func supervise(t testing.TB, h *testdocker.Host, args ...string) *supervisor {
	t.Helper()
	s := newSupervisor(t, h)
	s.start(args...)
	return s
}

// newSupervisor prepares a metad in h; start starts it.
func newSupervisor(t testing.TB, h *testdocker.Host) *supervisor {
	t.Helper()
	s := &supervisor{t: t, d: newProcess(t, h), file: filepath.Join(t.TempDir(), "unit")}
	dir, err := os.MkdirTemp("", "metad") // its name leaves room in a socket's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	addr := &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}
	if s.sock, err = net.ListenUnixgram(addr.Net, addr); err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() { defer close(over); s.listen() }()
	t.Cleanup(func() { s.sock.Close(); <-over; s.drop() })
	s.say()
	s.d.env = []string{"NOTIFY_SOCKET=" + addr.Name, asManaged + "=" + s.file}
	return s
}

// listen reads messages until the socket is closed.
func (s *supervisor) listen() {
	for {
		b, oob := make([]byte, 4096), make([]byte, 4096)
		n, oobn, _, _, err := s.sock.ReadMsgUnix(b, oob)
		if err != nil {
			return
		}
		s.hear(string(b[:n]), filesOf(oob[:oobn]))
	}
}

// filesOf returns the files of a control message.
func filesOf(oob []byte) (files []*os.File) {
	controls, _ := unix.ParseSocketControlMessage(oob)
	for _, c := range controls {
		fds, _ := unix.ParseUnixRights(&c)
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "kept"))
		}
	}
	return files
}

func (s *supervisor) hear(message string, files []*os.File) {
	lines := strings.Split(message, "\n")
	has := func(want string) bool {
		for _, l := range lines {
			if l == want {
				return true
			}
		}
		return false
	}
	switch {
	case has("FDSTORE=1") && has("FDPOLL=0") && has("FDNAME="+keptName):
		s.mu.Lock()
		s.kept, files = append(s.kept, files...), nil
		s.mu.Unlock()
	case has("FDSTOREREMOVE=1") && has("FDNAME="+keptName):
		s.drop()
	}
	s.say()
	for _, f := range files { // a barrier's too
		f.Close()
	}
}

// say writes what the manager knows of its unit.
func (s *supervisor) say() {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := fmt.Sprintf(`{"Restarting":%v,"Kept":%d}`, s.restarting, len(s.kept))
	if err := os.WriteFile(s.file+".new", []byte(b), 0o600); err == nil {
		err = os.Rename(s.file+".new", s.file)
		if err != nil {
			s.t.Error(err)
		}
	}
}

// drop closes what is kept.
func (s *supervisor) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.kept {
		f.Close()
	}
	s.kept = nil
}

func (s *supervisor) keeps() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.kept)
}

// stop ends metad by SIGTERM, of a job "restart" or "stop".
func (s *supervisor) stop(restarting bool) {
	s.t.Helper()
	s.mu.Lock()
	s.restarting = restarting
	s.mu.Unlock()
	s.say()
	if code := s.d.stop(); code != 0 {
		s.t.Errorf("got exit code %d, want 0\n%s", code, s.d.out)
	}
	if n := s.keeps(); n != 1 && restarting || n != 0 && !restarting {
		s.t.Fatalf("restarting %v: got %d files kept\n%s", restarting, n, s.d.out)
	}
}

// start starts a metad, which gets what is kept.
func (s *supervisor) start(args ...string) {
	s.t.Helper()
	s.mu.Lock()
	s.restarting = false
	s.d.files = s.kept
	n := len(s.kept)
	s.mu.Unlock()
	s.say()
	s.d.wrap = slices.Clone(s.wrap)
	if n > 0 {
		names := strings.TrimSuffix(strings.Repeat(keptName+":", n), ":")
		s.d.wrap = append(s.d.wrap, "sh", "-c", fmt.Sprintf(
			`LISTEN_PID=$$ LISTEN_FDS=%d LISTEN_FDNAMES=%s exec "$@"`, n, names), "sh")
	}
	s.d.start(args...)
	s.d.waitReady()
}

// A restart by a service manager that keeps files fails no request, and none goes past metad:
// connections wait for the next process. A stop leaves nothing behind, and the agent answers.
func TestRootRestartKept(t *testing.T) {
	t.Run("tcx", func(t *testing.T) { testnet.SkipBefore(t, "6.6"); restartKept(t, "tcx") })
	t.Run("clsact", func(t *testing.T) { restartKept(t, "clsact") })
}

func restartKept(t *testing.T, attach string) {
	const restarts = 10
	h := testdocker.Start(t)
	putAgentBehind(t, h) // its answer would mean that packets went past metad
	s := supervise(t, h, "--attach", attach)
	l := startLoad(t, h, 4, 64)
	for i := range restarts {
		n := l.requests()
		expect.Until(t, "requests", func() bool { return l.requests() >= n+1000 })
		s.stop(true)
		s.start("--attach", attach)
		if s.keeps() != 0 {
			t.Errorf("restart %d: the manager still keeps it: if this metad dies, "+
				"clients wait", i)
		}
		if !strings.Contains(s.d.out.String(), "taken over") {
			t.Errorf("restart %d: started anew:\n%s", i, s.d.out)
		}
	}
	n := l.requests()
	expect.Until(t, "requests", func() bool { return l.requests() >= n+1000 })
	l.end()
	t.Logf("%d restarts: %d requests, %d right, %d wrong, %d by the agent, %d failed, %d "+
		"slower than a second", restarts, l.requests(), l.right, len(l.wrong), l.agent,
		len(l.failed), len(l.slow))
	if l.right != l.requests() {
		t.Errorf("first of the wrong: %v, of the failed: %v", first(l.wrong),
			first(l.failed))
	}
	s.stop(false)
	answeredByAgent(t, h, l.tasks[0])
}

// answeredByAgent waits until nothing of metad is in the way.
func answeredByAgent(t *testing.T, h *testdocker.Host, k loadTask) {
	t.Helper()
	expect.Until(t, "the agent to answer", func() bool {
		var c loadConn
		body, err := c.ask(k, false)
		return err == nil && body == agentAnswer
	})
	expect.Until(t, "metad0 to go", func() bool {
		return h.Command("ip", "link", "show", "metad0").Run() != nil
	})
}

// What a service manager keeps and then drops, because the next metad does not start, is gone as
// after a kill: the agent answers. The next start makes everything anew. So does a start with
// settings that a takeover cannot change.
func TestRootKeptInVain(t *testing.T) {
	h := testdocker.Start(t)
	putAgentBehind(t, h)
	s := supervise(t, h)
	l := startLoad(t, h, 1, 0)
	s.stop(true)
	s.drop()
	answeredByAgent(t, h, l.tasks[0])
	s.start()
	answered := func() {
		t.Helper()
		var c loadConn
		if body, err := c.ask(l.tasks[0], false); err != nil ||
			!strings.Contains(body, l.tasks[0].arn) {
			t.Errorf("got %q, %v, want the task", body, err)
		}
	}
	answered()

	s.stop(true)
	s.start("--max-addresses", "77")
	answered()
	if _, page, err := s.d.get("127.0.0.1:51683", "/metrics"); err != nil ||
		!strings.Contains(page, `metad_limit_max{limit="addresses"} 77`) {
		t.Errorf("max-addresses has no effect: %v", err)
	}

	// killed after it has taken what was kept
	s.stop(true)
	s.start("--max-addresses", "77")
	if err := s.d.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-s.d.done
	answeredByAgent(t, h, l.tasks[0])
}
