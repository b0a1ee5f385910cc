package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"metad/bpf"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

func TestConfigValidate(t *testing.T) {
	f := func(field string, change func(*Config)) {
		t.Helper()
		cfg := testConfig()
		change(&cfg)
		if _, err := New(cfg, nil); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: got %v", field, err)
		}
	}
	f("ReadTimeout", func(c *Config) { c.ReadTimeout = 0 })
	f("WriteTimeout", func(c *Config) { c.WriteTimeout = -1 })
	f("IdleTimeout", func(c *Config) { c.IdleTimeout = 0 })
	f("MaxHeaderBytes", func(c *Config) { c.MaxHeaderBytes = 0 })
	f("MaxBodyBytes", func(c *Config) { c.MaxBodyBytes = 0 })
	f("MaxConns ", func(c *Config) { c.MaxConns = 0 })
	f("MaxConnsPerTask", func(c *Config) { c.MaxConnsPerTask = 0 })
	f("AgentTimeout", func(c *Config) { c.AgentTimeout = 0 })
	f("MaxForwards", func(c *Config) { c.MaxForwards = 0 })
	f("MaxStreams", func(c *Config) { c.MaxStreams = 0 })
	f("UnknownWait", func(c *Config) { c.UnknownWait = -1 })
	f("UnknownWait", func(c *Config) { c.UnknownWait = MaxUnknownWait + 1 })
	f("Rate", func(c *Config) { c.Rate = RateLimit{PerSecond: 1} })
	f("Tag", func(c *Config) { c.Tag = nil })
	f("Log", func(c *Config) { c.Log = nil })
	for _, url := range []string{"127.0.0.1:51679", "https://127.0.0.1", "http://",
		"http://h/path", "http://u@h", "http://h?q", "http://[::1"} {
		f("AgentURL", func(c *Config) { c.AgentURL = url })
	}
	for url, want := range map[string]string{"": "",
		"http://127.0.0.1:51679": "127.0.0.1:51679", "http://h/": "h:80", "http://[::1]": "[::1]:80"} {
		cfg := testConfig()
		cfg.AgentURL = url
		if got, err := cfg.validate(); got != want || err != nil {
			t.Errorf("%q: got %q, %v", url, got, err)
		}
	}
}

// Each connection is asked for its tag once, however many requests it carries, and the tag decides.
func TestTagOncePerConnection(t *testing.T) {
	var asked atomic.Int32
	var tag atomic.Uint32
	cfg := testConfig()
	cfg.Tag = func(net.Conn) (uint32, error) {
		asked.Add(1)
		return tag.Load(), nil
	}
	h := newHost(t, cfg, newTask(), newOther())
	ask := func(from netip.Addr, status int, arn string) {
		t.Helper()
		asked.Store(0)
		c := h.dial(t, from)
		r := bufio.NewReader(c)
		for range 3 {
			_, _ = c.Write(request("/v2/metadata"))
			if got := read(t, r, "GET"); got.StatusCode != status ||
				!strings.Contains(got.body, arn) {
				t.Errorf("tag %#x: got %d %s", tag.Load(), got.StatusCode, got.body)
			}
		}
		if n := asked.Load(); n != 1 {
			t.Errorf("asked %d times, want 1", n)
		}
	}
	for _, v := range h.table.Views() {
		tag.Store(v.Tag) // whatever the address: the kernel saw it
		ask(addrU, 200, v.Task.ARN)
	}
	tag.Store(bpf.TagPort | 12)
	ask(addrT, 200, arnT)
	tag.Store(bpf.TagPort | 13) // B's port, T's address
	ask(addrT, 400, "unable to associate")
	tag.Store(12345) // nobody's
	ask(addrT, 400, "unable to associate")
}

func TestTagError(t *testing.T) {
	cfg := testConfig()
	cfg.Tag = func(net.Conn) (uint32, error) { return 0, errors.New("no") }
	h := newHost(t, cfg, newTask())
	c := h.dial(t, addrT)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection without a tag was kept")
	}
	h.quiet(t)
}

// The kernel's own answer, on a real socket: nobody marked it.
func TestSocketMark(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if mark, err := SocketMark(c); mark != 0 || err != nil {
		t.Errorf("got %d, %v", mark, err)
	}
	if _, err := SocketMark(newLoopConn(addrT)); err == nil {
		t.Error("got a mark of what is no socket")
	}
	_ = c.Close()
	if _, err := SocketMark(c); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: got %v", err)
	}
}

// A request that comes before its task is known is answered as soon as the task is.
func TestUnknownSourceWaits(t *testing.T) {
	cfg := testConfig()
	cfg.UnknownWait = MaxUnknownWait
	const waiters = 20
	h := newHost(t, cfg)
	// The test's own clock decides when waiting ends, not 400 ms.
	h.cfg.UnknownWait = time.Minute
	var wg sync.WaitGroup
	for range waiters {
		wg.Go(func() {
			c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: addrT.AsSlice()}}).Dial(
				"tcp", h.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_, _ = c.Write(request("/v2/metadata"))
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("got %v, %v", resp, err)
			}
		})
	}
	eventually(t, "all wait", func() bool { return h.Counters().Waiting == waiters })
	if err := h.table.Apply([]*task.Task{newTask()}); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	h.quiet(t)
}

// X01: a container that asks as its first act is in its task's document, although the task was
// known before it. Who has had an answer on the connection is not that container, and does not
// wait.
func TestSettlingTaskWaits(t *testing.T) {
	cfg := testConfig()
	cfg.UnknownWait = MaxUnknownWait
	h := newHost(t, cfg, newTask())
	old := h.dial(t, addrT)
	_, _ = old.Write(request("/v2/metadata"))
	br := bufio.NewReader(old)
	read(t, br, "GET")
	h.cfg.UnknownWait = time.Minute
	settling := newTask()
	settling.Containers, settling.Settling = settling.Containers[:1], true
	if err := h.table.Apply([]*task.Task{settling}); err != nil {
		t.Fatal(err)
	}
	_, _ = old.Write(request("/v2/metadata"))
	if r := read(t, br, "GET"); strings.Count(r.body, "DockerId") != 1 {
		t.Errorf("on a connection that has had an answer: got %s", r.body)
	}
	c := h.dial(t, addrT)
	_, _ = c.Write(request("/v2/metadata"))
	eventually(t, "it waits", func() bool { return h.Counters().Waiting == 1 })
	again := *settling // something else about it has changed
	for _, tk := range []*task.Task{&again, newTask()} {
		if err := h.table.Apply([]*task.Task{tk}); err != nil {
			t.Fatal(err)
		}
	}
	if r := read(t, bufio.NewReader(c), "GET"); r.StatusCode != 200 ||
		strings.Count(r.body, "DockerId") != 2 {
		t.Errorf("got %d %s, want both containers", r.StatusCode, r.body)
	}
}

// A task that does not settle in time is answered with what is known of it.
func TestSettlingTaskWaitsNotForEver(t *testing.T) {
	cfg := testConfig()
	cfg.UnknownWait = 20 * time.Millisecond
	settling := newTask()
	settling.Settling = true
	h := newHost(t, cfg, settling)
	if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 200 ||
		!strings.Contains(r.body, arnT) {
		t.Errorf("got %d %s", r.StatusCode, r.body)
	}
}

// A task's connections are bounded, and the bound is its own.
func TestMaxConnsPerTask(t *testing.T) {
	cfg := testConfig()
	cfg.MaxConnsPerTask = 3
	h := newHost(t, cfg, newTask(), newOther())
	var open []net.Conn
	for range cfg.MaxConnsPerTask {
		open = append(open, h.dial(t, addrT))
	}
	eventually(t, "accepted", func() bool { return h.Counters().Open == 3 })
	c := h.dial(t, addrT)
	r := read(t, bufio.NewReader(c), "GET")
	if r.StatusCode != 503 || r.Header.Get("Retry-After") != "1" {
		t.Errorf("got %d %v", r.StatusCode, r.Header)
	}
	if r := h.get(t, addrB, "/v2/metadata"); r.StatusCode != 200 {
		t.Errorf("another task: got %d", r.StatusCode)
	}
	if n := h.Counters().Refused; n != 1 {
		t.Errorf("refused: got %d, want 1", n)
	}
	_ = open[0].Close()
	eventually(t, "closed", func() bool { return h.Counters().Open < 3 })
	if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 200 {
		t.Errorf("after one left: got %d", r.StatusCode)
	}
}

func TestMaxConns(t *testing.T) {
	cfg := testConfig()
	cfg.MaxConns = 1
	h := newHost(t, cfg, newTask(), newOther())
	h.dial(t, addrT)
	eventually(t, "accepted", func() bool { return h.Counters().Open == 1 })
	if r := read(t, bufio.NewReader(h.dial(t, addrB)), "GET"); r.StatusCode != 503 {
		t.Errorf("got %d", r.StatusCode)
	}
}

// A task that has all its connections and wants one more is named, so that the kernel can drop what
// would be refused; one that finds the server full is not.
func TestBusyTasksAreNamed(t *testing.T) {
	const tag, tagOfOther = 7, 8
	cfg := testConfig()
	cfg.MaxConns, cfg.MaxConnsPerTask = 2, 1
	var current uint32
	cfg.Tag = func(net.Conn) (uint32, error) { return current, nil }
	var named []uint32
	cfg.Busy = func(tag uint32) { named = append(named, tag) }
	l := listener{s: newHost(t, cfg, newTask()).Server}
	for _, c := range []struct {
		tag  uint32
		want error
	}{
		{bpf.ContainerTag(tag, 1), nil},
		{bpf.ContainerTag(tag, 2), errBusySource},
		{tagOfOther, nil},
		{tagOfOther + 1, errFull},
	} {
		current = c.tag
		if _, err := l.admit(newLoopConn(addrT)); !errors.Is(err, c.want) {
			t.Errorf("tag %#x: got %v, want %v", c.tag, err, c.want)
		}
	}
	if !slices.Equal(named, []uint32{tag}) {
		t.Errorf("named as busy: got %v, want %d alone", named, tag)
	}
}

// Senders without a proof, who can make up addresses, have half of the connections at most; a task
// finds the other half free.
func TestUnprovedConns(t *testing.T) {
	cs := newConns(&Config{MaxConns: 100, MaxConnsPerTask: 10})
	open := func(tag uint32, host byte) *conn {
		c := &conn{Conn: newOnceConn(nil), tag: tag,
			remote: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, host}), 1)}
		if cs.add(c, 0) != nil {
			return nil
		}
		return c
	}
	var unproved []*conn
	for host := range byte(200) {
		if c := open(bpf.TagNone, host); c != nil {
			unproved = append(unproved, c)
		}
	}
	if len(unproved) != 50 || cs.refused.Load() != 150 {
		t.Errorf("without a proof: %d open and %d refused, want 50 and 150", len(unproved),
			cs.refused.Load())
	}
	for tag := uint32(1); tag <= 5; tag++ {
		for range 10 {
			if open(tag, byte(tag)) == nil {
				t.Fatalf("a connection of task %d was refused", tag)
			}
		}
	}
	_ = unproved[0].Close()
	if open(bpf.TagNone, 1) == nil {
		t.Error("refused after one has left")
	}
}

// What is kept for a source goes with its last connection, or when its bucket is full again: as
// many sources as ever come, and whatever they ask for.
func TestPeersForgotten(t *testing.T) {
	cfg := testConfig()
	h := newHost(t, cfg, newTask())
	for i := range 3 {
		for range 100 {
			h.get(t, addrT, fmt.Sprintf("/v2/metadata/%d-%d", i, time.Now().UnixNano()))
		}
	}
	h.quiet(t)
	if n := len(h.Server.conns.peers); n != 0 {
		t.Errorf("without a limit: got %d peers, want 0", n)
	}

	cfg.Rate = RateLimit{PerSecond: 1000, Burst: 1000}
	cs := newConns(&cfg)
	now := int64(0)
	greedy := &conn{Conn: newLoopConn(addrT), tag: 1}
	cs.add(greedy, now)
	for greedy.peer.bucket.take(now, RateLimit{PerSecond: 1, Burst: 1000}) == 0 {
	}
	_ = greedy.Close()
	holder := &conn{Conn: newLoopConn(addrT), tag: 1 << 20} // asks for nothing, but is there
	cs.add(holder, now)
	for i := range 10_000 {
		c := &conn{Conn: newLoopConn(addrT), tag: uint32(i + 2)}
		if cs.add(c, now) != nil {
			t.Fatal("refused")
		}
		c.peer.bucket.take(now, cfg.Rate)
		_ = c.Close()
		now += int64(time.Millisecond)
	}
	if n := len(cs.peers); n > 2*minSweep {
		t.Errorf("with a limit: got %d peers, want at most %d", n, 2*minSweep)
	}
	if cs.peers[greedy.src] != greedy.peer {
		t.Error("who has used up its tokens was forgotten")
	}
	if cs.peers[holder.src] != holder.peer {
		t.Error("who has a connection was forgotten")
	}
}

// A new connection for each request is no way around the limit.
func TestLimitOutlivesConnections(t *testing.T) {
	h := newLimited(t)
	h.exhaust(t)
	h.quiet(t)
	if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 429 {
		t.Errorf("got %d, want 429", r.StatusCode)
	}
}

func TestBucket(t *testing.T) {
	var b bucket
	limit := RateLimit{PerSecond: 10, Burst: 2}
	now := int64(1e9)
	f := func(advance time.Duration, want time.Duration) {
		t.Helper()
		now += int64(advance)
		if got := b.take(now, limit); got != int64(want) {
			t.Errorf("got %v, want %v", time.Duration(got), want)
		}
	}
	f(0, 0)
	f(0, 0)
	f(0, 100*time.Millisecond)
	f(99*time.Millisecond, time.Millisecond)
	f(time.Millisecond, 0)
	f(0, 100*time.Millisecond)
	f(time.Hour, 0)
	f(0, 0)
	f(0, 100*time.Millisecond)
	if b.full(now) || !b.full(now+int64(200*time.Millisecond)) {
		t.Error("full: wrong")
	}
}

// A container that is being created has no id to key a sample by.
func TestStatsWithoutID(t *testing.T) {
	tk := sampled()
	creating := &task.Container{Name: "next", KnownStatus: task.StatusNone}
	tk.Containers = []*task.Container{creating, tk.Containers[0], creating}
	h := newHost(t, testConfig(), tk)
	want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":`+sampleA+`}`)
}

// panicky is a table that panics.
type panicky struct{ Tasks }

func (panicky) Resolve(uint32, netip.Addr) *lookup.View { panic("resolve") }

// A panic costs its request and connection, nothing else.
func TestPanic(t *testing.T) {
	h := newHost(t, testConfig(), newTask())
	good := h.Server.tasks
	h.Server.tasks = panicky{}
	for range 2 {
		c := h.dial(t, addrT)
		_, _ = c.Write(request("/v2/metadata"))
		r := bufio.NewReader(c)
		want(t, read(t, r, "GET"), 500, typeJSON, "{}")
		if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("connection: got %v, want it closed", err)
		}
	}
	if n := h.Counters().Panics; n != 2 {
		t.Errorf("counted %d, want 2", n)
	}
	h.quiet(t)
	h.Server.tasks = good
	if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 200 {
		t.Errorf("afterwards: got %d", r.StatusCode)
	}
}

// shutdown starts Shutdown and returns its result's channel.
func (h *host) shutdown(ctx context.Context) <-chan error {
	done := make(chan error, 1)
	go func() { done <- h.Shutdown(ctx) }()
	for !h.stopping.Load() {
		time.Sleep(time.Millisecond)
	}
	return done
}

// Connections that are open when the server is told to stop are served to their end: one that has
// not asked yet, one between two requests, one that is being passed on.
func TestShutdownDrains(t *testing.T) {
	release := make(chan struct{})
	a := serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		<-release
		_, _ = io.WriteString(w, "late")
	}))
	cfg := a.config()
	cfg.IdleTimeout, cfg.ReadTimeout = time.Minute, time.Minute
	h := newHost(t, cfg, newTask())
	fresh, idle, passed := h.dial(t, addrT), h.dial(t, addrT), h.dial(t, addrT)
	_, _ = idle.Write(request("/v2/metadata"))
	idleReader := bufio.NewReader(idle)
	if r := read(t, idleReader, "GET"); r.Close {
		t.Error("closed too early")
	}
	_, _ = passed.Write(request("/v4/x"))
	eventually(t, "accepted", func() bool { return h.Counters().Open == 3 && h.forwards.count() == 1 })

	done, again := h.shutdown(context.Background()), h.shutdown(context.Background())
	if err := h.Serve(nil); !errors.Is(err, ErrStopped) {
		t.Errorf("Serve while stopping: got %v", err)
	}
	for c, r := range map[net.Conn]*bufio.Reader{fresh: bufio.NewReader(fresh),
		idle: idleReader} {
		_, _ = c.Write(request("/v2/metadata"))
		if r := read(t, r, "GET"); r.StatusCode != 200 || !r.Close {
			t.Errorf("got %d, close %v; want 200 and the connection's end",
				r.StatusCode, r.Close)
		}
	}
	select {
	case err := <-done:
		t.Errorf("Shutdown returned %v before the last answer", err)
	default:
	}
	close(release)
	if r := read(t, bufio.NewReader(passed), "GET"); r.body != "late" {
		t.Errorf("passed on: got %q", r.body)
	}
	if err := errors.Join(<-done, <-again); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	h.quiet(t)
}

func TestShutdownDeadline(t *testing.T) {
	cfg := testConfig()
	cfg.AgentURL = "http://" + mute(t)
	cfg.AgentTimeout, cfg.ReadTimeout = time.Minute, time.Minute
	h := newHost(t, cfg, newTask())
	h.cfg.UnknownWait = time.Hour
	h.dial(t, addrT)
	_, _ = h.dial(t, addrT).Write(request("/v4/x"))
	_, _ = h.dial(t, addrU).Write(request("/v2/metadata"))
	eventually(t, "accepted", func() bool { return h.Counters().Open == 3 && h.Counters().Waiting == 1 && h.forwards.count() == 1 })
	ctx, cancel := context.WithCancel(context.Background())
	done := h.shutdown(ctx)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	h.quiet(t)
}

// The listening socket lives on in whoever it was handed to, connections not yet accepted included.
func TestShutdownLeavesListener(t *testing.T) {
	old := newStopped(t, testConfig(), newTask())
	ln := old.listen(t)
	file, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := old.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	waiting := old.dial(t, addrT) // before anybody accepts
	_, _ = waiting.Write(request("/v2/metadata"))
	if err := ln.Close(); err != nil {
		t.Errorf("Shutdown closed what is not its own: %v", err)
	}

	handed, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	next := newStopped(t, testConfig(), newTask())
	served := make(chan error, 1)
	go func() { served <- next.Serve(handed) }()
	if r := read(t, bufio.NewReader(waiting), "GET"); r.StatusCode != 200 {
		t.Errorf("got %d", r.StatusCode)
	}
	_ = waiting.Close()
	if err := next.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	_ = handed.Close()
	if err := <-served; !errors.Is(err, ErrStopped) {
		t.Errorf("got %v", err)
	}
}

// lateListener accepts c as it is told to stop, and nothing else.
type lateListener struct {
	brokenListener
	c       *onceConn
	stopped chan struct{}
}

func (l *lateListener) SetDeadline(time.Time) error {
	close(l.stopped)
	return nil
}

func (l *lateListener) Accept() (net.Conn, error) {
	<-l.stopped
	if c := l.c; c != nil {
		l.c = nil
		time.Sleep(50 * time.Millisecond) // for Shutdown to be wrong in
		return c, nil
	}
	return nil, os.ErrDeadlineExceeded
}

// A connection that is accepted at the very moment is served.
func TestShutdownServesLast(t *testing.T) {
	h := newStopped(t, testConfig(), newTask())
	c := newOnceConn(request("/v2/metadata"))
	l := &lateListener{c: c, stopped: make(chan struct{})}
	served := make(chan error, 1)
	go func() { served <- h.Serve(l) }()
	eventually(t, "serving", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.listeners) == 1
	})
	if err := h.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := c.out.String(); !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") {
		t.Errorf("got %q", got)
	}
	if err := <-served; !errors.Is(err, ErrStopped) {
		t.Errorf("got %v", err)
	}
}

// brokenListener fails with each of errs in turn.
type brokenListener struct {
	net.Listener
	errs []error
}

func (l *brokenListener) Accept() (net.Conn, error) {
	err := l.errs[0]
	l.errs = l.errs[1:]
	return nil, err
}

func (l *brokenListener) Addr() net.Addr { return &net.TCPAddr{} }

// Running out of descriptors passes; a listener that is gone does not.
func TestAcceptErrors(t *testing.T) {
	h := newStopped(t, testConfig())
	emfile := &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	if err := h.Serve(&brokenListener{errs: []error{emfile, emfile,
		net.ErrClosed}}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want net.ErrClosed", err)
	}
}
