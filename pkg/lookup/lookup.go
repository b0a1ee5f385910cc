// Package lookup answers one question: which task does this connection come from? It holds the
// reader's side of the kernel's ip_task map and keeps the two equal: what Apply publishes to
// readers it has written to the kernel first, and what it takes from the kernel it has taken from
// readers first. With the maps of containers by cgroup it answers too which container of the task.
package lookup

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/task"
)

// KernelMap is the kernel's address → task map; the loader has it. Deleting what is not there is no
// error.
type KernelMap interface {
	Put(netip.Addr, *bpf.TaskValue) error
	Delete(netip.Addr) error
	Entries() (map[netip.Addr]bpf.TaskValue, error)
}

// Limits of Await. A container that is not known yet waits with a few connections; more than that
// is somebody trying what happens.
const (
	maxWaiters        = 4096 // in all
	maxWaitersPerAddr = 128
	maxWaitersPerTag  = 128            // of one port or task, whatever addresses it makes up
	maxUnproved       = maxWaiters / 2 // of all without a tag, who can make up any address
)

// entry is one address's owner.
type entry struct {
	ep   task.Endpoint
	view *View
}

// snapshot is what readers see: immutable once published.
type snapshot struct {
	tags      parts[uint32, *View]
	addrs     parts[netip.Addr, entry]
	endpoints parts[string, holder] // by endpoint id
}

func (s *snapshot) byTag(tag uint32) *View { return s.tags.maps[tagPart(tag)][tag] }

func (s *snapshot) byAddr(a netip.Addr) (entry, bool) {
	e, ok := s.addrs.maps[addrPart(a)][a]
	return e, ok
}

// next returns a copy to be changed.
func (s *snapshot) next() *snapshot {
	return &snapshot{tags: s.tags.next(), addrs: s.addrs.next(), endpoints: s.endpoints.next()}
}

// Table maps tags, addresses and endpoint ids to tasks' views. Readers (Resolve, Await, Endpoint,
// Views) are safe for concurrent use with each other and with the writers (all else), which take
// turns.
type Table struct {
	kernel KernelMap
	log    *zap.Logger

	snap              atomic.Pointer[snapshot]
	conflicts         atomic.Uint64
	endpointConflicts atomic.Uint64
	turned            atomic.Uint64

	mu      sync.Mutex   // guards what follows: the writers' state
	tasks   []*task.Task // to be published, by ARN
	shown   []*task.Task // those that claims, tags and the snapshot are made of
	claims  claims
	tags    map[string]uint32            // task ARN → tag
	nextTag uint32                       // the next to try
	wrapped bool                         // nextTag may have been given before
	written map[netip.Addr]bpf.TaskValue // what the kernel holds; nil: not read yet
	// ifindexes that no longer exist and that tasks claim: to no avail
	gone    map[int]bool
	dispute map[netip.Addr]bool // claimed twice, and told so
	copied  map[string]bool     // endpoint ids held twice, and told so

	containers containers
	applied    bool // what an earlier process left has been replaced
	failed     bool // the last publish left something undone

	wmu     sync.Mutex // guards what follows; taken after mu
	waits   map[waitKey]*wait
	waiting int                     // connections, in all waits
	waitsOf map[uint32]int          // the same by tag, without a container's bits
	watched map[*View]chan struct{} // views whose change somebody waits for
}

type waitKey struct {
	tag  uint32
	addr netip.Addr
}

// wait is all connections that wait for the same thing: one look at each publication serves them.
type wait struct {
	n    int
	done chan struct{} // closed when view is set
	view *View
}

// New returns a table that writes through to kernel. Entries already there (pinned by an earlier
// process) stay until the first Apply; Restore gives them their tasks before that.
func New(kernel KernelMap, log *zap.Logger) *Table {
	t := &Table{
		kernel:  kernel,
		log:     log,
		tags:    map[string]uint32{},
		nextTag: 1,
		gone:    map[int]bool{},
		dispute: map[netip.Addr]bool{},
		copied:  map[string]bool{},
		claims:  newClaims(),
		waits:   map[waitKey]*wait{},
		waitsOf: map[uint32]int{},
		watched: map[*View]chan struct{}{},

		containers: containers{log: log},
	}
	t.snap.Store(&snapshot{})
	return t
}

// Conflicts returns how often an address began to be claimed by two at once.
func (t *Table) Conflicts() uint64 { return t.conflicts.Load() }

// Waiting returns how many connections wait in Await, and how many may.
func (t *Table) Waiting() (n, limit int) {
	t.wmu.Lock()
	defer t.wmu.Unlock()
	return t.waiting, maxWaiters
}

// TurnedAway returns how often Await did not wait because too many did already.
func (t *Table) TurnedAway() uint64 { return t.turned.Load() }

// Resolve returns the view of the task that a connection from addr with the mark tag belongs to,
// nil if there is none now; View.Sender says which container. It takes no lock, makes no system
// call and does not allocate.
//
// A task's tag is proof by itself: the kernel saw the address, the port and the MAC. A port's tag
// (the task was not known at the time) holds for the task that has addr behind that very port. No
// tag (bridge device only) holds for the task that has addr: the reply leaves by that task's port,
// whoever asked, and a handshake completes nowhere else.
func (t *Table) Resolve(tag uint32, addr netip.Addr) *View {
	s := t.snap.Load()
	switch {
	case tag == bpf.TagNone:
		e, _ := s.byAddr(addr)
		return e.view
	case tag&bpf.TagPort != 0:
		if e, ok := s.byAddr(addr); ok && uint32(e.ep.Ifindex) == tag&^bpf.TagPort {
			return e.view
		}
		return nil
	default:
		return s.byTag(tag & bpf.TagTask) // the tag may name a container of the task too
	}
}

// Await is Resolve that waits until the task is there and Settled, or ctx ends. It returns what
// there is then, nil if nothing, and at once if too many wait already.
func (t *Table) Await(ctx context.Context, tag uint32, addr netip.Addr) *View {
	if v := t.Resolve(tag, addr); v.Settled(tag) {
		return v
	}
	key := waitKey{tag, addr}
	t.wmu.Lock()
	// published since; later publications will find us
	if v := t.Resolve(tag, addr); v.Settled(tag) {
		t.wmu.Unlock()
		return v
	}
	w := t.waits[key]
	src := sourceOf(tag)
	if t.waiting >= maxWaiters || t.waitsOf[src] >= mostOf(src) || w != nil &&
		w.n >= maxWaitersPerAddr {
		t.wmu.Unlock()
		t.turned.Add(1)
		return t.Resolve(tag, addr)
	}
	if w == nil {
		w = &wait{done: make(chan struct{})}
		t.waits[key] = w
	}
	w.n++
	t.waiting++
	t.waitsOf[src]++
	t.wmu.Unlock()

	select {
	case <-w.done:
	case <-ctx.Done():
	}

	t.wmu.Lock()
	defer t.wmu.Unlock()
	w.n--
	t.waiting--
	if t.waitsOf[src]--; t.waitsOf[src] == 0 {
		delete(t.waitsOf, src)
	}
	if w.n == 0 && t.waits[key] == w {
		delete(t.waits, key)
	}
	if w.view == nil {
		return t.Resolve(tag, addr)
	}
	return w.view
}

// sourceOf returns whose share of the waiting room a connection with the tag takes.
func sourceOf(tag uint32) uint32 {
	if tag&bpf.TagPort != 0 {
		return tag
	}
	return tag & bpf.TagTask // whichever container of it
}

func mostOf(source uint32) int {
	if source == bpf.TagNone {
		return maxUnproved
	}
	return maxWaitersPerTag
}

// Views returns every task's current view, ordered by ARN. A View carries the task's tag: it is
// what Restore wants back after a restart.
func (t *Table) Views() []*View {
	var views []*View
	for _, v := range t.snap.Load().tags.all() {
		views = append(views, v)
	}
	slices.SortFunc(views, func(a, b *View) int { return cmp.Compare(a.Task.ARN, b.Task.ARN) })
	return views
}
