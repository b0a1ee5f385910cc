package takeover

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"metad/internal/expect"
)

// TestMain: with TAKEOVER_NAME set the test binary is one of the processes that the tests start.
func TestMain(m *testing.M) {
	if name := os.Getenv("TAKEOVER_NAME"); name != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := serveAs(ctx, name, os.Getenv("TAKEOVER_DIR"),
			os.Getenv("TAKEOVER_DIE")); err != nil {
			fmt.Fprintln(os.Stderr, name+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// lineServer answers every line with its name, and knows how many connections it has.
type lineServer struct {
	name     string
	ln       *net.TCPListener
	open     atomic.Int64
	draining chan struct{} // closed: connections end with the next answer
	accepts  chan struct{} // closed when the accept loop is over
}

func (s *lineServer) accept() {
	s.draining, s.accepts = make(chan struct{}), make(chan struct{})
	s.ln.SetDeadline(time.Time{})
	go func(draining, accepts chan struct{}) {
		defer close(accepts)
		for {
			c, err := s.ln.Accept()
			if err != nil {
				return
			}
			s.open.Add(1)
			go func() {
				defer s.open.Add(-1)
				defer c.Close()
				lines := bufio.NewScanner(c)
				for lines.Scan() {
					fmt.Fprintln(c, s.name)
					select {
					case <-draining:
						return
					default:
					}
				}
			}()
		}
	}(s.draining, s.accepts)
}

// drain stops accepting; the channel is closed once no connection is left.
func (s *lineServer) drain() <-chan struct{} {
	s.ln.SetDeadline(time.Unix(1, 0))
	<-s.accepts
	close(s.draining)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s.open.Load() > 0 {
			time.Sleep(time.Millisecond)
		}
	}()
	return done
}

// goods are what the successor gets.
type goods interface {
	open() (net.Listener, error)
	adopt(*Predecessor) (net.Listener, error)
	offer() (State, error)
	resume()
	leave(owner bool) error // owner: nobody has taken over
}

// newGoods returns the goods that the environment asks for.
var newGoods = func(dir string) goods { return &socketGoods{dir: dir} }

// socketGoods are a listener, whose address is in the file "addr".
type socketGoods struct {
	dir string
	ln  net.Listener
}

func (g *socketGoods) open() (_ net.Listener, err error) {
	if g.ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	tmp := filepath.Join(g.dir, "tmp")
	if err := os.WriteFile(tmp, []byte(g.ln.Addr().String()), 0o600); err != nil {
		return nil, err
	}
	return g.ln, os.Rename(tmp, filepath.Join(g.dir, "addr"))
}

func (g *socketGoods) adopt(p *Predecessor) (_ net.Listener, err error) {
	g.ln, err = net.FileListener(p.Files[0])
	return g.ln, err
}

func (g *socketGoods) offer() (State, error) {
	f, err := g.ln.(*net.TCPListener).File()
	return State{Meta: make([]byte, 2*partMeta), Files: []*os.File{f}}, err
}

func (g *socketGoods) resume()          {}
func (g *socketGoods) leave(bool) error { return g.ln.Close() }

// serveAs is a metad that knows no tasks and answers with its name.
func serveAs(ctx context.Context, name, dir, die string) error {
	at := func(step string) {
		if step == die {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	sock, p, err := Start(ctx, Config{Dir: dir, Layout: 3, Build: name, uid: os.Getuid(),
		at: at})
	if err != nil {
		return err
	}
	g := newGoods(dir)
	var ln net.Listener
	if p == nil {
		ln, err = g.open()
	} else if ln, err = g.adopt(p); err == nil {
		at("adopted")
	}
	if err != nil {
		return err
	}
	s := &lineServer{name: name, ln: ln.(*net.TCPListener)}
	s.accept()
	if p != nil {
		if err := p.Serving(ctx); err != nil {
			<-s.drain()
			return errors.Join(err, p.Close(), g.leave(false))
		}
	}
	for {
		successor, err := sock.Wait(ctx, g.offer, g.resume)
		if err != nil {
			<-s.drain()
			err = errors.Join(g.leave(true), sock.Close())
			if !errors.Is(ctx.Err(), context.Canceled) {
				err = errors.Join(err, errors.New("not asked to end"))
			}
			return err
		}
		drained := s.drain()
		select {
		case <-drained:
			return errors.Join(g.leave(false), successor.Close())
		case <-successor.Died():
			g.resume()
			s.accept()
		}
	}
}

// process is a started serveAs.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // after done
}

func start(t *testing.T, dir, name, die string, more ...func(*exec.Cmd)) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{name: name, cmd: exec.Command(self), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), "TAKEOVER_NAME="+name, "TAKEOVER_DIR="+dir,
		"TAKEOVER_DIE="+die)
	p.cmd.Stderr = os.Stderr
	for _, f := range more {
		f(p.cmd)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.err = p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() { p.cmd.Process.Kill(); <-p.done })
	return p
}

// wait returns how the process ended.
func (p *process) wait(t *testing.T) error {
	t.Helper()
	select {
	case <-p.done:
		return p.err
	case <-time.After(patience):
		t.Fatalf("%s does not end", p.name)
		return nil
	}
}

// address waits for the first process to listen.
func address(t *testing.T, dir string) string {
	t.Helper()
	var addr []byte
	expect.Until(t, "the first process to listen", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "addr"))
		addr = b
		return err == nil
	})
	return string(addr)
}

// dialer connects to the address that was written last.
func dialer(t *testing.T, dir string) func() (net.Conn, error) {
	return func() (net.Conn, error) { return net.Dial("tcp", address(t, dir)) }
}

// answers waits until want answers new connections, ten times in a row.
func answers(t *testing.T, dial func() (net.Conn, error), want string) {
	t.Helper()
	row, got := 0, ""
	expect.Until(t, want+" to answer", func() bool {
		c, err := dial()
		if err == nil {
			got, err = ask(c)
			c.Close()
		}
		if row++; err != nil || got != want {
			row = 0
		}
		return row == 10
	}, func() any { return got })
}

// TestTakeovers: a chain of processes, each of which takes over from the one before under load; no
// request fails, on new connections and on ones that are kept.
func TestTakeovers(t *testing.T) {
	dir := shortDir(t)
	p := start(t, dir, "p0", "")
	addr := address(t, dir)
	var requests, reconnects atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	load := func(keep bool) {
		var c net.Conn
		for {
			select {
			case <-stop:
				if c != nil {
					c.Close()
				}
				return
			default:
			}
			fresh := c == nil
			if fresh {
				var err error
				if c, err = net.Dial("tcp", addr); err != nil {
					t.Errorf("connect: %v", err)
					return
				}
			}
			_, err := ask(c)
			requests.Add(1)
			if err != nil && !fresh {
				// Closed after the last answer: a client of a kept connection
				// connects again.
				reconnects.Add(1)
				c.Close()
				c = nil
				continue
			}
			if err != nil {
				t.Errorf("request on a new connection: %v", err)
				return
			}
			if !keep {
				c.Close()
				c = nil
			}
		}
	}
	for i := range 4 {
		wg.Go(func() { load(i%2 == 0) })
	}
	const n = 10
	for i := 1; i <= n; i++ {
		next := start(t, dir, fmt.Sprintf("p%d", i), "")
		if err := p.wait(t); err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
		p = next
		answers(t, dialer(t, dir), p.name)
	}
	close(stop)
	wg.Wait()
	t.Logf("%d takeovers, %d requests, 0 failed unless told above; %d kept connections "+
		"closed while idle", n, requests.Load(), reconnects.Load())
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.wait(t); err != nil {
		t.Errorf("last: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, socketName)); !os.IsNotExist(err) {
		t.Errorf("socket after the last has left: got %v, want none", err)
	}
}

// crash has one of the two die at a step: the other serves, and can be taken over from.
func crash(t *testing.T, who, step, survivor string, dial func(dir string) func() (net.Conn, error),
	more ...func(*exec.Cmd)) {
	die := map[string]string{who: step}
	dir := shortDir(t)
	connect := dial(dir)
	a := start(t, dir, "old", die["old"], more...)
	answers(t, connect, "old")
	// An open connection: the old one is not through with draining when the new one dies.
	kept, err := connect()
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if _, err := ask(kept); err != nil {
		t.Fatal(err)
	}
	b := start(t, dir, "new", die["new"], more...)
	dead, alive := a, b
	if who == "new" {
		dead, alive = b, a
	}
	if err := dead.wait(t); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("%s: got %v, want it killed", who, err)
	}
	answers(t, connect, survivor)
	select {
	case <-alive.done:
		t.Errorf("%s has ended: %v", alive.name, alive.err)
	default:
	}
	kept.Close()
	c := start(t, dir, "third", "", more...)
	answers(t, connect, "third")
	if err := alive.wait(t); err != nil {
		t.Errorf("%s: %v", alive.name, err)
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
	if err := c.wait(t); err != nil {
		t.Errorf("third: %v", err)
	}
}

// crashSteps are all steps of a takeover at which one of the two can die.
var crashSteps = []struct {
	who, survivor string
	steps         []string
}{
	{"new", "old", []string{"connected", "taken", "adopted", "serving", "accepted"}},
	{"old", "new", []string{"hello", "part", "given", "serving", "accepted"}},
}

func TestCrash(t *testing.T) {
	for _, c := range crashSteps {
		for _, step := range c.steps {
			t.Run(c.who+" at "+step, func(t *testing.T) {
				crash(t, c.who, step, c.survivor, func(dir string) func() (net.Conn, error) { return dialer(t, dir) })
			})
		}
	}
}

// TestHung: beside a predecessor that is stopped a start ends with an error. The predecessor goes
// on when it is continued, and can be taken over from.
func TestHung(t *testing.T) {
	dir := shortDir(t)
	old := start(t, dir, "old", "")
	answers(t, dialer(t, dir), "old")
	if err := old.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stat := fmt.Sprintf("/proc/%d/stat", old.cmd.Process.Pid)
	expect.Until(t, "the old one to be stopped", func() bool {
		b, err := os.ReadFile(stat)
		return err == nil && strings.Contains(string(b), ") T ")
	})
	cfg := Config{Dir: dir, Layout: 3, uid: os.Getuid(), Patience: 100 * time.Millisecond}
	if _, _, err := Start(testContext(t), cfg); !errors.Is(err, ErrHung) {
		t.Errorf("got %v, want %v", err, ErrHung)
	}
	if err := old.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	answers(t, dialer(t, dir), "old")
	next := start(t, dir, "next", "")
	answers(t, dialer(t, dir), "next")
	if err := old.wait(t); err != nil {
		t.Errorf("old: %v", err)
	}
	next.cmd.Process.Signal(syscall.SIGTERM)
	if err := next.wait(t); err != nil {
		t.Errorf("next: %v", err)
	}
}
