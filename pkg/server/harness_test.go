package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
	"go.uber.org/zap"

	"metad/bpf"
	"metad/internal/expect"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// fakeKernel is a kernel map in user space.
type fakeKernel struct {
	mu sync.Mutex
	m  map[netip.Addr]bpf.TaskValue
}

func (k *fakeKernel) Put(a netip.Addr, v *bpf.TaskValue) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.m == nil {
		k.m = map[netip.Addr]bpf.TaskValue{}
	}
	k.m[a] = *v
	return nil
}

func (k *fakeKernel) Delete(a netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.m, a)
	return nil
}

func (k *fakeKernel) Entries() (map[netip.Addr]bpf.TaskValue, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return maps.Clone(k.m), nil
}

// Ids and addresses of the tasks of newTasks. Every one is a loopback address, so that a client can
// bind to it and be its task over a real socket.
const (
	idA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	idP = "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"
	idB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"

	arnT = "arn:aws:ecs:us-west-2:111122223333:task/default/158d1c8083dd49d6b527399fd6414f5c"
	arnB = "arn:aws:ecs:us-west-2:111122223333:task/default/b5c1a2e0c7f64e4b8f0f7c0d2f3a4b5c"
)

var (
	addrT = netip.MustParseAddr("127.1.0.2")
	addrB = netip.MustParseAddr("127.1.0.3")
	addrU = netip.MustParseAddr("127.1.0.9") // no task's
)

func running(id, name string) *task.Container {
	return &task.Container{
		ID: id, Name: name, DockerName: "ecs-web-7-" + name + "-aabbccddeeff00112233",
		Image: "nginx:1", ImageID: "sha256:aa",
		Labels: map[string]string{
			task.LabelTaskARN: arnT, task.LabelContainerName: name, task.LabelFamily: "web",
			task.LabelRevision: "7", task.LabelCluster: "default",
		},
		DesiredStatus: task.StatusRunning, KnownStatus: task.StatusRunning,
		Limits:    task.ContainerLimits{CPU: 10, Memory: 50},
		CreatedAt: time.Date(2024, 1, 2, 3, 4, 5, 500_000_000, time.UTC),
		StartedAt: time.Date(2024, 1, 2, 3, 4, 6, 0, time.UTC),
		Type:      task.TypeNormal,
		Networks:  []task.Network{{Mode: "awsvpc", IPv4Addresses: []string{"192.0.2.3"}}},
		PID:       100, State: "running", Stats: &task.StatsCell{},
	}
}

func pause() *task.Container {
	p := running(idP, task.PauseName)
	p.DockerName = "ecs-web-7-internalecspause-00aabbccddeeff001122"
	p.Image, p.ImageID = "amazon/amazon-ecs-pause:0.1.0", ""
	p.DesiredStatus, p.KnownStatus = task.StatusResourcesProvisioned,
		task.StatusResourcesProvisioned
	p.Limits = task.ContainerLimits{}
	p.Type = task.TypeCNIPause
	return p
}

// taskDocument is what is to be answered for t.
func taskDocument(v task.Version, t *task.Task) string {
	whole, _ := task.Render(t)
	return whole[v].String()
}

// containerDocument is what is to be answered for c, in a task of its own.
func containerDocument(v task.Version, c *task.Container) string {
	_, each := task.Render(&task.Task{Containers: []*task.Container{c}})
	return each[0][v].String()
}

// newTask is the awsvpc task T of the conformance table: containers A and P.
func newTask() *task.Task {
	return &task.Task{
		ID: "158d1c8083dd49d6b527399fd6414f5c", ARN: arnT, Cluster: "default",
		Family: "web", Revision: "7",
		DesiredStatus: task.StatusRunning, KnownStatus: task.StatusRunning,
		Containers: []*task.Container{running(idA, "app"), pause()},
		Endpoints:  []task.Endpoint{{Addr: addrT, Ifindex: 12}},
	}
}

// newOther is a task with container B.
func newOther() *task.Task {
	return &task.Task{
		ID: "b5c1a2e0c7f64e4b8f0f7c0d2f3a4b5c", ARN: arnB, Cluster: "default",
		Family: "other", Revision: "1",
		DesiredStatus: task.StatusRunning, KnownStatus: task.StatusRunning,
		Containers: []*task.Container{running(idB, "other")},
		Endpoints:  []task.Endpoint{{Addr: addrB, Ifindex: 13}},
	}
}

// host is a server with its table, on a loopback socket.
type host struct {
	*Server
	table *lookup.Table
	addr  string
}

// testConfig is the default without an agent, and without a wait for sources that never get a task.
func testConfig() Config {
	cfg := DefaultConfig()
	cfg.AgentURL = ""
	cfg.UnknownWait = 0
	cfg.Tag = func(net.Conn) (uint32, error) { return 0, nil }
	return cfg
}

// newHost serves tasks until the test ends.
func newHost(t testing.TB, cfg Config, tasks ...*task.Task) *host {
	t.Helper()
	h := newStopped(t, cfg, tasks...)
	h.listen(t)
	return h
}

// listen serves a loopback socket until the test ends.
func (h *host) listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr = ln.Addr().String()
	served := make(chan error, 1)
	go func() { served <- h.Serve(ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // no client of a test has anything left to ask
		_ = h.Shutdown(ctx)
		_ = ln.Close()
		if err := <-served; !errors.Is(err, ErrStopped) {
			t.Errorf("Serve: got %v, want ErrStopped", err)
		}
	})
	return ln
}

// newStopped is a host that does not listen.
func newStopped(t testing.TB, cfg Config, tasks ...*task.Task) *host {
	t.Helper()
	table := lookup.New(&fakeKernel{}, zap.NewNop())
	if err := table.Apply(tasks); err != nil {
		t.Fatal(err)
	}
	s, err := New(cfg, table)
	if err != nil {
		t.Fatal(err)
	}
	return &host{Server: s, table: table}
}

// dial connects as from.
func (h *host) dial(t testing.TB, from netip.Addr) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	c, err := d.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// reply is one answer as it came.
type reply struct {
	*http.Response
	body string
}

// send writes a request as it stands to a new connection of from and reads one answer.
func (h *host) send(t testing.TB, from netip.Addr, raw string) reply {
	t.Helper()
	c := h.dial(t, from)
	defer c.Close()
	method, _, _ := strings.Cut(raw, " ")
	if _, err := io.WriteString(c, raw); err != nil {
		t.Fatal(err)
	}
	return read(t, bufio.NewReader(c), method)
}

func read(t testing.TB, r *bufio.Reader, method string) reply {
	t.Helper()
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("read answer: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("read body: %v", err)
	}
	return reply{resp, string(body)}
}

// do is send with a well-formed request of method and target, and header lines if any.
func (h *host) do(t testing.TB, from netip.Addr, method, target string, header ...string) reply {
	t.Helper()
	raw := method + " " + target + " HTTP/1.1\r\nHost: 169.254.170.2\r\n"
	for _, line := range header {
		raw += line + "\r\n"
	}
	return h.send(t, from, raw+"\r\n")
}

func (h *host) get(t testing.TB, from netip.Addr, target string, header ...string) reply {
	t.Helper()
	return h.do(t, from, "GET", target, header...)
}

// loopConn is a connection without a socket: one goroutine asks and waits for the whole answer,
// the server's goroutine answers.
type loopConn struct {
	remote  netip.AddrPort
	ask     chan []byte
	done    chan struct{}
	pending []byte
	asked   bool
	out     bytes.Buffer
}

func newLoopConn(from netip.Addr) *loopConn {
	return &loopConn{
		remote: netip.AddrPortFrom(from, 40000),
		ask:    make(chan []byte), done: make(chan struct{}),
	}
}

// get sends raw and returns what the server wrote before it asked for more; valid until the next
// get.
func (c *loopConn) get(raw []byte) []byte {
	c.out.Reset()
	c.ask <- raw
	<-c.done
	return c.out.Bytes()
}

// Read is called by the server when it has answered everything so far.
func (c *loopConn) Read(p []byte) (int, error) {
	if len(c.pending) == 0 {
		if c.asked {
			c.done <- struct{}{}
		}
		var ok bool
		if c.pending, ok = <-c.ask; !ok {
			return 0, io.EOF
		}
		c.asked = true
	}
	n := copy(p, c.pending)
	c.pending = c.pending[n:]
	return n, nil
}

func (c *loopConn) Write(p []byte) (int, error)      { return c.out.Write(p) }
func (c *loopConn) Close() error                     { return nil }
func (c *loopConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c *loopConn) RemoteAddr() net.Addr             { return net.TCPAddrFromAddrPort(c.remote) }
func (c *loopConn) SetDeadline(time.Time) error      { return nil }
func (c *loopConn) SetReadDeadline(time.Time) error  { return nil }
func (c *loopConn) SetWriteDeadline(time.Time) error { return nil }

// serveLoop lets h serve c until the test ends.
func (h *host) serveLoop(t testing.TB, c *loopConn) {
	t.Helper()
	l := &listener{s: h.Server}
	nc, err := l.admit(c)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- h.http.ServeConn(nc) }()
	t.Cleanup(func() {
		close(c.ask)
		if err := <-served; err != nil {
			t.Errorf("ServeConn: %v", err)
		}
	})
}

// request is a plain GET.
func request(target string) []byte {
	return fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: 169.254.170.2\r\n\r\n", target)
}

func readAll(t testing.TB, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Errorf("read: %v", err)
	}
	return string(b)
}

// fakeClock is a time that passes when it is told to.
type fakeClock struct{ passed atomic.Int64 }

func (c *fakeClock) advance(d time.Duration) { c.passed.Add(int64(d)) }

func (c *fakeClock) of(start time.Time) func(*fasthttp.RequestCtx) time.Time {
	return func(*fasthttp.RequestCtx) time.Time {
		return start.Add(time.Duration(c.passed.Load()))
	}
}

// eventually waits for cond to hold, for what another goroutine is about to do.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	expect.Until(t, what, cond, expect.Goroutines)
}

// goroutines counts those that run this package's code outside of tests and accept loops.
func goroutines() int {
	buf := make([]byte, 8<<20)
	n := 0
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "metad/pkg/server.(*") && !strings.Contains(g, "_test.go") &&
			!strings.Contains(g, "(*listener).Accept") {
			n++
		}
	}
	return n
}

// quiet waits until nothing of h is left over: no connection, no slot, no goroutine.
func (h *host) quiet(t testing.TB) {
	t.Helper()
	eventually(t, "connections closed", func() bool { return h.Counters().Open == 0 })
	eventually(t, "slots given back", func() bool { return h.forwards.count() == 0 && h.streams.count() == 0 && h.Counters().Waiting == 0 })
	eventually(t, "goroutines ended", func() bool { return goroutines() == 0 })
}

// head reads an answer up to its body.
func head(t testing.TB, r *bufio.Reader) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}
