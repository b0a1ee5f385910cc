// Package lookup answers one question: which task does this connection come from? It holds the
// reader's side of the kernel's ip_task map and keeps the two equal: what Apply publishes to
// readers it has written to the kernel first, and what it takes back it takes from the kernel first.
package lookup

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/task"
)

// KernelMap is the kernel's address → task map; the loader has it.
type KernelMap interface {
	Put(netip.Addr, *bpf.MetadTaskValue) error
	Delete(netip.Addr) error
	Entries() (map[netip.Addr]bpf.MetadTaskValue, error)
}

// entry is one address's owner.
type entry struct {
	ep   task.Endpoint
	view *View
}

// snapshot is what readers see: immutable.
type snapshot struct {
	byTag  map[uint32]*View
	byAddr map[netip.Addr]entry
}

// Table maps tags and addresses to tasks' views. Readers (Resolve, Await) are safe for
// concurrent use with each other and with the writers (Apply, PortGone), which take turns.
type Table struct {
	kernel KernelMap
	log    *zap.Logger

	snap    atomic.Pointer[snapshot]
	changed atomic.Pointer[chan struct{}] // closed at every publication, then replaced

	mu      sync.Mutex // guards what follows: the writers' state
	tasks   []*task.Task
	tags    map[string]uint32 // task ARN → tag
	nextTag uint32
	gone    map[int]bool // ifindexes that no longer exist: their endpoints claim nothing

	conflicts atomic.Uint64
}

// New returns a table that writes through to kernel. Entries already there (pinned by an earlier
// process) are kept in the kernel until Apply or PortGone replaces them; Adopt gives them a task.
func New(kernel KernelMap, log *zap.Logger) *Table {
	t := &Table{kernel: kernel, log: log, tags: map[string]uint32{}, gone: map[int]bool{}, nextTag: 1}
	t.snap.Store(&snapshot{})
	ch := make(chan struct{})
	t.changed.Store(&ch)
	return t
}

// Conflicts returns how often an address was refused because two ports claimed it.
func (t *Table) Conflicts() uint64 { return t.conflicts.Load() }

// Resolve returns the view of the task that a connection from addr with the mark tag belongs to,
// nil if there is none now. It takes no lock, makes no system call and does not allocate.
//
// A task's tag is proof by itself: the kernel saw the address, the port and the MAC. A port's tag
// (the task was not known at the time) holds for the task that has addr behind that very port. No tag
// (bridge device only) holds for the task that has addr: the reply leaves by that task's port,
// whoever asked, and a handshake completes nowhere else.
func (t *Table) Resolve(tag uint32, addr netip.Addr) *View {
	s := t.snap.Load()
	const port = uint32(bpf.MetadTagTAG_PORT)
	switch {
	case tag == uint32(bpf.MetadTagTAG_NONE):
		return s.byAddr[addr].view
	case tag&port != 0:
		if e, ok := s.byAddr[addr]; ok && uint32(e.ep.Ifindex) == tag&^port {
			return e.view
		}
		return nil
	default:
		return s.byTag[tag]
	}
}

// Await is Resolve that waits until the task appears or ctx ends; it returns nil then.
func (t *Table) Await(ctx context.Context, tag uint32, addr netip.Addr) *View {
	for {
		ch := *t.changed.Load() // before looking: a publication in between closes it
		if v := t.Resolve(tag, addr); v != nil {
			return v
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return nil
		}
	}
}

// Views returns every task's current view, ordered by ARN.
func (t *Table) Views() []*View {
	return slices.SortedFunc(maps.Values(t.snap.Load().byTag), func(a, b *View) int {
		return cmp.Compare(a.Task.ARN, b.Task.ARN)
	})
}

// Apply makes tasks the whole truth: writes their endpoints to the kernel, removes everybody
// else's, and publishes the views. A task whose pointer has not changed costs a comparison.
// An address claimed behind two ports is given to neither and counted. Errors of the kernel map are
// joined; the tasks they do not concern are published all the same.
func (t *Table) Apply(tasks []*task.Task) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tasks = tasks
	return t.publish()
}

// PortGone tells that the port with ifindex exists no more: its addresses are free at once,
// before the task that had them is heard of again.
func (t *Table) PortGone(ifindex int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.gone[ifindex] = true
	return t.publish()
}

func (t *Table) publish() error {
	old := t.snap.Load()
	next := &snapshot{
		byTag:  make(map[uint32]*View, len(t.tasks)),
		byAddr: make(map[netip.Addr]entry, len(t.tasks)),
	}
	tags := make(map[string]uint32, len(t.tasks))
	mentioned := map[int]bool{}
	refused := map[netip.Addr]bool{}
	for _, tk := range t.tasks {
		tag, ok := t.tags[tk.ARN]
		if !ok {
			tag = t.newTag()
		}
		tags[tk.ARN] = tag
		v := old.byTag[tag]
		if v == nil || v.Task != tk {
			v = newView(tag, tk)
		}
		next.byTag[tag] = v
		for _, ep := range tk.Endpoints {
			mentioned[ep.Ifindex] = true
			if t.gone[ep.Ifindex] {
				continue
			}
			if had, ok := next.byAddr[ep.Addr]; ok && had.ep != ep {
				refused[ep.Addr] = true
			}
			next.byAddr[ep.Addr] = entry{ep, v}
		}
	}
	for addr := range refused {
		delete(next.byAddr, addr)
		if _, was := old.byAddr[addr]; was || t.conflicts.Load() == 0 {
			t.log.Warn("address claimed behind two ports: given to neither", zap.Stringer("addr", addr))
		}
		t.conflicts.Add(1)
	}
	maps.DeleteFunc(t.gone, func(ifindex int, _ bool) bool { return !mentioned[ifindex] })
	t.tags = tags
	err := t.writeKernel(next)
	t.snap.Store(next)
	ch := make(chan struct{})
	close(*t.changed.Swap(&ch))
	return err
}

// writeKernel makes the kernel's map equal to next, removals first: an address must never have its
// old owner while the new one is being written.
func (t *Table) writeKernel(next *snapshot) error {
	have, err := t.kernel.Entries()
	if err != nil {
		return err
	}
	var errs []error
	for addr := range have {
		if _, ok := next.byAddr[addr]; !ok {
			errs = append(errs, t.kernel.Delete(addr))
		}
	}
	for addr, e := range next.byAddr {
		want := value(e)
		if got, ok := have[addr]; ok && got == want {
			continue
		}
		if err := t.kernel.Put(addr, &want); err != nil {
			errs = append(errs, err)
			delete(next.byAddr, addr)
		}
	}
	return errors.Join(errs...)
}

func value(e entry) bpf.MetadTaskValue {
	v := bpf.MetadTaskValue{Tag: e.view.Tag, Ifindex: uint32(e.ep.Ifindex), Mac: e.ep.MAC}
	for i := 0; i < len(e.view.Task.ID) && i < len(v.TaskId)-1; i++ {
		v.TaskId[i] = int8(e.view.Task.ID[i])
	}
	return v
}

// newTag returns a tag that no task has had since the process started.
func (t *Table) newTag() uint32 {
	for {
		tag := t.nextTag
		t.nextTag++
		if t.nextTag&uint32(bpf.MetadTagTAG_PORT) != 0 {
			t.nextTag = 1
		}
		if t.snap.Load().byTag[tag] == nil {
			return tag
		}
	}
}
