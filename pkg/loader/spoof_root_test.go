//go:build root

package loader

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/bpf"
	"metad/internal/testnet"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// wantDropped sends the frames from the task and wants all of them counted under the verdict, and
// no answer to port, neither at the sender nor at the one it pretends to be.
func wantDropped(t *testing.T, l *Loader, from, victim *testnet.Task, verdict string, port uint16,
	frames ...[]byte) {
	t.Helper()
	raw, atVictim := testnet.NewRaw(t, from.NS, "eth0"), testnet.NewRaw(t, victim.NS, "eth0")
	before := verdictsOf(t, l)[verdict]
	raw.Send(frames...)
	testnet.Until(t, verdict, func() bool {
		return verdictsOf(t, l)[verdict] >= before+uint64(len(frames))
	})
	for name, r := range map[string]*testnet.Raw{"sender": raw, "victim": atVictim} {
		if s, ok := r.Answer(port, 60*time.Millisecond); ok {
			t.Errorf("%s: %s got an answer: %+v", verdict, name, s)
		}
	}
}

// The caller is who the kernel says it is.
func TestRootSpoof(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		b := newBridge(t)
		victim, evil, stranger, newcomer := b.AddTask(""), b.AddTask(""), b.AddTask(""),
			b.AddTask("")
		l := serving(t, b, Config{Attach: mode}, victim, evil)
		asVictim := testnet.Frame{SrcMAC: evil.MAC, DstMAC: b.MAC, Src: victim.Addr}
		with := func(f testnet.Frame, change func(*testnet.Frame)) []byte {
			change(&f)
			return f.Bytes()
		}

		// A neighbour's address; its MAC as well; and that after telling everybody that the
		// address is here.
		wantDropped(t, l, evil, victim, "port_wrong_port", 41000, with(asVictim, func(f *testnet.Frame) { f.SrcPort = 41000 }))
		both := with(asVictim, func(f *testnet.Frame) {
			f.SrcPort, f.SrcMAC = 41001, victim.MAC
		})
		wantDropped(t, l, evil, victim, "port_wrong_port", 41001, both)
		testnet.NewRaw(t, evil.NS, "eth0").Send(testnet.GratuitousARP(evil.MAC,
			victim.Addr), testnet.GratuitousARP(victim.MAC, victim.Addr))
		wantDropped(t, l, evil, victim, "port_wrong_port", 41002, with(asVictim, func(f *testnet.Frame) { f.SrcPort, f.SrcMAC = 41002, victim.MAC }))
		wantAnswer(t, victim, "metad 0x1") // also after the bridge has learned its MAC elsewhere
		// From a port that is not a known task's.
		wantDropped(t, l, stranger, victim, "port_wrong_port", 41003, with(asVictim, func(f *testnet.Frame) { f.SrcPort, f.SrcMAC = 41003, victim.MAC }))
		// In fragments, with options, addressed to somebody else's MAC.
		fr := testnet.Frame{SrcMAC: victim.MAC, DstMAC: b.MAC, Src: victim.Addr,
			SrcPort: 41004}.Fragments(8)
		wantDropped(t, l, evil, victim, "port_wrong_port", 41004, fr[0], fr[1])
		wantDropped(t, l, evil, victim, "port_wrong_port", 41005, with(asVictim, func(f *testnet.Frame) { f.SrcPort, f.Options = 41005, 8 }))
		wantDropped(t, l, evil, victim, "port_wrong_port", 41006, with(asVictim, func(f *testnet.Frame) { f.SrcPort, f.DstMAC = 41006, victim.MAC }))
		// One's own address with another's MAC.
		wantDropped(t, l, evil, victim, "port_wrong_mac", 41007,
			with(asVictim, func(f *testnet.Frame) {
				f.SrcPort, f.Src, f.SrcMAC = 41007, evil.Addr, victim.MAC
			}))

		// An address that no task has, in use by another: its answers stay its own, and
		// those to another port go there.
		wantAnswer(t, newcomer, portTag(newcomer))
		atNewcomer, claims := testnet.NewRaw(t, newcomer.NS, "eth0"),
			testnet.NewRaw(t, stranger.NS, "eth0")
		claims.Send(with(asVictim, func(f *testnet.Frame) {
			f.SrcPort, f.Src, f.SrcMAC = 41008, newcomer.Addr, newcomer.MAC
		}))
		if s, ok := claims.Answer(41008, time.Second); !ok ||
			s.Flags != testnet.SYN|testnet.ACK {
			t.Errorf("a port that uses a neighbour's address: got %+v, %v, want its "+
				"own SYN's answer", s, ok)
		}
		if s, ok := atNewcomer.Answer(41008, 60*time.Millisecond); ok {
			t.Errorf("the neighbour got an answer that is not its own: %+v", s)
		}
		wantAnswer(t, newcomer, portTag(newcomer))

		// A port that is not hooked: address and MAC of a known task, seen at the bridge.
		// It gets in without a tag, and the answer goes to the task.
		unhook(t, l, stranger.Ifindex)
		wantDropped(t, l, stranger, victim, "bridge_wrong_mac", 41009, with(asVictim, func(f *testnet.Frame) { f.SrcPort, f.SrcMAC = 41009, stranger.MAC }))
		atStranger, atVictim := testnet.NewRaw(t, stranger.NS, "eth0"),
			testnet.NewRaw(t, victim.NS, "eth0")
		before := verdictsOf(t, l)["bridge_task"]
		atStranger.Send(with(asVictim, func(f *testnet.Frame) {
			f.SrcPort, f.SrcMAC = 41010, victim.MAC
		}))
		if s, ok := atVictim.Answer(41010, time.Second); !ok ||
			s.Flags != testnet.SYN|testnet.ACK {
			t.Errorf("the task itself: got %+v, %v, want the SYN's answer", s, ok)
		}
		if s, ok := atStranger.Answer(41010, 60*time.Millisecond); ok {
			t.Errorf("who sent it got an answer: %+v", s)
		}
		if verdictsOf(t, l)["bridge_task"] == before {
			t.Error("bridge_task did not move")
		}
		// Its own address there is answered over the bridge, unknown and without a tag.
		untilAnswer(t, stranger, "metad 0x0")

		// Odd frames of one's own: answered or not, but never anything else.
		raw := testnet.NewRaw(t, evil.NS, "eth0")
		own := testnet.Frame{SrcMAC: evil.MAC, DstMAC: b.MAC, Src: evil.Addr}
		answered := func(name string, port uint16, want bool, frames ...[]byte) {
			t.Helper()
			raw.Send(frames...)
			wait := time.Second
			if !want {
				wait = 60 * time.Millisecond
			}
			if s, ok := raw.Answer(port, wait); ok != want || ok && s.Dst != evil.Addr {
				t.Errorf("%s: got %v %+v, want %v", name, ok, s, want)
			}
		}
		answered("ip options", 42000, true, with(own, func(f *testnet.Frame) { f.SrcPort, f.Options = 42000, 8 }))
		own.SrcPort = 42001
		fr = own.Fragments(8)
		answered("fragments", 42001, true, fr[0], fr[1])
		own.SrcPort = 42002
		fr = own.Fragments(16)
		answered("fragments the wrong way round", 42002, true, fr[1], fr[0])
		answered("bad checksum", 42003, false, with(own, func(f *testnet.Frame) { f.SrcPort, f.BadChecksum = 42003, true }))
		answered("vlan", 42004, false, with(own, func(f *testnet.Frame) { f.SrcPort, f.VLAN = 42004, 7 }))
		answered("cut", 42005, false, with(own, func(f *testnet.Frame) { f.SrcPort, f.Cut = 42005, 14+20+12 }))

		// A flood of SYNs harms nobody else.
		for i := range 3000 {
			raw.Send(with(own, func(f *testnet.Frame) {
				f.SrcPort, f.Seq = uint16(1024+i), uint32(i)
			}))
		}
		wantAnswer(t, victim, "metad 0x1")
		wantAnswer(t, evil, "metad 0x2")
	})
}

// A connection outlives its client. What is still sent to its address is not for the address's next
// owner: it ends the connection, so that the next owner can connect from the same TCP port.
func TestRootReusedAddress(t *testing.T) {
	b := newBridge(t)
	l := open(t, b.Host, Config{})
	ln := listen(t, l)
	tag := uint32(0)
	// connect makes a task with the address and connects it from the TCP port, 0 for any.
	connect := func(addr string, port uint16) (k *testnet.Task, client, server net.Conn) {
		t.Helper()
		k = b.AddTask(addr)
		testnet.Until(t, "the port is hooked", func() bool { return hooked(l, k.Ifindex) })
		tag++
		put(t, l, k, tag)
		client, err := testnet.Dial(k.NS, netip.AddrPortFrom(k.Addr, port).String(),
			testnet.Endpoint, timeout)
		if err != nil {
			t.Fatalf("task %d: %v", tag, err)
		}
		t.Cleanup(func() { client.Close() })
		server, err = ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		return k, client, server
	}
	goAway := func(k *testnet.Task) { // without a word
		k.Remove()
		testnet.Until(t, "the port is forgotten", func() bool {
			return !hooked(l, k.Ifindex)
		})
	}

	first, client, server := connect("", 0)
	port := client.LocalAddr().(*net.TCPAddr).AddrPort().Port()
	goAway(first)
	second := b.AddTask(first.Addr.String())
	testnet.Until(t, "the second one's port is hooked", func() bool {
		return hooked(l, second.Ifindex)
	})
	tag++
	put(t, l, second, tag)
	atSecond := testnet.NewRaw(t, second.NS, "eth0")
	if _, err := server.Write([]byte("for the first one")); err != nil {
		t.Fatal(err)
	}
	_ = server.SetReadDeadline(time.Now().Add(timeout))
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the first one's connection: got %v, want it to be reset", err)
	}
	if s, ok := atSecond.Answer(port, 60*time.Millisecond); ok {
		t.Errorf("the second one got %+v", s)
	}
	goAway(second)

	third, client, old := connect(first.Addr.String(), port)
	goAway(third)
	_, _, server = connect(first.Addr.String(), port)
	if client.LocalAddr().String() != server.RemoteAddr().String() {
		t.Fatalf("connected from %v, want the TCP port of %v", server.RemoteAddr(),
			client.LocalAddr())
	}
	_ = old.SetReadDeadline(time.Now().Add(timeout))
	if _, err := old.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection before: got %v, want it to be reset", err)
	}
}

// The kernel tells once a second and verdict at most, and says what it held back.
func TestRootEvents(t *testing.T) {
	b := newBridge(t)
	victim, evil := b.AddTask(""), b.AddTask("")
	l := serving(t, b, Config{}, victim)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	var events []Event
	done := make(chan error, 1)
	go func() {
		done <- l.Events(ctx, func(e Event) {
			mu.Lock()
			events = append(events, e)
			mu.Unlock()
		})
	}()
	got := func() (es []Event) {
		mu.Lock()
		defer mu.Unlock()
		for _, e := range events {
			if e.Verdict == "port_wrong_port" {
				es = append(es, e)
			}
		}
		return es
	}
	raw := testnet.NewRaw(t, evil.NS, "eth0")
	frame := testnet.Frame{SrcMAC: evil.MAC, DstMAC: b.MAC, Src: victim.Addr}.Bytes()
	sent := 0
	testnet.Until(t, "a second event", func() bool {
		for range 10 {
			raw.Send(frame)
			sent++
		}
		return len(got()) >= 2
	})
	es := got()
	if e := es[0]; e.Addr != victim.Addr || e.MAC != evil.MAC || e.Ifindex != evil.Ifindex ||
		e.HeldBack != 0 ||
		time.Since(e.Time) > time.Minute || time.Until(e.Time) > time.Minute {
		t.Errorf("first event: got %+v", e)
	}
	if gap := es[1].Time.Sub(es[0].Time); gap < 990*time.Millisecond {
		t.Errorf("events %v apart, want a second", gap)
	}
	if held := es[1].HeldBack; held == 0 || held > uint64(sent) {
		t.Errorf("held back: got %d of %d", held, sent)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Events: %v", err)
	}
}

// A port that floods hides no packet of another port: each has events of its own.
func TestRootEventsOfEachPort(t *testing.T) {
	b := newBridge(t)
	evil := b.AddTask("")
	l := serving(t, b, Config{}, evil)
	events := make(chan Event, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Events(ctx, func(e Event) { events <- e }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Events: %v", err)
		}
	})
	wrongMAC := func(k *testnet.Task) []byte {
		return testnet.Frame{SrcMAC: [6]byte{2, 1}, DstMAC: b.MAC, Src: k.Addr}.Bytes()
	}
	flood := testnet.NewRaw(t, evil.NS, "eth0")
	for range 5 {
		other := b.AddTask("")
		testnet.Until(t, "the port is hooked", func() bool {
			return hooked(l, other.Ifindex)
		})
		put(t, l, other, 2)
		for range 100 {
			flood.Send(wrongMAC(evil))
		}
		testnet.NewRaw(t, other.NS, "eth0").Send(wrongMAC(other)) // one packet
		testnet.Until(t, "the one packet is told of", func() bool {
			flood.Send(wrongMAC(evil))
			select {
			case e := <-events:
				return e.Verdict == "port_wrong_mac" &&
					e.Ifindex == other.Ifindex && e.Addr == other.Addr
			default:
				return false
			}
		})
	}
}

// Counters are the task's alone, and start anew with the next task.
func TestRootCounters(t *testing.T) {
	b := newBridge(t)
	k, other := b.AddTask(""), b.AddTask("")
	l := serving(t, b, Config{}, k, other)
	for range 3 {
		wantAnswer(t, k, "metad 0x1")
	}
	read := func(a netip.Addr) TaskCounters {
		t.Helper()
		all, err := l.Counters()
		if err != nil {
			t.Fatal(err)
		}
		return all[a]
	}
	if c := read(k.Addr); c.Connections != 3 || c.Packets < 9 || c.Bytes < 9*54 ||
		time.Since(c.LastSeen) > time.Minute {
		t.Errorf("got %+v", c)
	}
	if c := read(other.Addr); c != (TaskCounters{}) {
		t.Errorf("the other task: got %+v", c)
	}
	put(t, l, k, 1)
	if c := read(k.Addr); c.Connections != 3 {
		t.Errorf("after the same again: got %+v", c)
	}
	put(t, l, k, 7)
	if c := read(k.Addr); c != (TaskCounters{}) {
		t.Errorf("the next task: got %+v", c)
	}
}

func wantHostAnswer(t testing.TB, h *testnet.Host, want string) {
	t.Helper()
	c, err := testnet.Dial(h.NS, "", testnet.Endpoint, timeout)
	if err != nil {
		t.Errorf("host: %v, want %q", err, want)
		return
	}
	defer c.Close()
	if _, body, err := testnet.GetOn(c, "/", timeout); err != nil || body != want {
		t.Errorf("host: got %q, %v, want %q", body, err, want)
	}
}

func iptables(t testing.TB, h *testnet.Host, args ...string) {
	t.Helper()
	testnet.RequireTool(t, "iptables")
	err := testnet.In(h.NS, func() error {
		out, err := exec.Command("iptables", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("iptables %v: %w: %s", args, err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// The host's own processes are answered, and nobody else by their way: not what the host forwards,
// not who takes their address.
func TestRootHostRoute(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		b := newBridge(t)
		h, k := b.Host, b.AddTask("")
		outside := h.AddBridge("outside0", "10.9.0.1/16").AddTask("")
		l := serving(t, b, Config{Attach: mode, HostRoute: true})
		wantHostAnswer(t, h, "metad 0x0")
		if verdictsOf(t, l)["host"] == 0 || verdictsOf(t, l)["reply_host"] == 0 {
			t.Errorf("verdicts: %v", verdictsOf(t, l))
		}
		refused := func(name string, ns netns.NsHandle, local, verdict string) {
			t.Helper()
			before := verdictsOf(t, l)[verdict]
			if c, err := testnet.Dial(ns, local, testnet.Endpoint,
				100*time.Millisecond); err == nil {
				c.Close()
				t.Errorf("%s is answered", name)
			}
			if verdictsOf(t, l)[verdict] == before {
				t.Errorf("%s: %s did not move", name, verdict)
			}
		}
		refused("a network that metad does not watch", outside.NS, "", "host_refused")
		refused("another address of the host", h.NS, "10.9.0.1:0", "host_refused")
		iptables(t, h, "-t", "nat", "-A", "POSTROUTING", "-s", "10.9.0.0/16", "-j", "SNAT", "--to-source", HostAddr.String())
		refused("such a network, given the host's address by a rule", outside.NS, "", "host_refused")
		wantDropped(t, l, k, k, "port_host", 41000, testnet.Frame{SrcMAC: k.MAC, DstMAC: b.MAC, Src: HostAddr, SrcPort: 41000}.Bytes())
		// Forwarded, with the host's address: the kernel knows better, or metad_host does.
		raw := testnet.NewRaw(t, outside.NS, "eth0")
		before := verdictsOf(t, l)
		raw.Send(testnet.Frame{SrcMAC: outside.MAC, DstMAC: outside.Bridge.MAC,
			Src: HostAddr, SrcPort: 41001}.Bytes())
		if s, ok := raw.Answer(41001, 60*time.Millisecond); ok {
			t.Errorf("a forwarded packet from the host's address got an answer: %+v", s)
		}
		if after := verdictsOf(t, l); after["host"] != before["host"] {
			t.Error("a forwarded packet from the host's address was let in")
		}
		wantHostAnswer(t, h, "metad 0x0")

		if err := l.Disarm(); err != nil {
			t.Fatal(err)
		}
		if routes := hostRoutes(t, h, l); len(routes) != 0 {
			t.Errorf("routes over metad0: got %v, want none", routes)
		}
	})
}

// hostRoutes returns the routes over metad0 in all of the host's tables.
func hostRoutes(t testing.TB, h *testnet.Host, l *Loader) []netlink.Route {
	t.Helper()
	over := &netlink.Route{LinkIndex: l.end.metad0, Table: unix.RT_TABLE_UNSPEC}
	routes, err := h.NL.RouteListFiltered(netlink.FAMILY_ALL, over,
		netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		t.Fatal(err)
	}
	return routes
}

// The host's firewall has no say: br_netfilter on, the agent's DNAT rule (row 2.3) in place, INPUT
// and FORWARD closed. Needs iptables and br_netfilter.
func TestRootFirewall(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		b := newBridge(t)
		h, k, unknown := b.Host, b.AddTask(""), b.AddTask("")
		h.StandInAgent("127.0.0.1:51679")
		h.Sysctl("net/bridge/bridge-nf-call-iptables", "1")
		iptables(t, h, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", "169.254.170.2", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:51679")
		wantAnswer(t, k, "agent")
		serving(t, b, Config{Attach: mode, HostRoute: true}, k)
		wantAnswer(t, k, "metad 0x1")
		wantAnswer(t, unknown, portTag(unknown))
		// A process of the host: metad's, until the agent has a rule for it.
		wantHostAnswer(t, h, "metad 0x0")
		iptables(t, h, "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", "169.254.170.2", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:51679")
		wantHostAnswer(t, h, "agent")
		for _, chain := range []string{"INPUT", "FORWARD", "OUTPUT"} {
			iptables(t, h, "-P", chain, "DROP")
		}
		wantAnswer(t, k, "metad 0x1")
		wantAnswer(t, unknown, portTag(unknown))
	})
}

// What bpftool shows: field names, and the task's id as text. Needs bpftool.
func TestRootBpftool(t *testing.T) {
	testnet.RequireTool(t, "bpftool")
	b := newBridge(t)
	k := b.AddTask("")
	l := open(t, b.Host, Config{})
	v := &bpf.TaskValue{Tag: 1, Ifindex: uint32(k.Ifindex), Mac: k.MAC}
	for i, c := range "158d1c8083dd49d6b527399fd6414f5c" {
		v.TaskId[i] = int8(c)
	}
	if err := l.Put(k.Addr, v); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"ip_task":    {`"octets": [169,254,172,2`, `"tag": 1`, fmt.Sprintf(`"ifindex": %d`, k.Ifindex), `"mac": `, `"task_id": "158d1c8083dd49d6b527399fd6414f5c"`},
		"counters":   {`"connections": 0`, `"last_seen_ns": 0`},
		"verdicts":   {`"packets": `},
		"neighbours": nil, "port_neighbours": nil,
	} {
		out, err := exec.Command("bpftool", "map", "dump", "pinned",
			filepath.Join(l.cfg.PinDir, pinName(name, l.progs.layout))).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		for _, w := range want {
			if !strings.Contains(string(out), w) {
				t.Errorf("%s: no %s in %.600s", name, w, out)
			}
		}
	}
	// For docs/how-to/bpftool.md: a shell command that may look around while the task asks.
	show := os.Getenv("METAD_TEST_SHOW")
	if show == "" {
		return
	}
	serve(t, l)
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := testnet.In(b.Host.NS, func() error {
			c := exec.Command("sh", "-c", show)
			c.Env = append(os.Environ(), "PINS="+l.cfg.PinDir, "PORT="+k.Port,
				fmt.Sprint("PID=", os.Getpid()))
			out, err := c.CombinedOutput()
			t.Logf("%s", out)
			return err
		})
		t.Log(err)
	}()
	for {
		select {
		case <-done:
			return
		case <-time.After(100 * time.Millisecond):
			wantAnswer(t, k, "metad 0x1")
		}
	}
}

// A thousand ports on one bridge, there at the start and then new ones: metad serves before all are
// hooked, all are in the end, and the last is answered like the first.
func TestRootThousandPorts(t *testing.T) {
	f := func(t *testing.T, mode AttachMode) {
		b := newBridge(t)
		first := b.AddTask("")
		const n = 1000
		addPorts(t, b.Host, b.Name, n)
		last := b.AddTask("169.254.175.1") // the highest ifindex: its turn comes last
		began := time.Now()
		l := open(t, b.Host, Config{Attach: mode, Log: zap.NewNop()})
		table := lookup.New(l, zap.NewNop())
		if err := table.Apply([]*task.Task{
			{ID: "first", ARN: "first", Endpoints: []task.Endpoint{{Addr: first.Addr, Ifindex: first.Ifindex, MAC: first.MAC}}},
			{ID: "last", ARN: "last", Endpoints: []task.Endpoint{{Addr: last.Addr, Ifindex: last.Ifindex, MAC: last.MAC}}},
		}); err != nil {
			t.Fatal(err)
		}
		testnet.ServeOn(t, listen(t, l), func(c net.Conn, _ *http.Request) string {
			tag, err := testnet.Mark(c)
			v := table.Resolve(tag,
				netip.MustParseAddrPort(c.RemoteAddr().String()).Addr())
			if err != nil || v == nil {
				return fmt.Sprint("nobody ", err)
			}
			return v.Task.ID
		})
		wantAnswer(t, first, "first")
		wantAnswer(t, last, "last") // seen at the bridge: no tag, and the answer can go nowhere else
		s := l.Status()
		t.Logf("first answers after %v, with %d ports hooked and %d to come",
			time.Since(began).Round(time.Millisecond), s.Ports, s.Pending)
		if mode == AttachAuto && s.Pending == 0 {
			t.Error("metad served only when all ports were hooked")
		}
		for end := began.Add(2 * time.Minute); l.Status().Ports < n+2 &&
			time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		}
		if s := l.Status(); s.Ports != n+2 || s.NotAttached != 0 || s.Pending != 0 {
			t.Errorf("got %+v, want %d ports", s, n+2)
		}
		t.Logf("all ports hooked after %v", time.Since(began).Round(time.Millisecond))
		before := verdictsOf(t, l)["port_task"]
		wantAnswer(t, last, "last")
		if verdictsOf(t, l)["port_task"] == before {
			t.Error("the last port's packets are not seen at the port")
		}
		began = time.Now()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		t.Logf("closed within %v", time.Since(began).Round(time.Millisecond))
	}
	t.Run("clsact", func(t *testing.T) { f(t, AttachClsact) })
	t.Run("auto", func(t *testing.T) { testnet.SkipBefore(t, "6.6"); f(t, AttachAuto) })
}

// One address, one container after another, milliseconds apart: nobody is ever taken for the one
// before. Here each brings a port of its own, which the kernel makes a dozen of in a second.
func TestRootReuse(t *testing.T) {
	const n = 40
	b := newBridge(t)
	l := serving(t, b, Config{Log: zap.NewNop()})
	unanswered := 0
	for i := range n {
		k := b.AddTask("169.254.172.77")
		tag := uint32(i + 1)
		early := i%2 == 0 // known before it asks
		if early {
			put(t, l, k, tag)
		}
		_, body, err := k.Get("/", timeout)
		switch own := fmt.Sprintf("metad %#x", tag); {
		case err != nil:
			unanswered++
			t.Logf("reuse %d: %v", i, err)
		// the last: its port was not hooked yet
		case early && body == own, body == portTag(k), body == "metad 0x0":
		default:
			t.Fatalf("reuse %d: got %q, want %q or %q", i, body, own, portTag(k))
		}
		if !early {
			put(t, l, k, tag)
			untilAnswer(t, k, fmt.Sprintf("metad %#x", tag))
		}
		k.Remove()
	}
	if unanswered > 0 {
		t.Errorf("%d of %d were not answered", unanswered, n)
	}
}
