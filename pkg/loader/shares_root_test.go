//go:build root

package loader

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"metad/bpf"
	"metad/internal/testnet"
)

// madeUp returns n SYNs from as many addresses of 10.0.0.0/8.
func madeUp(from *testnet.Task, n int) [][]byte {
	frames := make([][]byte, n)
	for i := range frames {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 10<<24|uint32(i+1))
		frames[i] = testnet.Frame{SrcMAC: from.MAC, DstMAC: from.Bridge.MAC,
			Src: netip.AddrFrom4(a)}.Bytes()
	}
	return frames
}

// A container that uses an address before any task has it neither takes nor delays the first
// request of the container that gets the address: not before metad knows that one, and not after.
func TestRootClaimedEarly(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	thief := b.AddTask("")
	l := open(t, h, Config{})
	put(t, l, thief, 1)
	serve(t, l)
	next := netip.MustParseAddr("169.254.172.77")
	raw := testnet.NewRaw(t, thief.NS, "eth0")
	claim := func() {
		for port := range uint16(50) {
			raw.Send(testnet.Frame{SrcMAC: thief.MAC, DstMAC: b.MAC, Src: next,
				SrcPort: 1024 + port}.Bytes())
		}
	}
	before := verdictsOf(t, l)["port_unknown"]
	claim()
	testnet.Until(t, "the address is claimed", func() bool {
		return verdictsOf(t, l)["port_unknown"] >= before+50
	})
	owner := b.AddTask(next.String())
	testnet.Until(t, "the port is hooked", func() bool { return hooked(l, owner.Ifindex) })
	refused := owner.Netstat("TCPSynRetrans")
	for range 5 {
		claim()
		wantAnswer(t, owner, portTag(owner))
	}
	put(t, l, owner, 2)
	for range 5 {
		claim()
		wantAnswer(t, owner, "metad 0x2")
	}
	if n := owner.Netstat("TCPSynRetrans") - refused; n != 0 {
		t.Errorf("%d SYNs were sent again, want none: each first one is answered", n)
	}
	wantAnswer(t, thief, "metad 0x1")
}

// Made-up addresses of one port push no other port's out, however many: an answer that is on its
// way arrives.
func TestRootNeighboursOfAPort(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	evil, newcomer := b.AddTask(""), b.AddTask("")
	l := open(t, h, Config{})
	serve(t, l)
	c, err := newcomer.Dial(timeout)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const n = 20_000 // more than all places
	raw := testnet.NewRaw(t, evil.NS, "eth0")
	before := verdictsOf(t, l)["port_unknown"]
	raw.Send(madeUp(evil, n)...)
	testnet.Until(t, "the flood is seen", func() bool {
		return verdictsOf(t, l)["port_unknown"] >= before+n
	})
	var place bpf.NeighbourPlace
	var value bpf.Neighbour
	of := map[uint32]int{}
	for it := l.progs.PortNeighbours.Iterate(); it.Next(&place, &value); {
		of[place.Ifindex]++
	}
	if of[uint32(evil.Ifindex)] > 8 || of[uint32(newcomer.Ifindex)] != 1 {
		t.Errorf("places by port: got %v, want at most 8 of %d and one of %d", of,
			evil.Ifindex, newcomer.Ifindex)
	}
	if _, body, err := testnet.GetOn(c, "/", timeout); err != nil || body != portTag(newcomer) {
		t.Errorf("the connection from before: got %q, %v, want %q", body, err,
			portTag(newcomer))
	}
}

// Connections that one port begins push no other port's out of the table of handshakes, however
// many.
func TestRootHandshakesOfAPort(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	evil, victim := b.AddTask(""), b.AddTask("")
	l := open(t, h, Config{})
	put(t, l, evil, 1)
	put(t, l, victim, 2)
	if err := l.Arm(); err != nil {
		t.Fatal(err)
	}
	syn := func(k *testnet.Task, port uint16) []byte {
		return testnet.Frame{SrcMAC: k.MAC, DstMAC: b.MAC, Src: k.Addr,
			SrcPort: port}.Bytes()
	}
	raw := testnet.NewRaw(t, evil.NS, "eth0")
	flood := make([][]byte, 10_000)
	for i := range flood {
		flood[i] = syn(evil, uint16(1024+i))
	}
	before := verdictsOf(t, l)["port_task"]
	run(t, h, l.progs.MetadPort, syn(victim, 40000), victim.Ifindex, 0)
	raw.Send(flood...)
	testnet.Until(t, "the flood is seen", func() bool {
		return verdictsOf(t, l)["port_task"] > before+10_000
	})
	// The table is read, and no packet sent: an entry counts for a second, and on a slow
	// machine the flood takes longer.
	of := map[uint32]int{}
	var key uint32
	var made bpf.Handshake
	for it := l.progs.Handshakes.Iterate(); it.Next(&key, &made); {
		of[made.Ifindex]++
	}
	if of[uint32(victim.Ifindex)] != 1 || of[uint32(evil.Ifindex)] < 32 {
		t.Errorf("handshakes by port: got %v, want one of %d and many of %d", of,
			victim.Ifindex, evil.Ifindex)
	}
}
