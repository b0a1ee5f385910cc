//go:build root

package loader

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"metad/bpf"
	"metad/internal/testnet"
)

func portTag(k *testnet.Task) string {
	return fmt.Sprintf("metad %#x", bpf.TagPort|uint32(k.Ifindex))
}

// untilAnswer waits until the task is answered want; a connection tried too early may be refused or
// lost.
func untilAnswer(t testing.TB, k *testnet.Task, want string) {
	t.Helper()
	testnet.Until(t, fmt.Sprintf("task %s is answered %q", k, want), func() bool {
		_, body, err := k.Get("/", 300*time.Millisecond)
		return err == nil && body == want
	})
}

func portOf(l *Loader, ifindex int) (Port, bool) {
	for _, p := range l.Ports() {
		if p.Ifindex == ifindex {
			return p, true
		}
	}
	return Port{}, false
}

func hooked(l *Loader, ifindex int) bool {
	p, ok := portOf(l, ifindex)
	return ok && p.Err == nil
}

// Bridges and ports come, go, change their names and their bridges; metad follows.
func TestRootFollow(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		core, logs := observer.New(zapcore.InfoLevel)
		h := testnet.NewHost(t)
		gone, came := make(chan int, 100), make(chan int, 100)
		l := open(t, h, Config{
			Attach: mode, Bridges: []string{"ecs-bridge", "br-*"}, Log: zap.New(core),
			OnPort:     func(ifindex int) { came <- ifindex },
			OnPortGone: func(ifindex int) { gone <- ifindex },
		})
		waiting := func(p string) int {
			return logs.FilterMessage("bridge pattern matches no bridge yet").
				FilterField(zap.String("pattern", p)).Len()
		}
		if waiting("ecs-bridge") != 1 || waiting("br-*") != 1 {
			t.Errorf("patterns that wait: got %v", logs.All())
		}
		if got := l.Status().WaitingPatterns; !slices.Equal(got,
			[]string{"br-*", "ecs-bridge"}) {
			t.Errorf("waiting patterns: got %v", got)
		}
		serve(t, l)

		// After Arm: a bridge and its ports.
		b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
		one, two := b.AddTask(""), b.AddTask("")
		untilAnswer(t, one, portTag(one))
		for _, want := range []*testnet.Task{one, two} {
			if got := <-came; got != want.Ifindex {
				t.Errorf("port: got %d, want %d", got, want.Ifindex)
			}
		}
		put(t, l, one, 1)
		put(t, l, two, 2)
		untilAnswer(t, one, "metad 0x1")
		untilAnswer(t, two, "metad 0x2")

		// A restarted pause container: a new veth with the same address and MAC.
		was := one.Ifindex
		one.ReplaceVeth()
		if got := <-gone; got != was {
			t.Errorf("port gone: got %d, want %d", got, was)
		}
		entries, err := l.Entries()
		if err != nil || len(entries) != 1 {
			t.Errorf("entries after the port went: got %v, %v, want two's alone",
				entries, err)
		}
		untilAnswer(t, one, portTag(one))
		put(t, l, one, 3)
		wantAnswer(t, one, "metad 0x3")

		// A port of an unwatched bridge that joins a watched one, and leaves again.
		other := h.AddBridge("other0", "10.9.0.1/16")
		moving := other.AddTask("")
		movingLink := h.Link(moving.Port)
		if err := h.NL.LinkSetMaster(movingLink, h.Link("ecs-bridge")); err != nil {
			t.Fatal(err)
		}
		testnet.Until(t, "the port that joined is hooked", func() bool {
			return hooked(l, moving.Ifindex)
		})
		if err := h.NL.LinkSetNoMaster(movingLink); err != nil {
			t.Fatal(err)
		}
		testnet.Until(t, "the port that left is not hooked", func() bool {
			return !hooked(l, moving.Ifindex)
		})
		if attached(t, h, moving.Ifindex) {
			t.Error("the port that left still has our program")
		}
		if err := h.NL.LinkSetMaster(movingLink, h.Link("other0")); err != nil {
			t.Fatal(err)
		}

		// A bridge that takes a watched name: it and its ports.
		otherLink := h.Link("other0")
		rename := func(name string) {
			t.Helper()
			if err := errors.Join(h.NL.LinkSetDown(otherLink),
				h.NL.LinkSetName(otherLink, name),
				h.NL.LinkSetUp(otherLink)); err != nil {
				t.Fatal(err)
			}
		}
		rename("br-0123456789ab")
		testnet.Until(t, "the renamed bridge and its port are hooked", func() bool {
			return hooked(l, other.Ifindex) && hooked(l, moving.Ifindex)
		})
		untilAnswer(t, moving, portTag(moving))
		rename("other0")
		testnet.Until(t, "the bridge renamed back and its port are not hooked",
			func() bool {
				return !hooked(l, other.Ifindex) && !hooked(l, moving.Ifindex)
			})
		if waiting("br-*") != 2 {
			t.Errorf("br-* matches nothing again: told %d times, want 2",
				waiting("br-*"))
		}

		// A bridge deleted and made again.
		if err := h.NL.LinkDel(h.Link("ecs-bridge")); err != nil {
			t.Fatal(err)
		}
		testnet.Until(t, "the deleted bridge's ports are not hooked", func() bool {
			return !hooked(l, one.Ifindex) && !hooked(l, two.Ifindex) &&
				!hooked(l, b.Ifindex)
		})
		again := h.AddBridge("ecs-bridge", "169.254.172.1/22")
		for _, k := range []*testnet.Task{one, two} {
			if err := h.NL.LinkSetMaster(h.Link(k.Port),
				h.Link("ecs-bridge")); err != nil {
				t.Fatal(err)
			}
			k.SetGateway(again)
		}
		untilAnswer(t, one, "metad 0x3")
		untilAnswer(t, two, "metad 0x2")
	})
}

// attached reports whether one of our programs is on the device's ingress hook.
func attached(t testing.TB, h *testnet.Host, ifindex int) (found bool) {
	t.Helper()
	f, err := filterInOurPlace(h.NL, ifindex, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		t.Fatal(err)
	}
	if f != nil && ours(f) {
		return true
	}
	err = testnet.In(h.NS, func() error {
		q, err := link.QueryPrograms(link.QueryOptions{Target: ifindex,
			Attach: ebpf.AttachTCXIngress})
		if err != nil {
			return nil // no TCX on this kernel, or nothing there
		}
		for _, p := range q.Programs {
			found = found || isOurs(p.ID)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// When the kernel had more to say than the socket could hold, everything is read anew.
func TestRootResync(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	k := b.AddTask("")
	l := open(t, h, Config{})
	serve(t, l)
	put(t, l, k, 1)
	// Held so long that the queue overflows: what happens meanwhile is told to nobody.
	var k2 *testnet.Task
	func() {
		l.ports.mu.Lock()
		defer l.ports.mu.Unlock()
		lo := h.Link("lo")
		for i := range 6000 {
			if err := h.NL.LinkSetAlias(lo,
				fmt.Sprint(i, strings.Repeat("x", 200))); err != nil {
				t.Fatal(err)
			}
		}
		k.ReplaceVeth()
		k2 = b.AddTask("")
	}()
	testnet.Until(t, "a resync", func() bool { return l.Status().Resyncs > 1 })
	untilAnswer(t, k, portTag(k))
	untilAnswer(t, k2, portTag(k2))
	if entries, err := l.Entries(); err != nil || len(entries) != 0 {
		t.Errorf("entries: got %v, %v, want none", entries, err)
	}
}

// Other people's programs on the hook survive our coming and going, and so do their qdiscs.
func TestRootForeignFilters(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h := testnet.NewHost(t)
		b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
		k, taken := b.AddTask(""), b.AddTask("")
		foreign := foreignFilter(t, h, k.Ifindex, 1, 1)
		inOurPlace := foreignFilter(t, h, taken.Ifindex, filterPriority, filterHandle)
		foreignFilter(t, h, b.Ifindex, filterPriority+1, 1)
		l := open(t, h, Config{Attach: mode})
		serve(t, l)
		untilAnswer(t, k, portTag(k))
		if p, _ := portOf(l, taken.Ifindex); mode == AttachClsact &&
			!errors.Is(p.Err, ErrForeignFilter) {
			t.Errorf("port whose place is taken: got %v, want ErrForeignFilter", p.Err)
		}
		// its port is not hooked: what it sends is seen at the bridge
		if mode == AttachClsact {
			wantAnswer(t, taken, "metad 0x0")
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := Detach(Config{Netns: h.NS, PinDir: l.cfg.PinDir}); err != nil {
				t.Fatal(err)
			}
		}
		for ifindex, want := range map[int]*netlink.BpfFilter{k.Ifindex: foreign,
			taken.Ifindex: inOurPlace} {
			fs, err := h.NL.FilterList(
				&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}},
				netlink.HANDLE_MIN_INGRESS)
			if err != nil || len(fs) != 1 ||
				fs[0].(*netlink.BpfFilter).Name != want.Name {
				t.Errorf("filters on %d: got %v, %v, want the foreign one alone",
					ifindex, fs, err)
			}
		}
		if _, err := os.Stat(l.cfg.PinDir); !os.IsNotExist(err) {
			t.Errorf("pin directory after Detach: %v", err)
		}
	})
}

func foreignFilter(t testing.TB, h *testnet.Host, ifindex int, priority uint16,
	handle uint32) *netlink.BpfFilter {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := h.NL.QdiscAdd(q); err != nil {
		t.Fatal(err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: handle,
			Priority: priority, Protocol: unix.ETH_P_ALL,
		},
		Fd: p.FD(), Name: "foreign", DirectAction: true,
	}
	if err := h.NL.FilterAdd(f); err != nil {
		t.Fatal(err)
	}
	return f
}

// Detach takes a running metad's hooks too; the agent answers again.
func TestRootDetach(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h, b := hostWithAgent(t)
		k := b.AddTask("")
		h.NoLeak()
		dir := testnet.PinDir(t)
		p := start(t, h, childConfig{PinDir: dir, Attach: mode, Tasks: childTasks(k)})
		wantAnswer(t, k, "metad 0x1")
		for range 2 {
			if err := Detach(Config{Netns: h.NS, PinDir: dir}); err != nil {
				t.Fatal(err)
			}
			wantAnswer(t, k, "agent")
		}
		for _, ifindex := range []int{k.Ifindex, b.Ifindex} {
			if attached(t, h, ifindex) {
				t.Errorf("ifindex %d still has our program", ifindex)
			}
		}
		p.kill()
		// A metad that runs makes its own device anew; it goes with the process, when the
		// kernel gets to it.
		testnet.Until(t, "metad0 is gone", func() bool {
			return !slices.Contains(h.LinkNames(), hostVeth)
		})
	})
}

// With --on-exit=drop nobody else is given what metad would have answered.
func TestRootOnExitDrop(t *testing.T) {
	h, b := hostWithAgent(t)
	testnet.Serve(t, h.NS, "169.254.170.2:8080", func(net.Conn, *http.Request) string {
		return "other port"
	})
	k := b.AddTask("")
	dir := testnet.PinDir(t)
	f := func(how string, end func(*childProcess)) {
		p := start(t, h, childConfig{PinDir: dir, OnExit: OnExitDrop, Tasks: childTasks(k)})
		wantAnswer(t, k, "metad 0x1")
		end(p)
		testnet.Until(t, how+": the endpoint is silent", func() bool {
			c, err := k.Dial(100 * time.Millisecond)
			if err == nil {
				c.Close()
			}
			var ne net.Error
			return errors.As(err, &ne) && ne.Timeout()
		})
		c, err := testnet.Dial(k.NS, "", "169.254.170.2:8080", timeout)
		if err != nil {
			t.Fatalf("%s: another port of the address: %v", how, err)
		}
		c.Close()
	}
	f("killed", (*childProcess).kill)
	f("stopped", func(p *childProcess) {
		p.stdin.Close()
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	if err := Detach(Config{Netns: h.NS, PinDir: dir}); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, k, "agent")
}

// A clean stop gives everything back: devices, filters, traffic. The pins stay.
func TestRootClose(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h, b := hostWithAgent(t)
		k := b.AddTask("")
		h.NoLeak()
		dir := testnet.PinDir(t)
		p := start(t, h, childConfig{PinDir: dir, Attach: mode, Tasks: childTasks(k)})
		wantAnswer(t, k, "metad 0x1")
		p.stdin.Close()
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("stop: %v", err)
		}
		wantAnswer(t, k, "agent")
		for _, ifindex := range []int{k.Ifindex, b.Ifindex} {
			if attached(t, h, ifindex) {
				t.Errorf("ifindex %d still has our program", ifindex)
			}
		}
		if _, err := os.Stat(filepath.Join(dir,
			pinName("ip_task", layout(t)))); err != nil {
			t.Errorf("the pin: %v", err)
		}
	})
}

// What is pinned is taken over, less what is behind devices that are gone; what is not ours to
// understand is replaced with a log line each.
func TestRootPins(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	stays, goes := b.AddTask(""), b.AddTask("")
	dir := testnet.PinDir(t)
	reopen := func(cfg Config) (*Loader, *observer.ObservedLogs) {
		t.Helper()
		core, logs := observer.New(zapcore.WarnLevel)
		cfg.PinDir, cfg.Netns, cfg.Log = dir, h.NS, zap.New(core)
		l, err := Open(cfg)
		if err != nil {
			t.Fatalf("%+v", err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l, logs
	}
	l, _ := reopen(Config{})
	put(t, l, stays, 1)
	put(t, l, goes, 2)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	goes.Remove()
	l, logs := reopen(Config{})
	entries, err := l.Entries()
	if err != nil || len(entries) != 1 || entries[stays.Addr].Tag != 1 {
		t.Errorf("entries after a restart: got %v, %v, want the one whose veth is there",
			entries, err)
	}
	if logs.Len() != 0 {
		t.Errorf("a plain restart warns: %v", logs.All())
	}
	serve(t, l)
	wantAnswer(t, stays, "metad 0x1") // before anybody has said anything about tasks
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}

	pin := filepath.Join(dir, pinName("ip_task", layout(t)))
	f := func(name string, cfg Config, garbage func()) {
		t.Helper()
		garbage()
		l, logs := reopen(cfg)
		if logs.Len() != 1 {
			t.Errorf("%s: got %d warnings, want 1: %v", name, logs.Len(), logs.All())
		}
		if entries, err := l.Entries(); err != nil || len(entries) != 0 {
			t.Errorf("%s: got %v, %v, want an empty map", name, entries, err)
		}
		put(t, l, stays, 1)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	f("a map of another kind", Config{}, func() {
		must(os.Remove(pin))
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8,
			MaxEntries: 1})
		must(err)
		must(m.Pin(pin))
		must(m.Close())
	})
	f("a program", Config{}, func() {
		must(os.Remove(pin))
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SchedCLS, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		must(err)
		must(p.Pin(pin))
		must(p.Close())
	})
	f("a directory", Config{}, func() {
		must(os.Remove(pin))
		must(os.Mkdir(pin, 0o700))
	})
	f("another layout", Config{}, func() { must(os.Rename(pin, filepath.Join(dir, pinName("ip_task", 999)))) })
}

func TestRootNoBPFFS(t *testing.T) {
	testnet.RequireRoot(t)
	dir := filepath.Join(t.TempDir(), "pins")
	h := testnet.NewHost(t)
	if _, err := Open(Config{Netns: h.NS, PinDir: dir}); !errors.Is(err, ErrNoBPFFS) {
		t.Errorf("got %v, want ErrNoBPFFS", err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory is left: %v", err)
	}
}

// A full map refuses the next task and harms nobody; so does a port that does not exist.
func TestRootFull(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	one, two, three := b.AddTask(""), b.AddTask(""), b.AddTask("")
	l := open(t, h, Config{MaxEntries: 2})
	serve(t, l)
	put(t, l, one, 1)
	put(t, l, two, 2)
	v := &bpf.TaskValue{Tag: 3, Ifindex: uint32(three.Ifindex), Mac: three.MAC}
	if err := l.Put(three.Addr, v); !errors.Is(err, ErrFull) {
		t.Errorf("a third: got %v, want ErrFull", err)
	}
	wantAnswer(t, one, "metad 0x1")
	wantAnswer(t, three, portTag(three))
	if s := l.Status(); s.Tasks != 2 || s.MaxTasks != 2 {
		t.Errorf("got %d of %d tasks, want 2 of 2", s.Tasks, s.MaxTasks)
	}
	if err := l.Delete(one.Addr); err != nil {
		t.Fatal(err)
	}
	if err := l.Delete(one.Addr); err != nil {
		t.Errorf("delete again: %v", err)
	}
	put(t, l, three, 3)
	wantAnswer(t, three, "metad 0x3")
	wantAnswer(t, one, portTag(one))
	if err := l.Put(one.Addr, &bpf.TaskValue{Tag: 9, Ifindex: 9999}); !errors.Is(err,
		ErrNoPort) {
		t.Errorf("a port that does not exist: got %v, want ErrNoPort", err)
	}

	// Made-up addresses push each other out of the neighbours, and touch no task.
	raw := testnet.NewRaw(t, one.NS, "eth0")
	before := verdictsOf(t, l)["port_unknown"]
	for i := range 100 {
		raw.Send(testnet.Frame{SrcMAC: one.MAC, DstMAC: b.MAC,
			Src: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}.Bytes())
	}
	testnet.Until(t, "the flood is seen", func() bool {
		return verdictsOf(t, l)["port_unknown"] >= before+100
	})
	wantAnswer(t, two, "metad 0x2")
	wantAnswer(t, three, "metad 0x3")
	wantAnswer(t, one, portTag(one))
}
