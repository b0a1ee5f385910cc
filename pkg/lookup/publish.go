package lookup

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"metad/bpf"
	"metad/pkg/task"
)

// Saved is one task of an earlier process.
type Saved struct {
	Tag  uint32
	Task *task.Task
}

// Restore publishes those of an earlier process's tasks that the pinned kernel map confirms: an
// entry with the tag, address, ifindex and MAC, or one of a container in the host's network.
// Nothing is written to the kernel. Entries without a task keep their tags until the first Apply,
// for the case that it brings the same task. Call it before Apply.
func (t *Table) Restore(saved []Saved) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.readKernel(); err != nil {
		return err
	}
	c := t.newChange()
	for _, s := range saved {
		if t.confirmed(s) {
			t.restore(c, s)
		}
	}
	slices.SortFunc(t.shown, func(a, b *task.Task) int { return cmp.Compare(a.ARN, b.ARN) })
	t.tasks = t.shown
	t.complete(c)
	t.indexEndpoints(c)
	for _, v := range c.next.tags.all() {
		for _, ep := range v.Task.Endpoints {
			if w, ok := t.written[ep.Addr]; ok && w.Tag == v.Tag && isAt(&w, ep) {
				c.next.addrs.set(addrPart(ep.Addr), ep.Addr, entry{ep, v})
			}
		}
	}
	t.store(c.next)
	return nil
}

// confirmed reports whether the kernel's maps have the task as it was saved.
func (t *Table) confirmed(s Saved) bool {
	return slices.ContainsFunc(s.Task.Endpoints, func(ep task.Endpoint) bool {
		w, ok := t.written[ep.Addr]
		return ok && w.Tag == s.Tag && isAt(&w, ep)
	}) || slices.ContainsFunc(s.Task.Containers, func(k *task.Container) bool {
		w, ok := t.containers.written[k.Cgroup.ID]
		return ok && w.host && w.tag&bpf.TagTask == s.Tag && w.task == cut(s.Task.ID)
	})
}

// restore adds a confirmed task of an earlier process to c, once.
func (t *Table) restore(c *change, s Saved) {
	if _, twice := t.tags[s.Task.ARN]; twice || c.next.byTag(s.Tag) != nil {
		return
	}
	c.next.tags.set(tagPart(s.Tag), s.Tag, t.newView(s.Tag, s.Task))
	c.tags[s.Tag] = true
	t.tags[s.Task.ARN] = s.Tag
	t.shown = append(t.shown, s.Task)
	t.claims.add(s.Tag, s.Task)
	c.mentions(s.Task)
}

// newView returns a view of tk with its containers numbered.
func (t *Table) newView(tag uint32, tk *task.Task) *View {
	v := newView(tag, tk)
	t.containers.number(v)
	return v
}

// Apply publishes tasks, the complete set, ordered by ARN: it writes their endpoints to the kernel,
// removes all others, and publishes the views. The work depends on the number of changed tasks; a
// task with an unchanged pointer costs a comparison.
//
// An address that two tasks claim, or that is behind two ports, stays with the task that had it
// before, as long as that one claims it from the same port. If neither had it, neither gets it.
// Both cases are counted. An address that the kernel map refuses has no task until Retry or the
// next Apply succeeds with it. The first of these errors are joined; all other tasks are published.
func (t *Table) Apply(tasks []*task.Task) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	first := !t.applied
	t.tasks, t.applied = tasks, true
	return t.publish(first, nil)
}

// Retry applies the same tasks again if the last publication was not complete.
func (t *Table) Retry() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.failed {
		return nil
	}
	return t.publish(true, nil)
}

// PortGone reports that the port with ifindex no longer exists. Its addresses are free at once,
// before the next set of tasks.
func (t *Table) PortGone(ifindex int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	addrs := t.claims.ports[ifindex]
	if len(addrs) == 0 {
		return nil
	}
	t.gone[ifindex] = true
	return t.publish(false, addrs)
}

// PortCame reports that a port with ifindex exists. A deleted port may come back with its number:
// then the tasks' claims behind it count again. The kernel still compares address and MAC.
func (t *Table) PortCame(ifindex int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.gone[ifindex] {
		return nil
	}
	delete(t.gone, ifindex)
	return t.publish(false, t.claims.ports[ifindex])
}

// change is one publication: the snapshots before and after it, and the keys at which they may
// differ.
type change struct {
	old, next *snapshot
	tags      map[uint32]bool
	addrs     map[netip.Addr]bool
	ids       map[string]bool // endpoint ids

	used map[uint32]bool // see newTag
}

func (t *Table) newChange() *change {
	old := t.snap.Load()
	return &change{old: old, next: old.next(),
		tags: map[uint32]bool{}, addrs: map[netip.Addr]bool{}, ids: map[string]bool{}}
}

// mentions adds the claims that a task has, or had, to the keys that may change.
func (c *change) mentions(tk *task.Task) {
	for _, ep := range tk.Endpoints {
		c.addrs[ep.Addr] = true
	}
	for _, k := range tk.Containers {
		if holdsEndpoint(k) {
			c.ids[k.EndpointID] = true
		}
	}
}

// publish brings the readers' snapshot and the kernel's map to t.tasks. addrs are addresses whose
// owner may change although their task has not. If whole, everything is written again.
func (t *Table) publish(whole bool, addrs []netip.Addr) error {
	if err := t.readKernel(); err != nil {
		t.failed = true
		return err
	}
	c := t.newChange()
	for _, a := range addrs {
		c.addrs[a] = true
	}
	t.take(c)
	if whole || t.failed {
		t.doubt(c)
	}
	t.complete(c)
	t.settle(c)
	t.indexEndpoints(c)
	// Readers lose an address that gets another owner before the kernel gives it to that one.
	if less, changed := c.less(); changed {
		t.store(less)
	}
	err := t.writeKernel(c)
	// A container without a number is still answered as its task. That is no error.
	t.failed = t.applied && !t.containers.write(c) || err != nil
	t.store(c.next)
	return err
}

// store publishes s and wakes the requests that wait for it.
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

// take makes views and claims from t.tasks.
func (t *Table) take(c *change) {
	var fresh []*task.Task // after all that have ended: see tagFor
	for was, is := range task.Diff(t.shown, t.tasks) {
		if was != nil {
			t.forget(c, was, is == nil)
		}
		if is == nil {
			continue
		}
		if tag, ok := t.tags[is.ARN]; ok {
			t.add(c, tag, is)
		} else {
			fresh = append(fresh, is)
		}
	}
	for _, is := range fresh {
		tag := t.tagFor(c, is)
		t.tags[is.ARN] = tag
		t.add(c, tag, is)
	}
	t.shown = t.tasks
	maps.DeleteFunc(t.gone, func(ifindex int, _ bool) bool {
		return len(t.claims.ports[ifindex]) == 0
	})
}

// add adds the view and the claims of tk, whose tag is tag.
func (t *Table) add(c *change, tag uint32, tk *task.Task) {
	c.next.tags.set(tagPart(tag), tag, t.newView(tag, tk))
	c.tags[tag] = true
	t.claims.add(tag, tk)
	c.mentions(tk)
}

// forget removes the claims of was. If ended, its tag is free for another task after this change.
func (t *Table) forget(c *change, was *task.Task, ended bool) {
	tag := t.tags[was.ARN]
	t.claims.remove(tag, was)
	c.mentions(was)
	if ended {
		c.next.tags.delete(tagPart(tag), tag)
		c.tags[tag] = true
		delete(t.tags, was.ARN)
	}
}

// doubt adds all keys to c.
func (t *Table) doubt(c *change) {
	for _, s := range []*snapshot{c.old, c.next} {
		for tag := range s.tags.all() {
			c.tags[tag] = true
		}
		for addr := range s.addrs.all() {
			c.addrs[addr] = true
		}
	}
	for addr := range t.claims.addrs {
		c.addrs[addr] = true
	}
	for addr := range t.written {
		c.addrs[addr] = true
	}
	for id := range t.claims.ids {
		c.ids[id] = true
	}
}

// less returns old without the addresses and tags that have another owner, or none, in next.
func (c *change) less() (less *snapshot, changed bool) {
	less = c.old.next()
	less.endpoints = c.next.endpoints.next()
	for tag := range c.tags {
		if v, n := c.old.byTag(tag), c.next.byTag(tag); v != nil &&
			(n == nil || !continues(v.Task, n.Task)) {
			less.tags.delete(tagPart(tag), tag)
			changed = true
		}
	}
	for addr := range c.addrs {
		e, ok := c.old.byAddr(addr)
		if n, is := c.next.byAddr(addr); ok &&
			(!is || n.ep != e.ep || n.view.Tag != e.view.Tag) {
			less.addrs.delete(addrPart(addr), addr)
			changed = true
		}
	}
	return less, changed
}

// writeKernel makes the kernel's map equal to next. Removals come first, because they make room. An
// address that cannot be written is removed from next. The map has the addresses of old.
func (t *Table) writeKernel(c *change) error {
	var errs []error
	for addr := range c.addrs {
		if _, ok := c.next.byAddr(addr); ok {
			continue
		}
		if _, ok := t.written[addr]; !ok {
			continue
		}
		if err := t.kernel.Delete(addr); err != nil {
			errs = append(errs, err)
			continue // no reader uses it, and the next publish tries again
		}
		delete(t.written, addr)
	}
	for addr := range c.addrs {
		e, ok := c.next.byAddr(addr)
		if !ok {
			continue
		}
		if o, ok := c.old.byAddr(addr); ok && o == e {
			continue
		}
		errs = append(errs, t.put(c, addr, e)...)
	}
	if more := len(errs) - maxErrors; more > 0 {
		errs = append(errs[:maxErrors], fmt.Errorf("and %d more", more))
	}
	return errors.Join(errs...)
}

// put writes one address to the kernel's map. If that fails, it removes the address from next.
func (t *Table) put(c *change, addr netip.Addr, e entry) (errs []error) {
	want := value(e)
	got, was := t.written[addr]
	if was && got == want {
		return nil
	}
	err := t.kernel.Put(addr, &want)
	if err == nil {
		t.written[addr] = want
		return nil
	}
	errs = append(errs, fmt.Errorf("task %s: %w", e.view.Task.ID, err))
	c.next.addrs.delete(addrPart(addr), addr)
	if !was {
		return errs
	}
	// The entry from before does not belong to this task any more.
	if err := t.kernel.Delete(addr); err != nil {
		return append(errs, err)
	}
	delete(t.written, addr)
	return errs
}

// maxErrors is the number of addresses that an error names: a full map may refuse thousands.
const maxErrors = 3

// readKernel reads, once, the entries of an earlier process. No other task gets their tags.
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

// tagFor returns the tag of a task that has none: the one that it had under another ARN, as when
// the cluster's name in made-up ARNs changes, or under an earlier process, or a new one. The tag of
// a task that has just ended is free only for a task with all of its containers: a connection with
// the tag is one of theirs.
func (t *Table) tagFor(c *change, tk *task.Task) uint32 {
	tag, ok := t.inherited(tk)
	if !ok || c.next.byTag(tag) != nil {
		return t.newTag(c)
	}
	if old := c.old.byTag(tag); old != nil && !continues(old.Task, tk) {
		return t.newTag(c)
	}
	return tag
}

// continues reports whether next is old, or has all its containers.
func continues(old, next *task.Task) bool {
	return old.ARN == next.ARN || len(old.Containers) > 0 &&
		!slices.ContainsFunc(old.Containers, func(o *task.Container) bool {
			return !slices.ContainsFunc(next.Containers, func(n *task.Container) bool {
				return n.ID == o.ID
			})
		})
}

// inherited returns the tag that the task has in the kernel's map, if it is still where it was.
func (t *Table) inherited(tk *task.Task) (uint32, bool) {
	for _, ep := range tk.Endpoints {
		if w, ok := t.written[ep.Addr]; ok && isAt(&w, ep) && w.TaskId == taskID(tk.ID) {
			return w.Tag, true
		}
	}
	for _, c := range tk.Containers { // in the host's network
		if w, ok := t.containers.written[c.Cgroup.ID]; ok && w.host &&
			w.task == cut(tk.ID) {
			return w.tag & bpf.TagTask, true
		}
	}
	return 0, false
}

// newTag returns a tag that no task has, and none has had for as long as possible.
func (t *Table) newTag(c *change) uint32 {
	for {
		tag := t.nextTag
		t.nextTag++
		if tag == bpf.TagNone || tag > bpf.TagTask {
			t.nextTag, t.wrapped = 1, true
			continue
		}
		if !t.wrapped { // all that were given are lower
			return tag
		}
		if c.used == nil {
			c.used = t.usedTags(c)
		}
		if !c.used[tag] {
			c.used[tag] = true
			return tag
		}
	}
}

// usedTags are the tags of all tasks, including those that this change ends, and of all entries of
// the kernel's maps.
func (t *Table) usedTags(c *change) map[uint32]bool {
	used := make(map[uint32]bool, len(t.tags)+len(t.written))
	for _, w := range t.written {
		used[w.Tag] = true
	}
	for _, w := range t.containers.written {
		used[w.tag&bpf.TagTask] = true
	}
	for _, tag := range t.tags {
		used[tag] = true
	}
	for tag := range c.old.tags.all() {
		used[tag] = true
	}
	return used
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

// taskID returns the id as the kernel map has it: cut if it is too long, and ended by a NUL.
func taskID(id string) (text [len(bpf.TaskValue{}.TaskId)]int8) {
	for i := 0; i < len(id) && i < len(text)-1; i++ {
		text[i] = int8(id[i])
	}
	return text
}
