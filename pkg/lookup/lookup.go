// Package lookup answers one question: which task does this connection come from? It holds the
// reader's side of the kernel's ip_task map and keeps the two equal: what Apply publishes to
// readers it has written to the kernel first, and what it takes from the kernel it has taken from
// readers first. With the maps of containers by cgroup it answers too which container of the task.
package lookup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
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

// Limits of Await. A container that is not known yet waits with a few connections; more than that is
// somebody trying what happens.
const (
	maxWaiters        = 4096 // in all
	maxWaitersPerAddr = 128
)

// entry is one address's owner.
type entry struct {
	ep   task.Endpoint
	view *View
}

// snapshot is what readers see: immutable.
type snapshot struct {
	byTag      map[uint32]*View
	byAddr     map[netip.Addr]entry
	byEndpoint map[string]holder // by endpoint id
}

// Table maps tags, addresses and endpoint ids to tasks' views. Readers (Resolve, Await, Endpoint, Views) are safe for
// concurrent use with each other and with the writers (all else), which take turns.
type Table struct {
	kernel KernelMap
	log    *zap.Logger

	snap              atomic.Pointer[snapshot]
	conflicts         atomic.Uint64
	endpointConflicts atomic.Uint64
	turned            atomic.Uint64

	mu      sync.Mutex // guards what follows: the writers' state
	tasks   []*task.Task
	tags    map[string]uint32            // task ARN → tag
	nextTag uint32                       // the next to try
	written map[netip.Addr]bpf.TaskValue // what the kernel holds; nil: not read yet
	gone    map[int]bool                 // ifindexes that no longer exist: their endpoints claim nothing
	dispute map[netip.Addr]bool          // claimed twice, and told so
	copied  map[string]bool              // endpoint ids held twice, and told so
	joined  bool                         // a container uses the network of another task's

	containers containers
	failed     bool // the last publish left something undone

	wmu     sync.Mutex // guards what follows; taken after mu
	waits   map[waitKey]*wait
	waiting int                     // connections, in all waits
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
		waits:   map[waitKey]*wait{},
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
// (the task was not known at the time) holds for the task that has addr behind that very port. No tag
// (bridge device only) holds for the task that has addr: the reply leaves by that task's port,
// whoever asked, and a handshake completes nowhere else.
func (t *Table) Resolve(tag uint32, addr netip.Addr) *View {
	s := t.snap.Load()
	switch {
	case tag == bpf.TagNone:
		return s.byAddr[addr].view
	case tag&bpf.TagPort != 0:
		if e, ok := s.byAddr[addr]; ok && uint32(e.ep.Ifindex) == tag&^bpf.TagPort {
			return e.view
		}
		return nil
	default:
		return s.byTag[tag&bpf.TagTask] // the tag may name a container of the task too
	}
}

// Await is Resolve that waits until the task is there and Settled, or ctx ends. It returns what there
// is then, nil if nothing, and at once if too many wait already.
func (t *Table) Await(ctx context.Context, tag uint32, addr netip.Addr) *View {
	if v := t.Resolve(tag, addr); v.Settled(tag) {
		return v
	}
	key := waitKey{tag, addr}
	t.wmu.Lock()
	if v := t.Resolve(tag, addr); v.Settled(tag) { // published since; later publications will find us
		t.wmu.Unlock()
		return v
	}
	w := t.waits[key]
	if t.waiting >= maxWaiters || w != nil && w.n >= maxWaitersPerAddr {
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
	t.wmu.Unlock()

	select {
	case <-w.done:
	case <-ctx.Done():
	}

	t.wmu.Lock()
	defer t.wmu.Unlock()
	w.n--
	t.waiting--
	if w.n == 0 && t.waits[key] == w {
		delete(t.waits, key)
	}
	if w.view == nil {
		return t.Resolve(tag, addr)
	}
	return w.view
}

// Views returns every task's current view, ordered by ARN. A View carries the task's tag: it is what
// Restore wants back after a restart.
func (t *Table) Views() []*View {
	return slices.SortedFunc(maps.Values(t.snap.Load().byTag), func(a, b *View) int {
		return cmp.Compare(a.Task.ARN, b.Task.ARN)
	})
}

// Saved is one task of an earlier process.
type Saved struct {
	Tag  uint32
	Task *task.Task
}

// Restore publishes those of an earlier process's tasks that the pinned kernel map confirms: an entry
// with the tag, address, ifindex and MAC, or one of a container in the host's network. Nothing is
// written to the kernel. Entries without a task keep their tags until the first Apply, for the case that it brings the same task. Call it before Apply.
func (t *Table) Restore(saved []Saved) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.readKernel(); err != nil {
		return err
	}
	next := &snapshot{byTag: map[uint32]*View{}, byAddr: map[netip.Addr]entry{}}
	for _, s := range saved {
		for _, ep := range s.Task.Endpoints {
			if w, ok := t.written[ep.Addr]; !ok || w.Tag != s.Tag || !isAt(&w, ep) {
				continue
			}
			t.restore(next, s)
			next.byAddr[ep.Addr] = entry{ep, next.byTag[s.Tag]}
		}
		for _, c := range s.Task.Containers {
			if w, ok := t.containers.written[c.Cgroup.ID]; ok && w.host && w.tag&bpf.TagTask == s.Tag && w.task == cut(s.Task.ID) {
				t.restore(next, s)
			}
		}
	}
	t.complete(&snapshot{}, next)
	t.store(next)
	return nil
}

// restore adds a confirmed task of an earlier process to next, once.
func (t *Table) restore(next *snapshot, s Saved) {
	if next.byTag[s.Tag] != nil {
		return
	}
	next.byTag[s.Tag] = t.newView(s.Tag, s.Task)
	t.tags[s.Task.ARN] = s.Tag
	t.tasks = append(t.tasks, s.Task)
}

// newView returns a view of tk with its containers numbered.
func (t *Table) newView(tag uint32, tk *task.Task) *View {
	v := newView(tag, tk)
	t.containers.number(v)
	return v
}

// Apply makes tasks the whole truth: writes their endpoints to the kernel, removes everybody
// else's, and publishes the views. A task whose pointer has not changed costs a comparison.
//
// An address claimed by two tasks or behind two ports stays with the one that had it before, as long as that one
// claims it from the same port; if none had it, it is given to neither. Either is counted. An address
// that the kernel map refuses has no task until Retry or the next Apply succeeds with it; the first of these
// errors are joined, and whom they do not concern is published all the same.
func (t *Table) Apply(tasks []*task.Task) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tasks = tasks
	return t.publish()
}

// Retry applies the same tasks again if the last time something was left undone.
func (t *Table) Retry() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.failed {
		return nil
	}
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

// PortCame tells that a port with ifindex exists. A port that is gone may come back under its number:
// what tasks claim behind it holds again. The kernel goes on comparing address and MAC.
func (t *Table) PortCame(ifindex int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.gone[ifindex] {
		return nil
	}
	delete(t.gone, ifindex)
	return t.publish()
}

func (t *Table) publish() error {
	if err := t.readKernel(); err != nil {
		t.failed = true
		return err
	}
	old := t.snap.Load()
	next := t.next(old)
	// Readers lose what changes hands before the kernel gives it to another.
	if less, changed := without(old, next); changed {
		t.store(less)
	}
	err := t.writeKernel(old, next)
	// A container that is not named has its task all the same: no error.
	t.failed = !t.containers.write(old, next) || err != nil
	t.store(next)
	return err
}

// store publishes s and serves who waits for it.
func (t *Table) store(s *snapshot) {
	t.snap.Store(s)
	t.wmu.Lock()
	defer t.wmu.Unlock()
	t.tellChanged(s)
	for key, w := range t.waits {
		if v := t.Resolve(key.tag, key.addr); v.Settled(key.tag) {
			w.view = v
			close(w.done)
			delete(t.waits, key)
		}
	}
}

// next is what the tasks claim, less what cannot be granted.
func (t *Table) next(old *snapshot) *snapshot {
	next := &snapshot{
		byTag:  make(map[uint32]*View, len(t.tasks)),
		byAddr: make(map[netip.Addr]entry, len(t.tasks)),
	}
	tags := make(map[string]uint32, len(t.tasks))
	var used map[uint32]bool // made for the first new task
	mentioned := map[int]bool{}
	disputed := map[netip.Addr][]entry{}
	for _, tk := range t.tasks {
		tag, ok := t.tags[tk.ARN]
		if !ok {
			if used == nil {
				used = t.usedTags()
			}
			if tag, ok = t.inherited(tk); !ok || used[tag] {
				tag = t.newTag(used)
			}
			used[tag] = true
		}
		tags[tk.ARN] = tag
		v := old.byTag[tag]
		if v == nil || v.Task != tk {
			v = t.newView(tag, tk)
		}
		next.byTag[tag] = v
		for _, ep := range tk.Endpoints {
			if t.gone[ep.Ifindex] {
				mentioned[ep.Ifindex] = true
				continue
			}
			claim := entry{ep, v}
			switch had, ok := next.byAddr[ep.Addr]; {
			case !ok:
				next.byAddr[ep.Addr] = claim
			case had != claim && disputed[ep.Addr] == nil:
				disputed[ep.Addr] = []entry{had, claim}
			case had != claim:
				disputed[ep.Addr] = append(disputed[ep.Addr], claim)
			}
		}
	}
	t.settle(disputed, next)
	t.complete(old, next)
	maps.DeleteFunc(t.gone, func(ifindex int, _ bool) bool { return !mentioned[ifindex] })
	t.tags = tags
	return next
}

// usedTags are the tags that are not to be given to a new task. true: a task has it, false: an entry of nobody's.
func (t *Table) usedTags() map[uint32]bool {
	used := make(map[uint32]bool, len(t.tags)+len(t.written))
	for _, w := range t.written {
		used[w.Tag] = false
	}
	for _, w := range t.containers.written {
		used[w.tag&bpf.TagTask] = false
	}
	for _, tag := range t.tags {
		used[tag] = true
	}
	return used
}

// without returns old less the addresses and tags that next gives to another or nobody.
func without(old, next *snapshot) (less *snapshot, changed bool) {
	less = &snapshot{byTag: old.byTag, byAddr: old.byAddr, byEndpoint: next.byEndpoint}
	tags, addrs := false, false // they are copies
	for tag, v := range old.byTag {
		if n := next.byTag[tag]; n == nil || n.Task.ARN != v.Task.ARN {
			if !tags {
				less.byTag, tags = maps.Clone(old.byTag), true
			}
			delete(less.byTag, tag)
		}
	}
	for addr, e := range old.byAddr {
		if n, ok := next.byAddr[addr]; !ok || n.ep != e.ep || n.view.Tag != e.view.Tag {
			if !addrs {
				less.byAddr, addrs = maps.Clone(old.byAddr), true
			}
			delete(less.byAddr, addr)
		}
	}
	return less, tags || addrs
}

// writeKernel makes the kernel's map equal to next, removals first: they make room. What cannot be
// written is taken out of next. What old has was written.
func (t *Table) writeKernel(old, next *snapshot) error {
	var errs []error
	for addr := range t.written {
		if _, ok := next.byAddr[addr]; ok {
			continue
		}
		if err := t.kernel.Delete(addr); err != nil {
			errs = append(errs, err)
			continue // no reader believes it, and the next publish tries again
		}
		delete(t.written, addr)
	}
	for addr, e := range next.byAddr {
		if o, ok := old.byAddr[addr]; ok && o == e {
			continue
		}
		want := value(e)
		if got, ok := t.written[addr]; ok && got == want {
			continue
		}
		if err := t.kernel.Put(addr, &want); err != nil {
			errs = append(errs, fmt.Errorf("task %s: %w", e.view.Task.ID, err))
			delete(next.byAddr, addr)
			// What was there before is not this task's any more.
			if _, was := t.written[addr]; was {
				if err := t.kernel.Delete(addr); err != nil {
					errs = append(errs, err)
					continue
				}
				delete(t.written, addr)
			}
			continue
		}
		t.written[addr] = want
	}
	if more := len(errs) - maxErrors; more > 0 {
		errs = append(errs[:maxErrors], fmt.Errorf("and %d more", more))
	}
	return errors.Join(errs...)
}

// maxErrors is how many addresses an error names: a full map may have no room for thousands.
const maxErrors = 3

// readKernel finds out, once, what an earlier process left. Its tags are not given to anybody else.
func (t *Table) readKernel() error {
	if t.written != nil {
		return nil
	}
	entries, err := t.kernel.Entries()
	if err != nil {
		return err
	}
	if entries == nil {
		entries = map[netip.Addr]bpf.TaskValue{}
	}
	if err := t.containers.read(); err != nil {
		return err
	}
	t.written = entries
	for _, w := range entries {
		t.nextTag = max(t.nextTag, w.Tag+1)
	}
	for _, w := range t.containers.written {
		t.nextTag = max(t.nextTag, w.tag&bpf.TagTask+1)
	}
	return nil
}

// inherited returns the tag that an earlier process gave the task, if it is still where it was.
func (t *Table) inherited(tk *task.Task) (uint32, bool) {
	for _, ep := range tk.Endpoints {
		if w, ok := t.written[ep.Addr]; ok && isAt(&w, ep) && w.TaskId == taskID(tk.ID) {
			return w.Tag, true
		}
	}
	for _, c := range tk.Containers { // in the host's network
		if w, ok := t.containers.written[c.Cgroup.ID]; ok && w.host && w.task == cut(tk.ID) {
			return w.tag & bpf.TagTask, true
		}
	}
	return 0, false
}

// newTag returns a tag that no task has, and none has had for as long as possible.
func (t *Table) newTag(used map[uint32]bool) uint32 {
	for {
		tag := t.nextTag
		t.nextTag++
		if tag == bpf.TagNone || tag > bpf.TagTask {
			t.nextTag = 1
			continue
		}
		if _, ok := used[tag]; !ok {
			return tag
		}
	}
}

func isAt(w *bpf.TaskValue, ep task.Endpoint) bool {
	return w.Ifindex == uint32(ep.Ifindex) && w.Mac == ep.MAC
}

func value(e entry) bpf.TaskValue {
	return bpf.TaskValue{
		Tag:     e.view.Tag,
		Ifindex: uint32(e.ep.Ifindex),
		Mac:     e.ep.MAC,
		Levels:  e.view.levels,
		TaskId:  taskID(e.view.Task.ID),
	}
}

// taskID is the id as the kernel map shows it: cut if need be, and always ended by a NUL.
func taskID(id string) (text [len(bpf.TaskValue{}.TaskId)]int8) {
	for i := 0; i < len(id) && i < len(text)-1; i++ {
		text[i] = int8(id[i])
	}
	return text
}
