package lookup

import (
	"errors"
	"fmt"
	"maps"
	"testing"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/task"
)

// fakeContainers are the kernel's maps of containers, with room for max in all, 0: any number.
type fakeContainers struct {
	own, host map[uint64]bpf.ContainerValue
	max       int
	stuck     bool // nothing can be deleted
	onPut     func(cgroup uint64, v *bpf.ContainerValue)
}

func newFakeContainers() *fakeContainers {
	return &fakeContainers{own: map[uint64]bpf.ContainerValue{},
		host: map[uint64]bpf.ContainerValue{}}
}

func (k *fakeContainers) put(m map[uint64]bpf.ContainerValue, cgroup uint64,
	v *bpf.ContainerValue) error {
	if _, ok := m[cgroup]; !ok && k.max > 0 && len(k.own)+len(k.host) >= k.max {
		return errFull
	}
	if k.onPut != nil {
		k.onPut(cgroup, v)
	}
	m[cgroup] = *v
	return nil
}

func (k *fakeContainers) PutContainer(cgroup uint64, v *bpf.ContainerValue) error {
	return k.put(k.own, cgroup, v)
}

func (k *fakeContainers) PutHostContainer(cgroup uint64, v *bpf.ContainerValue) error {
	return k.put(k.host, cgroup, v)
}

func (k *fakeContainers) DeleteContainer(cgroup uint64) error {
	if k.stuck {
		return errors.New("stuck")
	}
	delete(k.own, cgroup)
	delete(k.host, cgroup)
	return nil
}

func (k *fakeContainers) Containers() (own, host map[uint64]bpf.ContainerValue, err error) {
	return maps.Clone(k.own), maps.Clone(k.host), nil
}

func newProver(k *fakeKernel, c *fakeContainers) *Table {
	t := New(k, zap.NewNop())
	t.NameContainers(c)
	return t
}

// in is c, running in the cgroup.
func in(c *task.Container, cgroup uint64, level uint8) *task.Container {
	c.Cgroup = task.Cgroup{ID: cgroup, Level: level}
	return c
}

// sender is whom the kernel's maps and the table together say that a socket of the cgroup at the
// address is: as the program on the port does it.
func sender(k *fakeKernel, c *fakeContainers, table *Table, cgroup uint64, n int) (string, string) {
	t := k.m[addr(n)]
	tag := t.Tag
	if v, ok := c.own[cgroup]; ok && v.Tag&^bpf.TagContainer == t.Tag &&
		t.Levels != [2]uint8{} {
		tag = v.Tag
	}
	return whose(table, tag, n)
}

func whose(table *Table, tag uint32, n int) (string, string) {
	v := table.Resolve(tag, addr(n))
	if v == nil {
		return "", ""
	}
	cv := v.Sender(tag, addr(n))
	if cv == nil {
		return v.Task.ID, ""
	}
	return v.Task.ID, cv.Name
}

// Of several containers behind one address each is told apart by its cgroup. A process of none of
// them is the task's, a container of another task is not believed, and what a container that has
// ended has sent names nobody.
func TestSender(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	pause := newContainer("9")
	pause.Type = task.TypeCNIPause
	a, b, other := in(newContainer("a"), 100, 3), in(newContainer("b"), 101, 3),
		in(newContainer("c"), 102, 2)
	one := with(newTask("1", at(1, pause)), pause, a, b)
	two := with(newTask("2", at(2, other)), other)
	apply(t, table, one, two)
	f := func(cgroup uint64, n int, wantTask, want string) {
		t.Helper()
		if tk, name := sender(k, c, table, cgroup, n); tk != wantTask || name != want {
			t.Errorf("cgroup %d at address %d: got %q of %q, want %q of %q", cgroup, n,
				name, tk, want, wantTask)
		}
	}
	f(100, 1, "1", "a")
	f(101, 1, "1", "b")
	f(7, 1, "1", "")
	f(102, 1, "1", "")
	f(102, 2, "2", "c")
	f(100, 2, "2", "c") // the only one that has the address
	if l := k.m[addr(1)].Levels; l != [2]uint8{3, 0} {
		t.Errorf("got levels %v", l)
	}
	if v := c.own[100]; text(v.Container[:]) != "a" || text(v.TaskId[:]) != "1" {
		t.Errorf("got %q of %q in the kernel", text(v.Container[:]), text(v.TaskId[:]))
	}

	tag := c.own[100].Tag
	apply(t, table, with(newTask("1", at(1, pause)), pause, stopped(newContainer("a")), b), two)
	if _, ok := c.own[100]; ok {
		t.Error("the cgroup of a container that has ended is still in the kernel")
	}
	if tk, name := whose(table, tag, 1); tk != "1" || name != "" {
		t.Errorf("a socket of a container that has ended: got %q of %q", name, tk)
	}
	f(101, 1, "1", "b")
	// the pause container's cgroup is not known
	if yes, no := table.Provable(); yes != 2 || no != 1 {
		t.Errorf("got %d and %d provable", yes, no)
	}
	apply(t, table, two)
	if len(c.own) != 1 {
		t.Errorf("got %d containers in the kernel, want that of task 2", len(c.own))
	}
}

// The kernel has a container's cgroup before a reader sees its number, and has lost it before the
// number is another's.
func TestContainerNumberHasOneOwner(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	c.onPut = func(cgroup uint64, v *bpf.ContainerValue) {
		for other, o := range c.own {
			if other != cgroup && o.Tag == v.Tag {
				t.Errorf("cgroup %d gets the tag %#x, which is %d's", cgroup, v.Tag,
					other)
			}
		}
		if tk, name := whose(table, v.Tag, 1); name != "" {
			t.Errorf("cgroup %d: readers see %q of %q by its new number", cgroup, name,
				tk)
		}
	}
	const alive = 100
	numbers := map[uint64]uint32{}
	for step := range uint64(3 * bpf.Containers) {
		tk := newTask("1", endpoint(1, 1))
		for i := range uint64(alive) {
			ct := newContainer(fmt.Sprintf("%016d", step+i))
			with(tk, append(tk.Containers, in(ct, 1000+step+i, 2))...)
		}
		apply(t, table, tk)
		if len(c.own) != alive {
			t.Fatalf("step %d: got %d containers in the kernel, want %d", step,
				len(c.own), alive)
		}
		for cgroup, v := range c.own {
			if had, ok := numbers[cgroup]; ok && had != v.Tag {
				t.Fatalf("cgroup %d: had tag %#x, now %#x", cgroup, had, v.Tag)
			}
			numbers[cgroup] = v.Tag
		}
		for back := range min(step, uint64(bpf.Containers-alive-1)) {
			if newest := 1000 + step + alive - 1; numbers[newest] == numbers[1000+
				step-1-back] {
				t.Fatalf("step %d: tag %#x is given again too soon", step,
					numbers[newest])
			}
		}
	}
}

// What cannot be deleted keeps its number until it can.
func TestContainerNumberOfStuckEntry(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	apply(t, table, with(newTask("1", endpoint(1, 1)), in(newContainer("a"), 100, 2)))
	tag := c.own[100].Tag
	c.stuck = true
	for i, name := range []string{"b", "d"} {
		// so that the first number would come next
		table.containers.of(tag & bpf.TagTask).last = bpf.Containers
		apply(t, table, with(newTask("1", endpoint(1, 1)), in(newContainer(name), uint64(101+i), 2)))
		if v := c.own[uint64(101+i)]; v.Tag == tag || v.Tag == 0 {
			t.Errorf("%s: got tag %#x, which the kernel still gives to the old "+
				"container", name, v.Tag)
		}
	}
	c.stuck = false
	if err := table.Retry(); err != nil || len(c.own) != 1 {
		t.Errorf("after a retry: got %v, %v", c.own, err)
	}
}

// A task can have more containers than there are numbers: the others are not named, and counted. So
// it is when the kernel's map is full, until there is room.
func TestTooManyContainers(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	tk := newTask("1", endpoint(1, 1))
	for i := range uint64(130) {
		with(tk, append(tk.Containers, in(newContainer(fmt.Sprintf("%016d", i)), 1000+i, 2))...)
	}
	apply(t, table, tk)
	if yes, no := table.Provable(); yes != bpf.Containers || no != 3 ||
		len(c.own) != bpf.Containers {
		t.Errorf("got %d and %d provable, %d in the kernel", yes, no, len(c.own))
	}

	k, c = newFakeKernel(), newFakeContainers()
	table = newProver(k, c)
	c.max = 1
	apply(t, table, with(newTask("1", endpoint(1, 1)), in(newContainer("a"), 100, 2), in(newContainer("b"), 101, 2)))
	if len(k.m) != 1 || len(c.own) != 1 {
		t.Errorf("full: got %d addresses and %d containers", len(k.m), len(c.own))
	}
	c.max = 2
	if err := table.Retry(); err != nil || len(c.own) != 2 {
		t.Errorf("room again: got %d containers, %v", len(c.own), err)
	}
}

// A cgroup that two containers have is neither's, nor is the root's, and of three depths two are
// looked at.
func TestDoubtfulCgroups(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	apply(t, table, with(newTask("1", endpoint(1, 1)), in(newContainer("a"), 100, 2), in(newContainer("b"), 100, 2), in(newContainer("c"), 1, 0)))
	if len(c.own) != 0 {
		t.Errorf("got %v", c.own)
	}
	apply(t, table, with(newTask("2", endpoint(1, 1)), in(newContainer("a"), 200, 2), in(newContainer("b"), 201, 4), in(newContainer("c"), 202, 3)))
	if l := k.m[addr(1)].Levels; l != [2]uint8{4, 3} {
		t.Errorf("got levels %v, want the deeper ones", l)
	}
	if yes, no := table.Provable(); yes != 2 || no != 1 {
		t.Errorf("got %d and %d provable", yes, no)
	}
}

// A container in the host's network has no address, and a task by its cgroup; so has its guest.
func TestHostContainers(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	a, g := in(newContainer("a"), 100, 2), in(newContainer("b"), 101, 2)
	a.NetworkMode = "host"
	host := with(newTask("1"), a, joining(g, a))
	apply(t, table, host)
	if len(c.own) != 0 || len(c.host) != 2 {
		t.Fatalf("got %v and %v", c.own, c.host)
	}
	tag := c.host[100].Tag
	if tk, name := whose(table, tag, 99); tk != "1" || name != "a" {
		t.Errorf("got %q of %q", name, tk)
	}
	if tk, name := whose(table, c.host[101].Tag, 99); tk != "1" || name != "b" {
		t.Errorf("guest: got %q of %q", name, tk)
	}

	// The next process has the same, with the old one's snapshot or without.
	next := newProver(k, c)
	if err := next.Restore([]Saved{{tag & bpf.TagTask, host}}); err != nil {
		t.Fatal(err)
	}
	if tk, name := whose(next, tag, 99); tk != "1" || name != "a" {
		t.Errorf("restored: got %q of %q", name, tk)
	}
	next = newProver(k, c)
	apply(t, next, with(newTask("0", endpoint(1, 1)), newContainer("d")), host)
	if c.host[100].Tag != tag {
		t.Errorf("got tag %#x, had %#x", c.host[100].Tag, tag)
	}
	apply(t, next)
	if len(c.host) != 0 {
		t.Errorf("got %v", c.host)
	}
}

// A restart keeps each number, whether the snapshot has the container or not, and takes away what
// is gone.
func TestRestoreNumbers(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	a, b, d := in(newContainer("a"), 100, 2), in(newContainer("b"), 101, 2),
		in(newContainer("d"), 103, 2)
	before := with(newTask("1", endpoint(1, 1)), a, b, d)
	apply(t, table, before)
	tags := maps.Clone(c.own)
	tag := k.m[addr(1)].Tag

	next := newProver(k, c)
	old := with(newTask("1", endpoint(1, 1)), a) // the snapshot is of before b
	if err := next.Restore([]Saved{{tag, old}}); err != nil {
		t.Fatal(err)
	}
	if tk, name := whose(next, tags[101].Tag, 1); tk != "1" || name != "" {
		t.Errorf("not restored: got %q of %q", name, tk)
	}
	e := in(newContainer("e"), 104, 2)
	apply(t, next, with(newTask("1", endpoint(1, 1)), a, b, e))
	for _, cgroup := range []uint64{100, 101} {
		if c.own[cgroup].Tag != tags[cgroup].Tag {
			t.Errorf("cgroup %d: got tag %#x, had %#x", cgroup, c.own[cgroup].Tag,
				tags[cgroup].Tag)
		}
	}
	if _, ok := c.own[103]; ok || c.own[104].Tag == tags[103].Tag {
		t.Errorf("got %v", c.own)
	}
	if tk, name := whose(next, c.own[104].Tag, 1); tk != "1" || name != "e" {
		t.Errorf("got %q of %q", name, tk)
	}
}

// A connection that names a container that readers do not see yet is worth a wait; one without is
// not.
func TestSettled(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	apply(t, table, with(newTask("1", endpoint(1, 1)), in(newContainer("a"), 100, 2)))
	tag := k.m[addr(1)].Tag
	v := table.Resolve(tag, addr(1))
	for n, want := range []bool{true, true, false} {
		if got := v.Settled(bpf.ContainerTag(tag, n)); got != want {
			t.Errorf("number %d: got %v, want %v", n, got, want)
		}
	}
	if (*View)(nil).Settled(tag) {
		t.Error("no view is settled")
	}
	if !v.Settled(portTag(0x01000001)) {
		t.Error("a port's tag numbers no container")
	}
}

// The container that a tag names is found without an allocation.
func TestSenderAllocs(t *testing.T) {
	k, c := newFakeKernel(), newFakeContainers()
	table := newProver(k, c)
	apply(t, table, with(newTask("1", endpoint(1, 1)), in(newContainer("a"), 100, 2), in(newContainer("b"), 101, 2)))
	tag, from := c.own[101].Tag, addr(1)
	if n := testing.AllocsPerRun(100, func() {
		if table.Resolve(tag, from).Sender(tag, from).Name != "b" {
			t.Error("not found")
		}
	}); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}
