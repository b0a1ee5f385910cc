//go:build root

package loader

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

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

// A container that uses an address before any task has it neither takes nor delays an answer to the
// container that gets the address: not before metad knows that one, not after, and not while an
// answer is due.
func TestRootClaimedEarly(t *testing.T) {
	b := newBridge(t)
	thief := b.AddTask("")
	l := open(t, b.Host, Config{})
	put(t, l, thief, 1)
	asked, claimed := make(chan struct{}), make(chan struct{})
	testnet.ServeOn(t, listen(t, l), func(c net.Conn, r *http.Request) string {
		if r.URL.Path == "/late" {
			asked <- struct{}{}
			<-claimed
		}
		return answerMark(c, r)
	})
	next := netip.MustParseAddr("169.254.172.77")
	raw := testnet.NewRaw(t, thief.NS, "eth0")
	claim := func() {
		t.Helper()
		seen := func() uint64 {
			v := verdictsOf(t, l)
			return v["port_unknown"] + v["port_wrong_port"]
		}
		before := seen()
		for port := range uint16(50) {
			raw.Send(testnet.Frame{SrcMAC: thief.MAC, DstMAC: b.MAC, Src: next,
				SrcPort: 1024 + port}.Bytes())
		}
		testnet.Until(t, "the address is claimed", func() bool {
			return seen() >= before+50
		})
	}
	claim()
	owner := b.AddTask(next.String())
	testnet.Until(t, "the port is hooked", func() bool { return hooked(l, owner.Ifindex) })
	refused := owner.Netstat("TCPSynRetrans")
	wantAnswers := func(want string) {
		t.Helper()
		for range 5 {
			claim()
			wantAnswer(t, owner, want)
		}
		late := make(chan string, 1)
		go func() {
			_, body, err := owner.Get("/late", timeout)
			late <- fmt.Sprint(body, " ", err)
		}()
		select {
		case <-asked:
			claim()
			claimed <- struct{}{}
			if got := <-late; got != want+" <nil>" {
				t.Errorf("claimed before the answer: got %s, want %q", got, want)
			}
		case got := <-late:
			t.Errorf("not asked: %s", got)
		}
	}
	wantAnswers(portTag(owner))
	put(t, l, owner, 2)
	wantAnswers("metad 0x2")
	if n := owner.Netstat("TCPSynRetrans") - refused; n != 0 {
		t.Errorf("%d SYNs were sent again, want none: each first one is answered", n)
	}
	wantAnswer(t, thief, "metad 0x1")
}

// Made-up addresses of one port push no other port's out, however many: an answer that is on its
// way arrives.
func TestRootNeighboursOfAPort(t *testing.T) {
	b := newBridge(t)
	evil, newcomer := b.AddTask(""), b.AddTask("")
	l := serving(t, b, Config{})
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
	b := newBridge(t)
	evil, victim := b.AddTask(""), b.AddTask("")
	l := open(t, b.Host, Config{})
	put(t, l, evil, 1)
	put(t, l, victim, 2)
	if err := l.Arm(); err != nil { // without a listener: nothing but the SYNs is sent
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
	run(t, b.Host, l.progs.MetadPort, syn(victim, 40000), victim.Ifindex, 0)
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

// New connections of a busy task or port are dropped for a moment, and nobody else's; its open
// connections go on.
func TestRootBusy(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	busy, unknown, other := b.AddTask(""), b.AddTask(""), b.AddTask("")
	l := open(t, h, Config{})
	put(t, l, busy, 1)
	put(t, l, other, 2)
	if err := l.Arm(); err != nil {
		t.Fatal(err)
	}
	unknownTag := bpf.TagPort | uint32(unknown.Ifindex)
	var now unix.Timespec
	clock := func() int64 {
		t.Helper()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
			t.Fatal(err)
		}
		return now.Nano()
	}
	before := clock()
	if err := l.Busy(1); err != nil {
		t.Fatal(err)
	}
	var until uint64
	if err := l.progs.Busy.Lookup(uint32(1), &until); err != nil ||
		int64(until) < before+int64(busyTime) || int64(until) > clock()+int64(busyTime) {
		t.Errorf("busy until %d, %v, want %v after %d", until, err, busyTime, before)
	}
	const forever = ^uint64(0)
	for _, c := range []struct {
		name    string
		until   uint64
		k       *testnet.Task
		flags   byte
		verdict string
	}{
		{"a task that is busy", forever, busy, testnet.SYN, "port_busy"},
		{"a port that is busy", forever, unknown, testnet.SYN, "port_busy"},
		{"an open connection", forever, busy, testnet.ACK, "port_task"},
		{"another task", forever, other, testnet.SYN, "port_task"},
		{"no longer busy", 1, busy, testnet.SYN, "port_task"},
	} {
		for _, tag := range []uint32{1, unknownTag} {
			if err := l.progs.Busy.Put(tag, c.until); err != nil {
				t.Fatal(err)
			}
		}
		counted := verdictsOf(t, l)
		frame := testnet.Frame{SrcMAC: c.k.MAC, DstMAC: b.MAC, Src: c.k.Addr,
			SrcPort: 40000, Flags: c.flags}
		run(t, h, l.progs.MetadPort, frame.Bytes(), c.k.Ifindex, 0)
		if got := moved(t, l, counted); !slices.Equal(got, []string{c.verdict}) {
			t.Errorf("%s: counters that moved: got %v, want %s alone", c.name, got,
				c.verdict)
		}
	}
}
