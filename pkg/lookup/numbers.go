package lookup

import (
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/task"
)

// ContainerMaps are the kernel's maps of containers by the id of their cgroup; the loader has them.
// Deleting a missing entry is no error.
type ContainerMaps interface {
	PutContainer(cgroup uint64, v *bpf.ContainerValue) error
	// of a container in the host's network
	PutHostContainer(cgroup uint64, v *bpf.ContainerValue) error
	DeleteContainer(cgroup uint64) error
	Containers() (own, host map[uint64]bpf.ContainerValue, err error)
}

// containers gives each container that has a cgroup a number in its task, and writes the numbers to
// the kernel's maps. A container has its number from the publication that first has its cgroup
// until the kernel's map no longer has that cgroup. So no packet gets a number that belongs to
// another container by then. Table.mu guards all but the counts.
type containers struct {
	kernel  ContainerMaps // nil: the kernel does not name containers
	log     *zap.Logger
	written map[uint64]named    // the kernel's entries, by cgroup
	numbers map[uint32]*numbers // by the task's tag
	// written may differ from what is published, for other reasons than the latest change
	behind bool
	full   bool // the kernel had no room, and that is logged

	provable, unprovable atomic.Int64
}

// named is an entry of the kernel's maps.
type named struct {
	tag      uint32
	host     bool   // in the map of the host's network
	task, id string // task id and container name as the map shows them
}

// numbers are those of one task's containers.
type numbers struct {
	byCgroup map[uint64]int
	last     int // the number that was given last
}

// NameContainers makes the kernel name the container of a connection, by the maps m. Without it
// only an address can identify a container. Call it before all other methods.
func (t *Table) NameContainers(m ContainerMaps) { t.containers.kernel = m }

// Provable returns how many running containers the kernel can name, and how many it cannot: no
// cgroup of their own is known, their task has too many containers or too many depths of cgroups,
// or the kernel's map is full.
func (t *Table) Provable() (yes, no int) {
	return int(t.containers.provable.Load()), int(t.containers.unprovable.Load())
}

// read reads the entries of an earlier process.
func (cs *containers) read() error {
	cs.written, cs.numbers, cs.behind = map[uint64]named{}, map[uint32]*numbers{}, true
	if cs.kernel == nil {
		return nil
	}
	own, host, err := cs.kernel.Containers()
	if err != nil {
		return err
	}
	for cgroup, v := range own {
		cs.inherit(cgroup, named{v.Tag, false, text(v.TaskId[:]), text(v.Container[:])})
	}
	for cgroup, v := range host {
		cs.inherit(cgroup, named{v.Tag, true, text(v.TaskId[:]), text(v.Container[:])})
	}
	return nil
}

func (cs *containers) inherit(cgroup uint64, w named) {
	cs.written[cgroup] = w
	n := cs.of(w.tag & bpf.TagTask)
	n.byCgroup[cgroup] = bpf.ContainerNumber(w.tag)
	n.last = max(n.last, bpf.ContainerNumber(w.tag))
}

// of returns the numbers of the task with the tag.
func (cs *containers) of(tag uint32) *numbers {
	n := cs.numbers[tag]
	if n == nil {
		n = &numbers{byCgroup: map[uint64]int{}}
		cs.numbers[tag] = n
	}
	return n
}

// number numbers the containers of v, which is not published yet.
func (cs *containers) number(v *View) {
	if cs.kernel == nil {
		return
	}
	for i := range v.Containers {
		c := &v.Containers[i]
		if c.Cgroup.ID <= rootCgroup || v.sharesCgroup(c) {
			continue
		}
		if c.number = cs.of(v.Tag).give(c.Cgroup.ID); c.number == 0 {
			continue
		}
		c.host = inHostNetwork(v.Task, c.Container, 0)
		for c.number >= len(v.byNumber) {
			v.byNumber = append(v.byNumber, nil)
		}
		v.byNumber[c.number] = c
	}
	v.setLevels()
}

// rootCgroup is the id of the root of cgroup v2. Without v2, every process has it.
const rootCgroup = 1

// sharesCgroup reports whether another container of the task has the cgroup of c too.
func (v *View) sharesCgroup(c *ContainerView) bool {
	return slices.ContainsFunc(v.Task.Containers, func(o *task.Container) bool {
		return o != c.Container && o.Cgroup.ID == c.Cgroup.ID
	})
}

// inHostNetwork reports whether c, one of t's containers, uses the host's network, by itself or as
// the guest of one that does.
func inHostNetwork(t *task.Task, c *task.Container, depth int) bool {
	of, guest := strings.CutPrefix(c.NetworkMode, "container:")
	if !guest || depth == maxDepth {
		return c.NetworkMode == "host"
	}
	return slices.ContainsFunc(t.Containers, func(o *task.Container) bool {
		return o != c && o.Is(of) && inHostNetwork(t, o, depth+1)
	})
}

// setLevels finds the depths of the cgroups that the kernel has to look at: the deeper one first,
// since a container's cgroup may be below another's. It looks at two; a container at a third one is
// not named.
func (v *View) setLevels() {
	var all []uint8
	for _, c := range v.byNumber {
		if c != nil && !c.host && !slices.Contains(all, c.Cgroup.Level) {
			all = append(all, c.Cgroup.Level)
		}
	}
	slices.Sort(all)
	slices.Reverse(all)
	copy(v.levels[:], all)
}

// provable reports whether the kernel looks where c's cgroup is.
func (v *View) provable(c *ContainerView) bool {
	return c.number != 0 && (c.host || slices.Contains(v.levels[:], c.Cgroup.Level))
}

// give returns the cgroup's number, 0 if there is none left. The one that was free longest comes
// first.
func (n *numbers) give(cgroup uint64) int {
	if had, ok := n.byCgroup[cgroup]; ok {
		return had
	}
	used := [bpf.Containers + 1]bool{}
	for _, number := range n.byCgroup {
		used[number] = true
	}
	for i := range bpf.Containers {
		if next := (n.last+i)%bpf.Containers + 1; !used[next] {
			n.byCgroup[cgroup], n.last = next, next
			return next
		}
	}
	return 0
}

// lose removes the cgroup from the kernel's maps, and then frees its number in the task with the
// tag. It reports whether it has done both.
func (cs *containers) lose(tag uint32, cgroup uint64) bool {
	if _, ok := cs.written[cgroup]; ok && cs.kernel.DeleteContainer(cgroup) != nil {
		return false
	}
	delete(cs.written, cgroup)
	if n := cs.numbers[tag]; n != nil {
		delete(n.byCgroup, cgroup)
	}
	return true
}

// write makes the kernel's maps equal to c.next, removals first, and reports whether it has
// succeeded. The maps have the containers of c.old, unless cs is behind.
func (cs *containers) write(c *change) (ok bool) {
	if cs.kernel == nil {
		return true
	}
	if cs.behind {
		ok = cs.writeAll(c.next)
	} else {
		ok = cs.writeChanged(c)
	}
	cs.behind = !ok
	cs.full = cs.full && !ok
	return ok
}

func (cs *containers) writeAll(next *snapshot) (ok bool) {
	ok = cs.purge(next)
	yes, no := 0, 0
	for _, v := range next.tags.all() {
		ok = cs.put(v) && ok
		y, n := v.count()
		yes, no = yes+y, no+n
	}
	maps.DeleteFunc(cs.numbers, func(tag uint32, n *numbers) bool {
		return next.byTag(tag) == nil && len(n.byCgroup) == 0
	})
	cs.provable.Store(int64(yes))
	cs.unprovable.Store(int64(no))
	return ok
}

func (cs *containers) writeChanged(c *change) (ok bool) {
	ok = true
	for tag := range c.tags {
		o, n := c.old.byTag(tag), c.next.byTag(tag)
		if o == nil || o == n {
			continue
		}
		for _, k := range o.byNumber {
			if k != nil && (n == nil || n.numberOf(k.Cgroup.ID) == 0) {
				ok = cs.lose(tag, k.Cgroup.ID) && ok
			}
		}
		yes, no := o.count()
		cs.provable.Add(-int64(yes))
		cs.unprovable.Add(-int64(no))
	}
	for tag := range c.tags {
		o, n := c.old.byTag(tag), c.next.byTag(tag)
		if n == nil {
			if of := cs.numbers[tag]; of != nil && len(of.byCgroup) == 0 {
				delete(cs.numbers, tag)
			}
			continue
		}
		if o == n {
			continue
		}
		ok = cs.put(n) && ok
		yes, no := n.count()
		cs.provable.Add(int64(yes))
		cs.unprovable.Add(int64(no))
	}
	return ok
}

// count returns how many running containers the kernel can name, and how many it cannot.
func (v *View) count() (yes, no int) {
	for i := range v.Containers {
		switch c := &v.Containers[i]; {
		case v.provable(c):
			yes++
		case c.KnownStatus == task.StatusRunning:
			no++
		}
	}
	return yes, no
}

// purge removes the entries that are not in next from the kernel's maps.
func (cs *containers) purge(next *snapshot) (ok bool) {
	ok = true
	for cgroup, w := range cs.written {
		tag := w.tag & bpf.TagTask
		if v := next.byTag(tag); v == nil ||
			v.numberOf(cgroup) != bpf.ContainerNumber(w.tag) {
			ok = cs.lose(tag, cgroup) && ok
		}
	}
	return ok
}

// put writes v's containers to the kernel's maps. A cgroup that two tasks claim is given to
// neither.
func (cs *containers) put(v *View) (ok bool) {
	ok = true
	for _, c := range v.byNumber {
		if c == nil {
			continue
		}
		want := named{bpf.ContainerTag(v.Tag, c.number), c.host, cut(v.Task.ID),
			cut(c.Name)}
		had, written := cs.written[c.Cgroup.ID]
		if written && had == want {
			continue
		}
		if written && (had.tag != want.tag || had.host != want.host) {
			if ok = cs.lose(had.tag&bpf.TagTask, c.Cgroup.ID) &&
				ok; had.tag != want.tag {
				continue
			}
		}
		put := cs.kernel.PutContainer
		if want.host {
			put = cs.kernel.PutHostContainer
		}
		if err := put(c.Cgroup.ID, want.value()); err != nil {
			if ok = false; !cs.full {
				cs.log.Warn("cannot write containers to the kernel: only an "+
					"address may identify them",
					zap.Error(err))
			}
			cs.full = true
			continue
		}
		cs.written[c.Cgroup.ID] = want
	}
	return ok
}

func (w named) value() *bpf.ContainerValue {
	v := &bpf.ContainerValue{Tag: w.tag, TaskId: taskID(w.task)}
	for i := range len(w.id) {
		v.Container[i] = int8(w.id[i])
	}
	return v
}

// cut returns s as the kernel's maps show it: with room for the NUL that ends it.
func cut(s string) string { return s[:min(len(s), len(bpf.ContainerValue{}.Container)-1)] }

// text returns the text of a NUL-padded array.
func text(a []int8) string {
	b := make([]byte, 0, len(a))
	for _, ch := range a {
		if ch == 0 {
			break
		}
		b = append(b, byte(ch))
	}
	return string(b)
}
