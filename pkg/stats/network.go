package stats

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"metad/pkg/netdump"
	"metad/pkg/task"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Link is one interface of a network namespace.
type Link struct {
	Name     string
	Kind     string // rtnetlink's: "veth", "vlan", …; "device" for a network card
	Loopback bool
}

// ListLinks returns the interfaces of the network namespace that the open file nsfd stands for.
func ListLinks(nsfd int) ([]Link, error) {
	// Without the family the library opens all netlink families, and some are modules that are
	// not loaded.
	h, err := netlink.NewHandleAt(netns.NsHandle(nsfd), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	list, err := netdump.Whole(h.LinkList)
	if err != nil {
		return nil, err
	}
	links := make([]Link, len(list))
	for i, l := range list {
		links[i] = Link{Name: l.Attrs().Name, Kind: l.Type(),
			Loopback: l.Attrs().Flags&net.FlagLoopback != 0}
	}
	return links, nil
}

// maxListing is how many namespaces are listed at a time. Each list waits in the kernel for every
// change of a network anywhere on the host: at times half a second, while containers come and go.
const maxListing = 4

// errNotYet means that a container's interfaces are not known yet. It does not count as a failure.
var errNotYet = errors.New("interfaces not listed yet")

// netSource opens the interface counters of containers.
type netSource struct {
	procRoot string
	links    func(nsfd int) ([]Link, error)
	hostNS   string // link text of the host's network namespace
	seed     maphash.Seed
	listing  chan struct{} // holds a token for each namespace that is being listed
	start    func(func())  // runs a function on its own; tests run it at once
}

func newNetSource(procRoot string, links func(int) ([]Link, error)) netSource {
	// The host's own namespace. For Docker a container in it has no interfaces.
	hostNS, _ := os.Readlink(filepath.Join(procRoot, "1/ns/net"))
	return netSource{procRoot: procRoot, links: links, hostNS: hostNS, seed: maphash.MakeSeed(),
		listing: make(chan struct{}, maxListing), start: func(f func()) { go f() }}
}

// netFeed reads the counters of one network namespace.
type netFeed struct {
	src *netSource
	pid int    // a process in the namespace, 0: nothing is shown
	id  string // of that process's container
	eni bool
	dev keptFile // its net/dev

	known bool     // shown is that of the names in seen
	seen  uint64   // hash of the names that shown was made of
	shown []string // ascending
	asked *linkList
}

// linkList is the result of listing a namespace's interfaces.
type linkList struct {
	names uint64 // hash of the names that it was asked for
	done  atomic.Bool
	links []Link
	err   error
}

// netProcess returns the container whose process is in the network namespace of c, and whether the
// namespace is that of an awsvpc task. By the agent's rule all containers of such a task show the
// interfaces of the task.
func netProcess(t *task.Task, c *task.Container) (_ *task.Container, eni bool) {
	// Docker gave the pause container no network, so the agent's plugins made the interfaces
	// in it. Any other container is in the namespace that Docker shows: its own, or the one
	// that it joined.
	if p := t.Pause(); p != nil && p.Running() && p.NetworkMode == "none" {
		return p, true
	}
	return c, false
}

// open returns the feed for a container's process.
func (s *netSource) open(c *task.Container, eni, hostMode bool) (netFeed, error) {
	f := netFeed{src: s, eni: eni}
	if hostMode {
		return f, nil
	}
	proc, err := openProc(s.procRoot, c.PID)
	if err != nil {
		return f, err
	}
	defer unix.Close(proc)
	var ns [64]byte
	if n, err := unix.Readlinkat(proc, "ns/net", ns[:]); err == nil &&
		string(ns[:n]) == s.hostNS {
		return f, nil
	}
	f.pid, f.id = c.PID, c.ID
	return f, nil
}

// reach opens net/dev, unless it is open. proc, if it is not negative, is the directory of the
// container's process pid, of which the caller finds out whether it is the container's.
func (f *netFeed) reach(proc, pid int, buf []byte) error {
	if f.pid == 0 || f.dev.fd != 0 {
		return nil
	}
	if proc >= 0 && pid == f.pid {
		return f.openDev(proc)
	}
	proc, err := openProc(f.src.procRoot, f.pid)
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	if err := f.openDev(proc); err != nil {
		return err
	}
	// The check comes after the opening: if the process is the container's now, it was then.
	membership, err := readFile(proc, "cgroup\x00", buf, inPieces)
	if err != nil {
		return gone(err)
	}
	if index(membership, f.id) < 0 {
		return errGone
	}
	return nil
}

func (f *netFeed) openDev(proc int) error {
	err := f.dev.open(proc, "net/dev\x00")
	if err != nil && !isShort(err) {
		return errGone // also what a dead process not yet waited for gives
	}
	return err
}

// waiting reports whether the interfaces are still to be listed.
func (f *netFeed) waiting() bool { return !f.known && f.asked != nil && !f.asked.done.Load() }

// read appends the interfaces' counters to dst, ascending by name; buf is scratch, and net/dev is
// open. It allocates only when interfaces have come or gone. It returns errNotYet until they have
// been listed for the first time. A new interface appears in a later reading.
//
// keep leaves net/dev open for the next reading, which saves a tenth of a sample. An open net/dev
// holds the namespace with its interfaces. So keep is only for a container that is sampled so
// often that its other files soon show its end.
//
// The kernel adds frames missed by the hardware to the column of dropped ones, which Docker does
// not; a veth has none.
func (f *netFeed) read(dst []Network, buf []byte, keep bool) ([]Network, error) {
	if f.pid == 0 {
		return dst, nil
	}
	b, err := f.dev.read(-1, "net/dev\x00", buf, inPieces, keep)
	if errors.Is(err, errDamaged) || isShort(err) {
		return dst, fmt.Errorf("net/dev: %w", err)
	}
	if err != nil {
		return dst, errGone
	}
	var n Network
	var h maphash.Hash
	h.SetSeed(f.src.seed)
	lines := newNetLines(b)
	for name, ok := lines.next(&n); ok; name, ok = lines.next(&n) {
		_, _ = h.Write(name)
		_ = h.WriteByte(0)
	}
	if lines.err != nil {
		return dst, fmt.Errorf("net/dev: %w", lines.err)
	}
	if sum := h.Sum64(); !f.known || sum != f.seen {
		f.choose(b, sum)
	}
	if !f.known {
		return dst, errNotYet
	}
	start := len(dst)
	for range f.shown {
		dst = append(dst, Network{})
	}
	lines = newNetLines(b)
	for name, ok := lines.next(&n); ok; name, ok = lines.next(&n) {
		for i := range f.shown {
			if f.shown[i] == string(name) {
				n.Name = f.shown[i]
				dst[start+i] = n
			}
		}
	}
	// A shown interface may be gone while the new list is not there yet.
	shown := slices.DeleteFunc(dst[start:], func(n Network) bool { return n.Name == "" })
	return dst[:start+len(shown)], nil
}

// choose decides again which of the interfaces in net/dev are shown, once they have been listed.
func (f *netFeed) choose(b []byte, names uint64) {
	if f.asked == nil || f.asked.names != names {
		f.ask(names)
	}
	if !f.asked.done.Load() {
		return
	}
	list := f.asked
	f.asked = nil
	if !isShort(list.err) {
		f.show(b, list)
		f.known, f.seen = true, names
	}
}

// ask starts the listing of the namespace's interfaces, which may take long.
func (f *netFeed) ask(names uint64) {
	s, pid, id := f.src, f.pid, f.id
	list := &linkList{names: names}
	f.asked = list
	s.start(func() {
		s.listing <- struct{}{}
		defer func() { <-s.listing }()
		list.links, list.err = s.list(pid, id)
		list.done.Store(true)
	})
}

// list returns the interfaces that process pid of the container sees.
func (s *netSource) list(pid int, id string) ([]Link, error) {
	dir := filepath.Join(s.procRoot, strconv.Itoa(pid))
	ns, err := os.Open(filepath.Join(dir, "ns/net"))
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	membership, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	if err == nil && !bytes.Contains(membership, []byte(id)) {
		err = errGone
	}
	if err != nil {
		return nil, err
	}
	return s.links(int(ns.Fd()))
}

// show sets shown from the interfaces in net/dev and their kinds.
//
// In an awsvpc task the network cards and VLANs are shown, as by the agent; its ecs-eth0 is a
// veth. Otherwise the interfaces that Docker's drivers make are shown. Docker does not show
// interfaces that a container makes (tun, wg, bridge), or the kernel in each namespace (sit0,
// tunl0).
func (f *netFeed) show(b []byte, list *linkList) {
	kinds := make(map[string]Link, len(list.links))
	for _, l := range list.links {
		kinds[l.Name] = l
	}
	f.shown = f.shown[:0]
	var n Network
	lines := newNetLines(b)
	for name, ok := lines.next(&n); ok && len(f.shown) < maxNumbers; name, ok = lines.next(&n) {
		l, found := kinds[string(name)]
		show := false
		switch {
		case list.err != nil: // not allowed in: the usual names
			show = string(name) != "lo" && !strings.HasPrefix(string(name), "ecs-eth")
		case !found || l.Loopback:
		case l.Kind == "device" || l.Kind == "vlan" || f.eni && l.Name == "eth0":
			show = true
		case l.Kind == "veth" || l.Kind == "macvlan" || l.Kind == "ipvlan":
			show = !f.eni
		}
		if show {
			f.shown = append(f.shown, string(name))
		}
	}
	slices.Sort(f.shown)
	f.shown = slices.Compact(f.shown)
}
