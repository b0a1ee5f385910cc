package stats

import (
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

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
	// Without the family the library opens all netlink families, some of which are modules that
	// are not loaded.
	h, err := netlink.NewHandleAt(netns.NsHandle(nsfd), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	list, err := h.LinkList()
	if err != nil {
		return nil, err
	}
	links := make([]Link, len(list))
	for i, l := range list {
		links[i] = Link{Name: l.Attrs().Name, Kind: l.Type(), Loopback: l.Attrs().Flags&net.FlagLoopback != 0}
	}
	return links, nil
}

// netSource opens the interface counters of containers.
type netSource struct {
	procRoot string
	links    func(nsfd int) ([]Link, error)
	hostNS   string // link text of the host's network namespace
	seed     maphash.Seed
}

func newNetSource(procRoot string, links func(int) ([]Link, error)) netSource {
	// The host's own namespace: a container in it has, for Docker, no interfaces.
	hostNS, _ := os.Readlink(filepath.Join(procRoot, "1/ns/net"))
	return netSource{procRoot: procRoot, links: links, hostNS: hostNS, seed: maphash.MakeSeed()}
}

// netFeed reads the counters of one network namespace.
type netFeed struct {
	src  *netSource
	proc int // directory of a process in the namespace, -1: nothing is shown
	eni  bool
	dev  keptFile // its net/dev

	seen  uint64   // hash of the names that shown was made of
	shown []string // ascending
}

// netPID returns the process whose network namespace holds the container's interfaces, and whether
// they are those of an awsvpc task: the task's, by the agent's rule, for all its containers alike.
func netPID(t *task.Task, c *task.Container) (pid int, eni bool) {
	p := t.Pause()
	if p == nil || !p.Running() {
		return c.PID, false
	}
	// Docker gave the pause container no network: what is in there, the agent's plugins made. Else
	// the task only looks like one in awsvpc mode, and Docker knows its interfaces.
	return p.PID, p.NetworkMode == "none"
}

// open returns the feed for a process. Close it even when nothing is shown.
func (s *netSource) open(pid int, eni, hostMode bool) (netFeed, error) {
	f := netFeed{src: s, proc: -1, eni: eni}
	if hostMode {
		return f, nil
	}
	dir, err := openDir(filepath.Join(s.procRoot, strconv.Itoa(pid)))
	if err != nil {
		return f, err
	}
	f.proc = dir
	var ns [64]byte
	if n, err := unix.Readlinkat(dir, "ns/net", ns[:]); err == nil && string(ns[:n]) == s.hostNS {
		f.close()
	}
	return f, nil
}

// close lets go of the process. dev, if it was kept, is closed before.
func (f *netFeed) close() {
	if f.proc >= 0 {
		unix.Close(f.proc)
		f.proc = -1
	}
}

// read appends the interfaces' counters to dst, ascending by name; buf is scratch. It allocates
// only when interfaces came or went.
//
// keep leaves net/dev open for the next reading: a tenth of all that a sample costs. That holds the namespace, and
// what nobody took out of it, until the file is closed: only for a container that is sampled so often that its end is
// soon seen by its other files.
//
// The kernel adds frames missed by the hardware to the column of dropped ones, which Docker does
// not; a veth has none.
func (f *netFeed) read(dst []Network, buf []byte, keep bool, budget *budget) ([]Network, error) {
	if f.proc < 0 {
		return dst, nil
	}
	b, err := f.dev.read(f.proc, "net/dev\x00", buf, inPieces, keep, budget)
	if errors.Is(err, errDamaged) {
		return dst, fmt.Errorf("net/dev: %w", err)
	}
	if err != nil {
		return dst, errGone // also what a dead process not yet waited for gives
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
	if sum := h.Sum64(); sum != f.seen {
		f.choose(b)
		f.seen = sum
	}
	start := len(dst)
	for _, name := range f.shown {
		dst = append(dst, Network{Name: name})
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
	return dst, nil
}

// choose decides anew which of the interfaces in net/dev are shown.
//
// In an awsvpc task it is the network cards and VLANs, as the agent does; its ecs-eth0 is a veth.
// For Docker it is what Docker's drivers make. What a container makes for itself (tun, wg, bridge) and
// what the kernel puts into each namespace (sit0, tunl0) Docker does not show.
func (f *netFeed) choose(b []byte) {
	kinds := make(map[string]Link)
	known := false
	if fd, err := openat(f.proc, "ns/net\x00"); err == nil {
		links, err := f.src.links(fd)
		unix.Close(fd)
		known = err == nil
		for _, l := range links {
			kinds[l.Name] = l
		}
	}
	f.shown = f.shown[:0]
	var n Network
	lines := newNetLines(b)
	for name, ok := lines.next(&n); ok && len(f.shown) < maxNumbers; name, ok = lines.next(&n) {
		l, found := kinds[string(name)]
		show := false
		switch {
		case !known: // not allowed in: the usual names
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
