//go:build root

package loader

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/internal/testnet"
)

// addPorts gives the bridge n ports that lead nowhere.
func addPorts(t *testing.T, h *testnet.Host, bridge string, n int) (ifindexes []int) {
	t.Helper()
	master := h.Link(bridge).Attrs().Index
	for i := range n {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = fmt.Sprintf("p%d", i), master
		attrs.Flags |= unix.IFF_UP
		if err := h.NL.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: fmt.Sprintf("q%d",
			i)}); err != nil {
			t.Fatal(err)
		}
		ifindexes = append(ifindexes, h.Link(attrs.Name).Attrs().Index)
	}
	return ifindexes
}

// kinds returns how many devices have a link and how many a filter, when all are attached to.
func kinds(t *testing.T, l *Loader, devices int) (links, filters int) {
	t.Helper()
	testnet.Until(t, "all are attached to", func() bool {
		s := l.Status()
		return s.Ports+s.Bridges == devices && s.Pending == 0
	})
	for _, h := range l.ports.all() {
		if _, is := h.on.(*fdLink); is {
			links++
		} else {
			filters++
		}
	}
	return links, filters
}

// With more ports than get a link the others get filters. Both prove where a packet came from, both
// are handed over, and neither is left after a stop, also where a process was killed before.
func TestRootLinksAndFilters(t *testing.T) {
	testnet.SkipBefore(t, "6.6")
	h, b := hostWithAgent(t)
	first := b.AddTask("")
	const gone = 8 // after the first process
	made := addPorts(t, h, b.Name, maxLinks+gone)
	last := b.AddTask("")
	dir := testnet.PinDir(t)

	p := start(t, h, childConfig{PinDir: dir, Attach: AttachAuto,
		Tasks: childTasks(first, last)})
	testnet.Until(t, "the last port has its program", func() bool {
		return attached(t, h, last.Ifindex)
	})
	untilAnswer(t, last, "metad 0x2")
	p.kill()
	untilAnswer(t, first, "agent")
	untilAnswer(t, last, "agent")

	// The second process has links where the first one had filters.
	for _, ifindex := range made[:gone] {
		if err := h.NL.LinkDel(
			&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}); err != nil {
			t.Fatal(err)
		}
	}
	all := append([]int{b.Ifindex, first.Ifindex, last.Ifindex}, made[gone:]...)
	l := open(t, h, Config{PinDir: dir, Log: zap.NewNop()})
	put(t, l, first, 1)
	put(t, l, last, 2)
	serve(t, l)
	links, filters := kinds(t, l, len(all))
	if pair := len(l.gate.links()); links+pair != maxLinks || filters == 0 {
		t.Errorf("got %d links, %d of metad's own devices and %d filters, want %d links",
			links, pair, filters, maxLinks)
	}
	before := verdictsOf(t, l)["port_task"]
	wantAnswer(t, first, "metad 0x1")
	wantAnswer(t, last, "metad 0x2")
	if after := verdictsOf(t, l)["port_task"]; after < before+2 {
		t.Errorf("%d packets were seen at a port, want those of both tasks", after-before)
	}

	files, meta, err := l.OfferTakeover()
	if err != nil {
		t.Fatal(err)
	}
	next, ln, err := TakeOver(Config{Netns: h.NS, PinDir: dir}, files, meta)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	if err := l.FinishTakeover(); err != nil {
		t.Error(err)
	}
	if l2, f2 := kinds(t, next, len(all)); l2 != links || f2 != filters {
		t.Errorf("after the takeover: %d links and %d filters, want %d and %d", l2, f2,
			links, filters)
	}
	testnet.ServeOn(t, ln, answerMark)
	wantAnswer(t, first, "metad 0x1")
	wantAnswer(t, last, "metad 0x2")
	if err := errors.Join(next.Disarm(), next.Close()); err != nil {
		t.Error(err)
	}
	for _, ifindex := range all {
		if attached(t, h, ifindex) {
			t.Errorf("ifindex %d still has our program", ifindex)
		}
	}
}
