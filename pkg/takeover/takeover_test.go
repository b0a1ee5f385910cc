package takeover

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"metad/internal/expect"
)

const patience = 2 * time.Minute // no test takes it unless it fails

func testConfig(t *testing.T) Config {
	return Config{Dir: shortDir(t), Layout: 3, Build: "test", uid: os.Getuid()}
}

// shortDir is a temporary directory whose name leaves room in a socket address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "takeover")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// predecessor is a metad that serves, as far as a test in one process needs one.
type predecessor struct {
	*Socket
	given, resumed atomic.Int32
	result         chan waited
}

type waited struct {
	successor *Successor
	err       error
}

func newPredecessor(t *testing.T, ctx context.Context, cfg Config,
	offer func() (State, error)) *predecessor {
	t.Helper()
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h := &predecessor{Socket: s, result: make(chan waited, 1)}
	go func() {
		successor, err := s.Wait(ctx, func() (State, error) {
			h.given.Add(1)
			return offer()
		}, func() { h.resumed.Add(1) })
		h.result <- waited{successor, err}
	}()
	t.Cleanup(func() { s.Close() })
	return h
}

func emptyState() (State, error) { return State{}, nil }

func openFDs(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestState: a state that does not fit into one packet, by its bytes and by its files, arrives
// whole.
func TestState(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	meta := bytes.Repeat([]byte("0123456789abcdef"), 3*partMeta/16)
	const n = 4*partFiles + 7
	var inodes []uint64
	give := func() (State, error) {
		s := State{Meta: meta}
		for range n {
			fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
			if err != nil {
				return State{}, err
			}
			inodes = append(inodes, inode(t, fd))
			s.Files = append(s.Files, os.NewFile(uintptr(fd), "state"))
		}
		return s, nil
	}
	before := openFDs(t)
	h := newPredecessor(t, ctx, cfg, give)
	p, err := Take(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p.Meta, meta) {
		t.Errorf("got %d bytes that differ from the %d given", len(p.Meta), len(meta))
	}
	var got []uint64
	for _, file := range p.Files {
		fd := int(file.Fd())
		got = append(got, inode(t, fd))
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil ||
			flags&unix.FD_CLOEXEC == 0 {
			t.Fatalf("descriptor %d: got flags %#x, %v, want close-on-exec", fd, flags,
				err)
		}
	}
	if !slices.Equal(got, inodes) {
		t.Errorf("got %d files, want the %d given in their order", len(got), n)
	}
	if err := p.Serving(ctx); err != nil {
		t.Fatal(err)
	}
	w := <-h.result
	if w.err != nil || h.given.Load() != 1 || h.resumed.Load() != 0 {
		t.Fatalf("predecessor: got %v, given %d times, resumed %d", w.err, h.given.Load(),
			h.resumed.Load())
	}
	select {
	case <-p.Left():
		t.Error("predecessor has left, want not before it closes")
	case <-w.successor.Died():
		t.Error("successor died, want it alive")
	default:
	}
	h.Socket.Close()
	w.successor.Close()
	<-p.Left()

	// The socket has moved: the next one finds the new metad by it.
	if _, err := Listen(cfg); !errors.Is(err, ErrInUse) {
		t.Errorf("listen: got %v, want %v", err, ErrInUse)
	}
	closeAll(p.Files)
	p.Socket.Close()
	if got := openFDs(t); got > before {
		t.Errorf("got %d open files, want no more than %d as before", got, before)
	}
	if _, err := Take(ctx, cfg); !errors.Is(err, ErrNobody) {
		t.Errorf("take: got %v, want %v", err, ErrNobody)
	}
}

// A host with 10,000 containers can be taken over.
func TestLargeState(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	cfg.Within = time.Minute // a loaded machine needs longer than a real successor may take
	const size = 60 << 20
	newPredecessor(t, ctx, cfg, func() (State, error) { return State{Meta: make([]byte, size)}, nil })
	p, err := Take(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if len(p.Meta) != size {
		t.Errorf("got %d bytes, want %d", len(p.Meta), size)
	}
}

// TestListenerStaysNonBlocking: the predecessor goes on accepting with deadlines while its listener
// is on the way, which it could not if the way made the socket, which both share, block.
func TestListenerStaysNonBlocking(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	newPredecessor(t, ctx, cfg, func() (State, error) {
		f, err := ln.(*net.TCPListener).File()
		return State{Files: []*os.File{f}}, err
	})
	p, err := Take(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	defer closeAll(p.Files)
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0); err != nil ||
			flags&unix.O_NONBLOCK == 0 {
			t.Errorf("got flags %#x, %v, want O_NONBLOCK", flags, err)
		}
	})
}

func inode(t *testing.T, fd int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// TestRefused: a process that may not take over hears why, and the predecessor goes on.
func TestRefused(t *testing.T) {
	f := func(name string, change func(*Config), give func() (State, error), wantGiven,
		wantResumed int32, want string) {
		t.Helper()
		ctx, cfg := testContext(t), testConfig(t)
		h := newPredecessor(t, ctx, cfg, func() (State, error) {
			if give != nil {
				defer func() { give = nil }()
				return give()
			}
			return emptyState()
		})
		other := cfg
		change(&other)
		_, err := Take(ctx, other)
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %v with %q", name, err, ErrRefused, want)
		}
		if got := h.given.Load(); got != wantGiven {
			t.Errorf("%s: given %d times, want %d", name, got, wantGiven)
		}
		p, err := Take(ctx, cfg)
		if err == nil {
			err = p.Serving(ctx)
		}
		if err != nil {
			t.Errorf("%s: the next one: got %v", name, err)
			return
		}
		p.Close()
		if w := <-h.result; w.err != nil || h.resumed.Load() != wantResumed {
			t.Errorf("%s: predecessor: got %v, resumed %d times, want %d", name, w.err,
				h.resumed.Load(), wantResumed)
		}
	}
	f("older layout", func(c *Config) { c.Layout = 2; c.Build = "v0.9" }, nil, 0, 0,
		"the running metad test has protocol 1 and layout 3, metad v0.9 has 1 and 2")
	f("newer layout", func(c *Config) { c.Layout = 4 }, nil, 0, 0, "metad test has 1 and 4")
	f("nothing to give", func(*Config) {}, func() (State, error) {
		return State{},
			errors.New("links are moving")
	}, 1, 1,
		"no takeover now: links are moving")
}

// TestStrangers: what connects and is no successor does not get the state, and the predecessor goes
// on.
func TestStrangers(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	h := newPredecessor(t, ctx, cfg, emptyState)
	f := func(name, send, want string) {
		t.Helper()
		c, err := net.Dial("unixpacket", cfg.path())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if send != "" {
			if _, err := c.Write([]byte(send)); err != nil {
				t.Fatal(err)
			}
		} else {
			c.(*net.UnixConn).CloseWrite()
		}
		c.SetReadDeadline(time.Now().Add(patience))
		b := make([]byte, maxPacket)
		n, _ := c.Read(b)
		if !strings.Contains(string(b[:n]), want) || want == "" && n > 0 {
			t.Errorf("%s: got %q, want %q in it", name, b[:n], want)
		}
	}
	f("newer protocol", `{"Type":"hello","Protocol":2,"Layout":3,"New":{"x":1}}`, "metad  has 2 and 3")
	f("no hello", `{"Type":"serving"}`, "want hello, got serving")
	f("garbage", "GET / HTTP/1.1\r\n\r\n", "")
	f("nothing", "", "")
	if h.given.Load() != 0 {
		t.Errorf("given %d times, want never", h.given.Load())
	}
	if _, err := Take(ctx, cfg); err != nil {
		t.Error(err)
	}
}

// TestTakenBack: the predecessor that waited too long, or is stopped, says so, and the successor
// that has begun to serve stops.
func TestTakenBack(t *testing.T) {
	f := func(name string, within time.Duration, stop bool, want string) {
		t.Helper()
		ctx, cfg := testContext(t), testConfig(t)
		cfg.Within = within
		hctx, cancel := context.WithCancel(ctx)
		defer cancel()
		h := newPredecessor(t, hctx, cfg, emptyState)
		p, err := Take(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if stop {
			cancel()
		}
		expect.Until(t, name+": the holder to resume", func() bool {
			return h.resumed.Load() > 0
		})
		if err := p.Serving(ctx); !errors.Is(err, ErrAborted) ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %v with %q", name, err, ErrAborted, want)
		}
		p.Close()
		if stop {
			if w := <-h.result; !errors.Is(w.err, context.Canceled) {
				t.Errorf("%s: predecessor: got %v, want %v", name, w.err,
					context.Canceled)
			}
			return
		}
		if p, err = Take(ctx, cfg); err != nil {
			t.Errorf("%s: the next one: got %v", name, err)
		} else if err = p.Serving(ctx); err != nil {
			t.Errorf("%s: the next one: got %v", name, err)
		}
	}
	f("too slow", time.Second, false, "did not serve in time")
	f("predecessor is stopped", 0, true, "")
}

// A predecessor that dies before it has accepted the connection is nobody to take over from.
func TestPredecessorDiesUnaccepted(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.at = func(step string) {
		if step == "connected" {
			s.ln.Close()
		}
	}
	if _, err := Take(ctx, cfg); !errors.Is(err, ErrNobody) {
		t.Errorf("got %v, want %v", err, ErrNobody)
	}
}

// TestSuccessorGivesUp: closed before it served, it leaves the predecessor as it was.
func TestSuccessorGivesUp(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	h := newPredecessor(t, ctx, cfg, emptyState)
	for want := int32(1); want <= 3; want++ {
		p, err := Take(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		expect.Until(t, fmt.Sprintf("the holder to resume %d times", want), func() bool {
			return h.resumed.Load() == want
		},
			func() any { return h.resumed.Load() })
	}
	if _, err := os.Stat(cfg.path()); err != nil {
		t.Error(err)
	}
}

// TestHungAfterState: a predecessor that is stopped after it has given its state keeps no successor
// waiting. When it wakes up it goes on, and the next successor takes over from it.
func TestHungAfterState(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	stopped := make(chan struct{})
	hangs := cfg
	hangs.at = func(step string) {
		if step == "given" {
			<-stopped
		}
	}
	h := newPredecessor(t, ctx, hangs, emptyState)
	p, err := Take(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.cfg.Patience = 10 * time.Millisecond
	if err := p.Serving(ctx); !errors.Is(err, ErrHung) {
		t.Errorf("got %v, want %v", err, ErrHung)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	close(stopped)
	expect.Until(t, "the predecessor to resume", func() bool { return h.resumed.Load() == 1 })
	if p, err = Take(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	if err := p.Serving(ctx); err != nil {
		t.Error(err)
	}
	(<-h.result).successor.Close()
	<-p.Left()
	p.Close()
}

// TestStart: of many that start at once one holds, and each other takes over from one before it.
func TestStart(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	// What a killed predecessor leaves.
	dead, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	dead.ln.Close()

	const n = 8
	var wg sync.WaitGroup
	var first, done atomic.Int32
	last := make(chan struct{})
	for range n {
		wg.Go(func() {
			s, p, err := Start(ctx, cfg)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			if p == nil {
				first.Add(1)
			} else if err := p.Serving(ctx); err != nil {
				t.Error(err)
				return
			}
			if done.Add(1) == n {
				close(last)
				return
			}
			w, err := s.Wait(ctx, emptyState, func() {})
			if err != nil {
				t.Error(err)
				return
			}
			defer w.Close()
		})
	}
	wg.Wait()
	if first.Load() != 1 || done.Load() != n {
		t.Errorf("got %d that began and %d that served, want 1 and %d", first.Load(),
			done.Load(), n)
	}
	if _, err := os.Stat(cfg.path()); !os.IsNotExist(err) {
		t.Errorf("socket after the last has left: got %v, want none", err)
	}
}

// TestReceiveAfterClose: what a peer said last is heard although it left without listening.
func TestReceiveAfterClose(t *testing.T) {
	cfg := testConfig(t)
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: cfg.path(),
		Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	here := &conn{c: c}
	defer here.close()
	a, err := s.ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	there := &conn{c: a}
	if err := errors.Join(here.send(message{Type: typeServing}),
		there.send(message{Type: typeAbort}), there.close()); err != nil {
		t.Fatal(err)
	}
	if m, _, err := here.receive(); err != nil || m.Type != typeAbort {
		t.Errorf("got %v, %v, want %s", m, err, typeAbort)
	}
	if _, _, err := here.receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after it: got %v, want %v", err, io.EOF)
	}
}

func TestListen(t *testing.T) {
	cfg := testConfig(t)
	cfg.Dir = filepath.Join(cfg.Dir, "made")
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(cfg); !errors.Is(err, ErrInUse) {
		t.Errorf("second: got %v, want %v", err, ErrInUse)
	}
	st, err := os.Stat(cfg.path())
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: got %v, %v, want mode 0600", st, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(cfg.path()); !os.IsNotExist(err) {
		t.Errorf("socket after close: got %v, want none", err)
	}
}

func FuzzParsePacket(f *testing.F) {
	f.Add([]byte(`{"Type":"hello","Protocol":1,"Layout":3,"Build":"v1"}`), 0)
	f.Add([]byte(`{"Type":"state","Meta":"AAAA","Files":2,"Last":true}`), 0)
	f.Add([]byte(`{"Type":"state"}`), unix.MSG_CTRUNC)
	f.Fuzz(func(t *testing.T, b []byte, flags int) {
		m, fds, err := parsePacket(b, nil, flags)
		if err == nil && (m.Files != 0 || len(fds) != 0 ||
			flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
			t.Errorf("got %+v with files %v and flags %#x of a packet without files", m,
				fds, flags)
		}
	})
}

// ask sends one request to a process of TestMain's kind and returns who answered.
func ask(c net.Conn) (string, error) {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintln(c, "who"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}
