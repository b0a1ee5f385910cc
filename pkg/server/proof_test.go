package server

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/internal/expect"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// noMaps are the kernel's maps of containers, which nobody reads.
type noMaps struct{}

func (noMaps) PutContainer(uint64, *bpf.ContainerValue) error     { return nil }
func (noMaps) PutHostContainer(uint64, *bpf.ContainerValue) error { return nil }
func (noMaps) DeleteContainer(uint64) error                       { return nil }
func (noMaps) Containers() (own, host map[uint64]bpf.ContainerValue, err error) {
	return nil, nil, nil
}

// proofHost serves a task of three containers that share its address, d in the cgroup 101 and f in
// x. f has a status of its own; without one the task does not show it.
func proofHost(t *testing.T, cfg Config) (h *host, apply func(x uint64, f task.Status)) {
	t.Helper()
	table := lookup.New(&fakeKernel{}, zap.NewNop())
	table.NameContainers(noMaps{})
	apply = func(x uint64, f task.Status) {
		tk := &task.Task{ID: "t", ARN: arnT,
			Endpoints: []task.Endpoint{{Addr: addrT, Ifindex: 12}}}
		for id, cgroup := range map[string]uint64{"e": 99, "f": x, "d": 101} {
			c := &task.Container{ID: strings.Repeat(id, 64), Name: id,
				KnownStatus: task.StatusRunning,
				PID:         7, Cgroup: task.Cgroup{ID: cgroup, Level: 2},
				Stats: &task.StatsCell{}}
			if id == "f" {
				c.KnownStatus = f
			}
			if c.KnownStatus == "" {
				continue
			}
			if id != "e" {
				c.NetworkMode = "container:" + strings.Repeat("e", 64)
			}
			tk.Containers = append(tk.Containers, c)
		}
		tk.Endpoints[0].Container = strings.Repeat("e", 64)
		if err := table.Apply([]*task.Task{tk}); err != nil {
			t.Fatal(err)
		}
	}
	apply(100, task.StatusRunning)
	s, err := New(cfg, table)
	if err != nil {
		t.Fatal(err)
	}
	h = &host{Server: s, table: table}
	h.listen(t)
	return h, apply
}

// askSelf asks on one connection for the container that asks: its Docker id's first digit, or the
// status.
func askSelf(t *testing.T, c net.Conn) string {
	t.Helper()
	if _, err := io.WriteString(c, "GET /v4/self HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	r := read(t, bufio.NewReader(c), "GET")
	if r.StatusCode != 200 {
		return r.Status
	}
	return strings.TrimPrefix(r.body, `{"DockerId":"`)[:1]
}

// Where the mark names no container, the socket itself is asked, once for each connection; what it
// says is believed if it is a container of the task, and as long as that container is there.
func TestSocketCgroup(t *testing.T) {
	var cgroup, asked atomic.Uint64
	cfg := DefaultConfig()
	cfg.Log = zap.NewNop()
	var tag atomic.Uint32
	cfg.Tag = func(net.Conn) (uint32, error) { return tag.Load(), nil }
	cfg.SocketCgroup = func(pid int, from, to netip.AddrPort) (uint64, error) {
		asked.Add(1)
		if pid != 7 || from.Addr() != addrT || !to.IsValid() {
			t.Errorf("asked for a socket from %v to %v in the namespace of %d", from,
				to, pid)
		}
		if cgroup.Load() == 0 {
			return 0, errors.New("no socket")
		}
		return cgroup.Load(), nil
	}
	h, apply := proofHost(t, cfg)
	tag.Store(h.table.Views()[0].Tag)
	f := func(c net.Conn, want string) {
		t.Helper()
		if got := askSelf(t, c); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	const unknown = "404 Not Found"
	for socket, want := range map[uint64]string{0: unknown, 1: unknown, 555: unknown,
		101: "d"} {
		cgroup.Store(socket)
		before := asked.Load()
		c := h.dial(t, addrT)
		f(c, want)
		f(c, want)
		if n := asked.Load() - before; n != 1 {
			t.Errorf("cgroup %d: asked %d times, want 1", socket, n)
		}
	}
	cgroup.Store(100)
	c := h.dial(t, addrT)
	f(c, "f")

	// The mark's word needs no other, and a number that is another container's by now names
	// nobody.
	var n int
	for n = 1; ; n++ {
		if cv := h.table.Views()[0].Sender(bpf.ContainerTag(tag.Load(), n),
			addrT); cv.Name == "f" {
			break
		}
	}
	before := asked.Load()
	tag.Store(bpf.ContainerTag(tag.Load(), n))
	c = h.dial(t, addrT)
	f(c, "f")
	apply(0, task.StatusRunning)
	f(c, unknown)
	if asked.Load() != before {
		t.Error("asked for a socket whose container the kernel has named")
	}
	if h.Counters().Unnamed == 0 {
		t.Error("not counted")
	}
}

// A container whose cgroup is not known yet is named by the cgroup's directory. If the task does
// not show it as started, the request waits for that, and not for ever; a cgroup of no container is
// not waited for.
func TestAwaitMaker(t *testing.T) {
	const unknown, made, nobodys = "404 Not Found", 555, 556
	var cgroup atomic.Uint64
	cfg := DefaultConfig()
	cfg.Log = zap.NewNop()
	var tag atomic.Uint32
	cfg.Tag = func(net.Conn) (uint32, error) { return tag.Load(), nil }
	cfg.SocketCgroup = func(int, netip.AddrPort, netip.AddrPort) (uint64, error) {
		return cgroup.Load(), nil
	}
	cfg.CgroupContainer = func(cgroup uint64) string {
		if cgroup == made {
			return strings.Repeat("f", 64)
		}
		return ""
	}
	h, apply := proofHost(t, cfg)
	tag.Store(h.table.Views()[0].Tag)
	f := func(want string) {
		t.Helper()
		if got := askSelf(t, h.dial(t, addrT)); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	cgroup.Store(made)
	apply(0, task.StatusRunning)
	f("f")
	for _, before := range []task.Status{"", task.StatusCreated, task.StatusStopped} {
		apply(0, before)
		done := make(chan struct{})
		go func() {
			defer close(done)
			expect.Until(t, "the request to wait", func() bool {
				return h.waiting.Load() == 1
			})
			apply(0, before) // a change, but not the one
			apply(0, task.StatusRunning)
		}()
		f("f")
		<-done
	}
	apply(0, "")
	cgroup.Store(nobodys)
	f(unknown)
	cfg.MakerWait = 10 * time.Millisecond
	h, apply = proofHost(t, cfg)
	apply(0, "")
	cgroup.Store(made)
	f(unknown)
}

// The only container that is known to have an address is not taken for another one in its network,
// which the task does not show yet, by however slow an Engine. A client of which the socket says
// nothing is still named by its address.
func TestOnlyContainerIsNotTakenForAnother(t *testing.T) {
	const unknown = "404 Not Found"
	var cgroup atomic.Uint64
	cfg := DefaultConfig()
	cfg.Log = zap.NewNop()
	cfg.MakerWait = time.Millisecond
	var tag atomic.Uint32
	cfg.Tag = func(net.Conn) (uint32, error) { return tag.Load(), nil }
	cfg.SocketCgroup = func(int, netip.AddrPort, netip.AddrPort) (uint64, error) {
		if cgroup.Load() == 0 {
			return 0, errors.New("no socket")
		}
		return cgroup.Load(), nil
	}
	const ofE, ofAnother, nobodys = 99, 555, 556
	cfg.CgroupContainer = func(cgroup uint64) string {
		if cgroup == ofAnother {
			return strings.Repeat("a", 64)
		}
		return ""
	}
	h, _ := proofHost(t, cfg)
	tag.Store(h.table.Views()[0].Tag)
	only := &task.Task{ID: "t", ARN: arnT,
		Endpoints: []task.Endpoint{{Addr: addrT, Ifindex: 12,
			Container: strings.Repeat("e", 64)}},
		Containers: []*task.Container{{ID: strings.Repeat("e", 64), Name: "e",
			KnownStatus: task.StatusRunning, PID: 7,
			Cgroup: task.Cgroup{ID: ofE, Level: 2}, Stats: &task.StatsCell{}}}}
	if err := h.table.Apply([]*task.Task{only}); err != nil {
		t.Fatal(err)
	}
	for socket, want := range map[uint64]string{ofE: "e", ofAnother: unknown, nobodys: "e",
		0: "e"} {
		cgroup.Store(socket)
		c := h.dial(t, addrT)
		for range 2 {
			if got := askSelf(t, c); got != want {
				t.Errorf("cgroup %d: got %q, want %q", socket, got, want)
			}
		}
	}
}
