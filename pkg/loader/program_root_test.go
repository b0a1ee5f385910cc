//go:build root

package loader

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"metad/bpf"
	"metad/internal/testnet"
)

// tc's answers (include/uapi/linux/pkt_cls.h), as a program's return value.
const (
	actUnspec   = 0xffffffff
	actShot     = 2
	actRedirect = 7
)

// What BPF_PROG_TEST_RUN takes and gives of struct __sk_buff.
const (
	skbSize    = 192
	skbMark    = 8
	skbIfindex = 40
)

// run runs the program on a frame that came in on the device, and returns its answer, the frame and
// the mark.
func run(t testing.TB, h *testnet.Host, p *ebpf.Program, frame []byte, ifindex int,
	mark uint32) (uint32, []byte, uint32) {
	t.Helper()
	ctx, ctxOut := make([]byte, skbSize), make([]byte, skbSize)
	binary.NativeEndian.PutUint32(ctx[skbIfindex:], uint32(ifindex))
	binary.NativeEndian.PutUint32(ctx[skbMark:], mark)
	o := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)), Context: ctx,
		ContextOut: ctxOut}
	var ret uint32
	err := testnet.In(h.NS, func() (err error) { ret, err = p.Run(o); return err })
	if err != nil {
		t.Fatalf("run: %v", err)
	}
	return ret, o.DataOut, binary.NativeEndian.Uint32(ctxOut[skbMark:])
}

func verdictsOf(t testing.TB, l *Loader) map[string]uint64 {
	t.Helper()
	all, err := l.Verdicts()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]uint64{}
	for _, v := range all {
		m[v.Name] = v.Packets
	}
	return m
}

// moved returns what moved since before, "name" or "name+n" each.
func moved(t testing.TB, l *Loader, before map[string]uint64) []string {
	t.Helper()
	var names []string
	for name, n := range verdictsOf(t, l) {
		if n != before[name] {
			names = append(names, name)
			if n != before[name]+1 {
				names[len(names)-1] += "+n"
			}
		}
	}
	slices.Sort(names)
	return names
}

// Every exit of every program: the answer, the mark and frame it leaves, and that its verdict's
// counter moves and no other.
func TestRootVerdicts(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	known, other, unknown := b.AddTask(""), b.AddTask(""), b.AddTask("")
	// The agent's connections are accepted before metad takes any packet.
	h.AddAddr("ecs-bridge", "169.254.170.2/32")
	h.StandInAgent(testnet.Endpoint)
	const agentPort, lingerPort = 40001, 40002
	dial := func(k *testnet.Task, port uint16) net.Conn {
		c, err := testnet.Dial(k.NS, netip.AddrPortFrom(k.Addr, port).String(),
			testnet.Endpoint, timeout)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial(known, agentPort)
	dial(unknown, agentPort)
	lingers := dial(known, lingerPort) // the agent closes first
	fmt.Fprint(lingers, "GET / HTTP/1.0\r\n\r\n")
	if b, err := io.ReadAll(lingers); err != nil || !strings.HasSuffix(string(b), "agent") {
		t.Fatalf("got %q, %v", b, err)
	}
	lingers.Close()
	l := open(t, h, Config{AgentAddr: Endpoint})
	trusting := open(t, testnet.NewHost(t),
		Config{TrustBridge: true, PinDir: testnet.PinDir(t)})
	dropping := open(t, testnet.NewHost(t),
		Config{OnExit: OnExitDrop, PinDir: testnet.PinDir(t)})
	trustedTask := *known
	for _, x := range []*Loader{l, dropping, trusting} {
		x.ports.mu.Lock() // the entries' ports are in another namespace: let them in
		x.ports.devices[known.Ifindex] = device{}
		x.ports.mu.Unlock()
		put(t, x, &trustedTask, 7)
	}
	for _, x := range []*Loader{l, trusting} {
		if err := x.Arm(); err != nil {
			t.Fatal(err)
		}
	}

	// Of a task's address nothing is left to the agent.
	left := netip.MustParseAddr("169.254.173.5")
	for _, x := range []*Loader{l, trusting} {
		if err := x.LeaveAlone([]netip.Addr{left, known.Addr}); err != nil {
			t.Fatal(err)
		}
	}

	own := testnet.Frame{SrcMAC: known.MAC, DstMAC: b.MAC, Src: known.Addr}
	stranger := testnet.Frame{SrcMAC: unknown.MAC, DstMAC: b.MAC, Src: unknown.Addr}
	with := func(f testnet.Frame, change func(*testnet.Frame)) []byte {
		change(&f)
		return f.Bytes()
	}
	wrongMAC := with(own, func(f *testnet.Frame) { f.SrcMAC = other.MAC })
	port, bridge := known.Ifindex, b.Ifindex
	agents := func(f *testnet.Frame) { f.SrcPort, f.Flags = agentPort, testnet.ACK }
	portTag := func(ifindex int) uint32 { return bpf.TagPort | uint32(ifindex) }
	fragments := own.Fragments(8)
	const unproved = bpf.TagPort // MARK_UNPROVED in C: TAG_NONE on its way to metad_enter

	type programs = bpf.Programs
	metadPort := func(p *programs) *ebpf.Program { return p.MetadPort }
	metadHost := func(p *programs) *ebpf.Program { return p.MetadHost }
	ofHost := testnet.Frame{Src: HostAddr}
	metadBridge := func(p *programs) *ebpf.Program { return p.MetadBridge }
	for _, c := range []struct {
		name    string
		l       *Loader
		program func(*programs) *ebpf.Program
		frame   []byte
		ifindex int
		ret     uint32
		mark    uint32
		verdict string
	}{
		{"task", l, metadPort, own.Bytes(), port, actRedirect, 7, "port_task"},
		{"ip options", l, metadPort, with(own, func(f *testnet.Frame) { f.Options = 12 }), port, actRedirect, 7, "port_task"},
		{"first fragment", l, metadPort, fragments[0], port, actRedirect, 7, "port_task"},
		{"last fragment", l, metadPort, fragments[1], port, actRedirect, 7, "port_task"},
		{"data", l, metadPort, with(own, func(f *testnet.Frame) { f.Flags, f.Payload = testnet.ACK, make([]byte, 1000) }), port, actRedirect, 7, "port_task"},
		{"arp", l, metadPort, with(own, func(f *testnet.Frame) { f.EtherType = unix.ETH_P_ARP }), port, actUnspec, 0, "not_ipv4"},
		{"ipv6", l, metadPort, with(own, func(f *testnet.Frame) { f.EtherType = unix.ETH_P_IPV6 }), port, actUnspec, 0, "not_ipv4"},
		{"other address", l, metadPort, with(own, func(f *testnet.Frame) { f.Dst = other.Addr }), port, actUnspec, 0, "not_meta"},
		{"udp", l, metadPort, with(own, func(f *testnet.Frame) { f.Protocol = unix.IPPROTO_UDP }), port, actUnspec, 0, "not_meta"},
		{"other port", l, metadPort, with(own, func(f *testnet.Frame) { f.DstPort = 8080 }), port, actUnspec, 0, "other_dport"},
		{"ip version 6 in an ipv4 frame", l, metadPort, with(own, func(f *testnet.Frame) { f.Version = 6 }), port, actUnspec, 0, "malformed"},
		{"ip header too short", l, metadPort, with(own, func(f *testnet.Frame) { f.IHL = 4 }), port, actUnspec, 0, "malformed"},
		{"ip header longer than the frame", l, metadPort, with(own, func(f *testnet.Frame) { f.IHL = 15 }), port, actUnspec, 0, "malformed"},
		{"tcp header cut", l, metadPort, with(own, func(f *testnet.Frame) { f.Cut = 14 + 20 + 13 }), port, actUnspec, 0, "malformed"},
		{"a task's address on another port", l, metadPort, own.Bytes(), other.Ifindex, actShot, 0, "port_wrong_port"},
		{"another mac", l, metadPort, wrongMAC, port, actShot, 0, "port_wrong_mac"},
		{"agent's connection, unknown", l, metadPort, with(stranger, agents), unknown.Ifindex, actUnspec, 0, "port_agent"},
		{"the host's address", l, metadPort, with(own, func(f *testnet.Frame) { f.Src = HostAddr }), port, actShot, 0, "port_host"},
		{"bridge: the host's address", l, metadBridge, with(own, func(f *testnet.Frame) { f.Src = HostAddr }), bridge, actShot, 0, "bridge_host"},
		{"host", l, metadHost, ofHost.Bytes(), l.end.metad0, actRedirect, unproved, "host"},
		{"host, a container's address", l, metadHost, own.Bytes(), l.end.metad0, actRedirect, unproved, "host_refused"},
		{"host, a container's address, cut", l, metadHost, with(own, func(f *testnet.Frame) { f.Cut = 14 + 20 + 13 }), l.end.metad0, actShot, 0, "host_not_ours"},
		{"host, a container's address, other TCP port", l, metadHost, with(own, func(f *testnet.Frame) { f.DstPort = 81 }), l.end.metad0, actShot, 0, "host_not_ours"},
		{"host, a container's address, fragment", l, metadHost, fragments[1], l.end.metad0, actShot, 0, "host_not_ours"},
		{"host, another address", l, metadHost, with(ofHost, func(f *testnet.Frame) { f.Dst = other.Addr }), l.end.metad0, actShot, 0, "host_not_ours"},
		{"host, udp", l, metadHost, with(ofHost, func(f *testnet.Frame) { f.Protocol = unix.IPPROTO_UDP }), l.end.metad0, actShot, 0, "host_not_ours"},
		{"host, ipv6", l, metadHost, with(ofHost, func(f *testnet.Frame) { f.EtherType = unix.ETH_P_IPV6 }), l.end.metad0, actShot, 0, "host_not_ours"},
		{"unknown", l, metadPort, stranger.Bytes(), unknown.Ifindex, actRedirect, portTag(unknown.Ifindex), "port_unknown"},
		{"unknown, another mac on the same port", l, metadPort, with(stranger, func(f *testnet.Frame) { f.SrcMAC = other.MAC }), unknown.Ifindex, actRedirect, portTag(unknown.Ifindex), "port_unknown"},
		{"left to the agent", l, metadPort, with(stranger, func(f *testnet.Frame) { f.Src = left }), unknown.Ifindex, actUnspec, 0, "port_agent"},
		{"left to the agent, a connection that it has not", l, metadPort, with(stranger, func(f *testnet.Frame) { f.Src, f.Flags = left, testnet.ACK }), unknown.Ifindex, actRedirect, portTag(unknown.Ifindex), "port_unknown"},
		{"bridge: left to the agent", l, metadBridge, with(stranger, func(f *testnet.Frame) { f.Src = left }), bridge, actUnspec, 0, "bridge_agent"},
		{"left to the agent, and there is none", trusting, metadBridge, with(stranger, func(f *testnet.Frame) { f.Src = left }), 1, actRedirect, unproved, "bridge_unknown"},
		{"unknown, address in use elsewhere", l, metadPort, with(stranger, func(f *testnet.Frame) { f.SrcMAC = known.MAC }), other.Ifindex, actRedirect, portTag(other.Ifindex), "port_unknown"},
		{"unknown, bridge beside port", l, metadBridge, stranger.Bytes(), bridge, actRedirect, unproved, "bridge_unknown"},
		{"agent's connection", l, metadPort, with(own, agents), port, actUnspec, 0, "port_agent"},
		{"a new connection from the same port", l, metadPort, with(own, func(f *testnet.Frame) { f.SrcPort = agentPort }), port, actRedirect, 7, "port_task"},
		{"a connection that the agent has closed", l, metadPort, with(own, func(f *testnet.Frame) { f.SrcPort, f.Flags = lingerPort, testnet.ACK }), port, actRedirect, 7, "port_task"},
		{"a connection that the agent has closed, FIN", l, metadPort, with(own, func(f *testnet.Frame) { f.SrcPort, f.Flags = lingerPort, testnet.ACK|testnet.FIN }), port, actUnspec, 0, "port_agent"},
		{"agent's connection, another mac", l, metadPort, with(own, func(f *testnet.Frame) { agents(f); f.SrcMAC = other.MAC }), port, actShot, 0, "port_wrong_mac"},
		{"bridge: agent's connection, unknown", l, metadBridge, with(stranger, agents), bridge, actUnspec, 0, "bridge_agent"},
		{"bridge: agent's connection", l, metadBridge, with(own, agents), bridge, actUnspec, 0, "bridge_agent"},

		{"bridge: task", l, metadBridge, own.Bytes(), bridge, actRedirect, unproved, "bridge_task"},
		{"bridge: task, trusted", trusting, metadBridge, own.Bytes(), 1, actRedirect, 7, "bridge_trusted"},
		{"bridge: another mac", l, metadBridge, wrongMAC, bridge, actShot, 0, "bridge_wrong_mac"},
		{"bridge: another mac, trusting", trusting, metadBridge, wrongMAC, 1, actShot, 0, "bridge_wrong_mac"},
		{"bridge: unknown", l, metadBridge, with(stranger, func(f *testnet.Frame) { f.Src = netip.MustParseAddr("169.254.173.1") }), bridge, actRedirect, unproved, "bridge_unknown"},
		{"bridge: unknown, another mac", l, metadBridge,
			with(stranger, func(f *testnet.Frame) {
				f.Src, f.SrcMAC = netip.MustParseAddr("169.254.173.1"), other.MAC
			}), bridge, actShot, 0, "bridge_claimed"},
		{"port against bridge", l, metadPort, with(stranger, func(f *testnet.Frame) {
			f.Src, f.SrcMAC = netip.MustParseAddr("169.254.173.1"), other.MAC
		}), other.Ifindex, actRedirect, portTag(other.Ifindex), "port_unknown"},
		{"bridge: other port", l, metadBridge, with(own, func(f *testnet.Frame) { f.DstPort = 81 }), bridge, actUnspec, 0, "other_dport"},

		{"not armed: other address", dropping, metadPort, with(own, func(f *testnet.Frame) { f.Dst = other.Addr }), 1, actUnspec, 0, "not_meta"},
		{"not armed, drop", dropping, metadPort, own.Bytes(), 1, actShot, 0, "unarmed_drop"},
		{"not armed, drop, other port", dropping, metadPort, with(own, func(f *testnet.Frame) { f.DstPort = 81 }), 1, actUnspec, 0, "other_dport"},
		{"not armed, drop, bridge", dropping, metadBridge, own.Bytes(), 1, actShot, 0, "unarmed_drop"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := verdictsOf(t, c.l)
			host := h
			if c.l != l {
				host = nil
			}
			ret, _, mark := runOn(t, host, c.program(&c.l.progs.MetadPrograms), c.frame,
				c.ifindex, 0)
			if ret != c.ret || mark != c.mark {
				t.Errorf("got %#x and mark %#x, want %#x and mark %#x", ret, mark,
					c.ret, c.mark)
			}
			if got := moved(t, c.l, before); !slices.Equal(got, []string{c.verdict}) {
				t.Errorf("counters that moved: got %v, want %s alone", got,
					c.verdict)
			}
		})
	}

	// TestRootBusy has the rest.
	if err := l.progs.Busy.Put(uint32(7), ^uint64(0)); err != nil {
		t.Fatal(err)
	}
	run(t, h, l.progs.MetadPort, own.Bytes(), port, 0)
	if err := l.progs.Busy.Delete(uint32(7)); err != nil {
		t.Fatal(err)
	}

	// A handshake that was under way is the server's to end; anything else is left alone.
	t.Run("not armed", func(t *testing.T) {
		const halfOpen, lateOpen, bridgeOpen = 41001, 41002, 41003
		from := func(port uint16, flags byte) []byte {
			return with(own, func(f *testnet.Frame) {
				f.SrcPort, f.Flags = port, flags
			})
		}
		for _, p := range []uint16{halfOpen, lateOpen} {
			run(t, h, l.progs.MetadPort, from(p, testnet.SYN), port, 0)
		}
		run(t, h, l.progs.MetadBridge, from(bridgeOpen, testnet.SYN), bridge, 0)
		if err := l.Disarm(); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name    string
			program *ebpf.Program
			frame   []byte
			ifindex int
			ret     uint32
			mark    uint32
			verdict string
			after   time.Duration
		}{
			{"its handshake", l.progs.MetadPort, from(halfOpen, testnet.ACK), port, actRedirect, 7, "unarmed_open", 0},
			{"and once more", l.progs.MetadPort, from(halfOpen, testnet.ACK), port, actRedirect, 7, "unarmed_open", 0},
			{"bridge: its handshake", l.progs.MetadBridge, from(bridgeOpen, testnet.ACK), bridge, actRedirect, unproved, "unarmed_open", 0},
			{"another port's", l.progs.MetadPort, from(halfOpen, testnet.ACK), other.Ifindex, actUnspec, 0, "unarmed", 0},
			{"bridge: a port's", l.progs.MetadBridge, from(halfOpen, testnet.ACK), bridge, actUnspec, 0, "unarmed", 0},
			{"another connection", l.progs.MetadPort, from(halfOpen+100, testnet.ACK), port, actUnspec, 0, "unarmed", 0},
			{"another address, in the same place", l.progs.MetadPort,
				with(own, func(f *testnet.Frame) {
					f.Src, f.SrcPort, f.Flags = samePlace(f.Src, halfOpen),
						halfOpen, testnet.ACK
				}), port, actUnspec, 0, "unarmed", 0},
			{"a new connection", l.progs.MetadPort, from(halfOpen, testnet.SYN), port, actUnspec, 0, "unarmed", 0},
			{"which is somebody else's", l.progs.MetadPort, from(halfOpen, testnet.ACK), port, actUnspec, 0, "unarmed", 0},
			{"too long ago", l.progs.MetadPort, from(lateOpen, testnet.ACK), port, actUnspec, 0, "unarmed", 1100 * time.Millisecond},
		} {
			time.Sleep(c.after)
			before := verdictsOf(t, l)
			if ret, _, mark := run(t, h, c.program, c.frame, c.ifindex,
				0); ret != c.ret || mark != c.mark {
				t.Errorf("%s: got %#x and mark %#x, want %#x and mark %#x", c.name,
					ret, mark, c.ret, c.mark)
			}
			if got := moved(t, l, before); !slices.Equal(got, []string{c.verdict}) {
				t.Errorf("%s: counters that moved: got %v, want %s alone", c.name,
					got, c.verdict)
			}
		}
	})

	for _, c := range []struct {
		name    string
		mark    uint32
		ret     uint32
		want    uint32
		verdict string
	}{
		{"a task's", 7, actUnspec, 7, "entered"},
		{"a port's", portTag(port), actUnspec, portTag(port), "entered"},
		{"without proof", unproved, actUnspec, bpf.TagNone, "entered"},
		{"past the hooks", 0, actShot, 0, "enter_unmarked"},
	} {
		t.Run("enter: "+c.name, func(t *testing.T) {
			before := verdictsOf(t, l)
			ret, _, mark := run(t, h, l.progs.MetadEnter, own.Bytes(), 1, c.mark)
			if ret != c.ret || mark != c.want {
				t.Errorf("got %#x and mark %#x, want %#x and mark %#x", ret, mark,
					c.ret, c.want)
			}
			if got := moved(t, l, before); !slices.Equal(got, []string{c.verdict}) {
				t.Errorf("counters that moved: got %v, want %s alone", got,
					c.verdict)
			}
		})
	}

	// The way back. unknown was seen on its port, 169.254.173.2 will be at the bridge,
	// 169.254.173.9 nowhere.
	if err := l.Arm(); err != nil {
		t.Fatal(err)
	}
	atBridge := netip.MustParseAddr("169.254.173.2")
	run(t, h, l.progs.MetadBridge, with(stranger, func(f *testnet.Frame) { f.Src = atBridge }), bridge, 0)
	answer := func(to netip.Addr, tag uint32, change func(*testnet.Frame)) []byte {
		f := testnet.Frame{Src: Endpoint.Addr(), Dst: to, SrcPort: 80, DstPort: 40000,
			Flags: testnet.SYN | testnet.ACK}
		if change != nil {
			change(&f)
		}
		before := verdictsOf(t, l)
		ret, out, _ := run(t, h, l.progs.MetadCarry, f.Bytes(), 1, tag)
		if got := moved(t, l, before); ret != actUnspec ||
			!slices.Equal(got, []string{"carried"}) {
			t.Errorf("metad_carry: got %#x, counters that moved %v", ret, got)
		}
		return out
	}
	carrier := func(tag uint32) [6]byte { // the MAC of a frame that carries a tag
		mac := [6]byte{0x02}
		binary.BigEndian.PutUint32(mac[2:], tag)
		return mac
	}
	for _, c := range []struct {
		name    string
		to      netip.Addr
		tag     uint32
		change  func(*testnet.Frame)
		ret     uint32
		mac     [6]byte
		verdict string
	}{
		{"task", known.Addr, 7, nil, actRedirect, known.MAC, "reply_task"},
		{"task, port's tag", known.Addr, portTag(port), nil, actRedirect, known.MAC, "reply_task"},
		{"task, no tag", known.Addr, 0, nil, actRedirect, known.MAC, "reply_task"},
		{"task, a container's tag", known.Addr, bpf.ContainerTag(7, 3), nil, actRedirect, known.MAC, "reply_task"},
		{"task, another task's container's tag", known.Addr, bpf.ContainerTag(8, 3), nil, actRedirect, carrier(bpf.ContainerTag(8, 3)), "reply_not_theirs"},
		{"task, another task's tag", known.Addr, 8, nil, actRedirect, carrier(8), "reply_not_theirs"},
		{"task, another port's tag", known.Addr, portTag(other.Ifindex), nil, actRedirect, carrier(portTag(other.Ifindex)), "reply_not_theirs"},
		{"another's, a reset", known.Addr, 8, func(f *testnet.Frame) { f.Flags = testnet.RST | testnet.ACK }, actShot, [6]byte{}, "reply_not_theirs"},
		{"another's, no acknowledgement", known.Addr, 8, func(f *testnet.Frame) { f.Flags = testnet.SYN }, actShot, [6]byte{}, "reply_not_theirs"},
		{"another's, IP options", known.Addr, 8, func(f *testnet.Frame) { f.Options = 4 }, actShot, [6]byte{}, "reply_not_theirs"},
		{"port", unknown.Addr, portTag(unknown.Ifindex), nil, actRedirect, other.MAC, "reply_port"},
		{"port, no tag", unknown.Addr, 0, nil, actRedirect, unknown.MAC, "reply_bridge"},
		{"port, the tag of another one that uses the address", unknown.Addr, portTag(other.Ifindex), nil, actRedirect, known.MAC, "reply_port"},
		{"port, the tag of one that does not", unknown.Addr, portTag(port), nil, actRedirect, carrier(portTag(port)), "reply_not_theirs"},
		{"port, another address in the same place", otherPlace(unknown.Addr), portTag(unknown.Ifindex), nil, actRedirect, carrier(portTag(unknown.Ifindex)), "reply_not_theirs"},
		{"port, a task's tag", unknown.Addr, 7, nil, actRedirect, carrier(7), "reply_not_theirs"},
		{"bridge", atBridge, 0, nil, actRedirect, unknown.MAC, "reply_bridge"},
		{"bridge, a port's tag", atBridge, portTag(other.Ifindex), nil, actRedirect, carrier(portTag(other.Ifindex)), "reply_not_theirs"},
		{"bridge, a task's tag", atBridge, 7, nil, actRedirect, carrier(7), "reply_not_theirs"},
		{"host", HostAddr, 0, nil, actUnspec, [6]byte{}, "reply_host"},
		{"refused", known.Addr, 0, func(f *testnet.Frame) { f.SrcPort = 1 }, actUnspec, [6]byte{}, "reply_refused"},
		{"nobody", netip.MustParseAddr("169.254.173.9"), 0, nil, actShot, [6]byte{}, "reply_nowhere"},
		{"another source", known.Addr, 7, func(f *testnet.Frame) { f.Src = other.Addr }, actShot, [6]byte{}, "reply_not_ours"},
		{"udp", known.Addr, 7, func(f *testnet.Frame) { f.Protocol = unix.IPPROTO_UDP }, actShot, [6]byte{}, "reply_not_ours"},
		{"ipv6", known.Addr, 7, func(f *testnet.Frame) { f.EtherType = unix.ETH_P_IPV6 }, actShot, [6]byte{}, "reply_not_ours"},
	} {
		t.Run("reply: "+c.name, func(t *testing.T) {
			frame := answer(c.to, c.tag, c.change)
			before := verdictsOf(t, l)
			ret, out, _ := run(t, h, l.progs.MetadReply, frame, l.end.metad0, 0)
			if ret != c.ret || ret == actRedirect && [6]byte(out) != c.mac {
				t.Errorf("got %#x to %x, want %#x to %x", ret, out[:6], c.ret,
					c.mac)
			}
			if got := moved(t, l, before); !slices.Equal(got, []string{c.verdict}) {
				t.Errorf("counters that moved: got %v, want %s alone", got,
					c.verdict)
			}
		})
	}

	// Test runs take no such frames, or not on every kernel; the wire does.
	raw := testnet.NewRaw(t, known.NS, "eth0")
	for _, c := range []struct {
		name    string
		frame   []byte
		verdict string
	}{
		{"vlan", with(own, func(f *testnet.Frame) { f.VLAN = 5 }), "vlan"},
		{"ip header cut", with(own, func(f *testnet.Frame) { f.Cut = 14 + 19 }), "malformed"},
	} {
		before := verdictsOf(t, l)[c.verdict]
		raw.Send(c.frame)
		testnet.Until(t, c.name+" is counted", func() bool {
			return verdictsOf(t, l)[c.verdict] > before
		})
	}

	// A verdict that nothing above has seen is an exit without a test.
	// TestRootContainers
	seen := map[string]bool{"port_container": true, "host_container": true}
	for _, x := range []*Loader{l, trusting, dropping} {
		for name, n := range verdictsOf(t, x) {
			seen[name] = seen[name] || n != 0
		}
	}
	for name, ok := range seen {
		if !ok {
			t.Errorf("verdict %s was never reached", name)
		}
	}
}

// otherPlace returns another address that has the same place on a port (place_of in C).
func otherPlace(addr netip.Addr) netip.Addr {
	b := addr.As4()
	b[3] ^= 8
	return netip.AddrFrom4(b)
}

// samePlace returns another address whose handshake from port has the same place in the device's
// group (handshake_of in C).
func samePlace(addr netip.Addr, port uint16) netip.Addr {
	place := func(addr netip.Addr) uint32 {
		key := (be32(addr) ^ uint32(be16(port))) * 0x9e3779b1
		return (key ^ key>>16) % 64
	}
	other := addr.Next()
	for place(other) != place(addr) {
		other = other.Next()
	}
	return other
}

// runOn is run, in the test process's namespace if h is nil.
func runOn(t testing.TB, h *testnet.Host, p *ebpf.Program, frame []byte, ifindex int,
	mark uint32) (uint32, []byte, uint32) {
	t.Helper()
	if h == nil {
		h = testnet.NewHost(t)
	}
	return run(t, h, p, frame, ifindex, mark)
}
