package lookup

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"metad/bpf"
	"metad/internal/expect"
	"metad/pkg/task"
)

var errFull = errors.New("full")

// fakeKernel is a map with room for max entries, 0: any number. refuse makes Put fail.
type fakeKernel struct {
	m      map[netip.Addr]bpf.TaskValue
	max    int
	refuse func(netip.Addr) error
	reads  int
	onPut  func(netip.Addr)
}

func newFakeKernel() *fakeKernel { return &fakeKernel{m: map[netip.Addr]bpf.TaskValue{}} }

func (k *fakeKernel) Put(a netip.Addr, v *bpf.TaskValue) error {
	if k.onPut != nil {
		k.onPut(a)
	}
	if k.refuse != nil {
		if err := k.refuse(a); err != nil {
			return err
		}
	}
	if _, had := k.m[a]; !had && k.max != 0 && len(k.m) >= k.max {
		return errFull
	}
	k.m[a] = *v
	return nil
}

func (k *fakeKernel) Delete(a netip.Addr) error { delete(k.m, a); return nil }

func (k *fakeKernel) Entries() (map[netip.Addr]bpf.TaskValue, error) {
	k.reads++
	return maps.Clone(k.m), nil
}

func addr(n int) netip.Addr { return netip.AddrFrom4([4]byte{169, 254, 172, byte(n)}) }

func endpoint(n, ifindex int) task.Endpoint {
	return task.Endpoint{Addr: addr(n), Ifindex: ifindex,
		MAC: [6]byte{2, 0, 0, 0, 0, byte(ifindex)}}
}

func newTask(name string, eps ...task.Endpoint) *task.Task {
	return &task.Task{ID: name, ARN: "arn:aws:ecs:eu-west-1:1:task/c/" + name, Endpoints: eps}
}

func portTag(ifindex int) uint32 { return bpf.TagPort | uint32(ifindex) }

func apply(t *testing.T, table *Table, tasks ...*task.Task) {
	t.Helper()
	if err := table.Apply(slices.SortedFunc(slices.Values(tasks), byARN)); err != nil {
		t.Fatal(err)
	}
}

func TestResolve(t *testing.T) {
	k := newFakeKernel()
	table := New(k, zap.NewNop())
	a, b := newTask("a", endpoint(2, 12)), newTask("b", endpoint(3, 13), endpoint(4, 13))
	apply(t, table, a, b)
	f := func(tag uint32, from netip.Addr, want *task.Task) {
		t.Helper()
		v := table.Resolve(tag, from)
		if (v == nil) != (want == nil) || v != nil && v.Task != want {
			t.Errorf("Resolve(%#x, %s): got %v, want %v", tag, from, v, want)
		}
	}
	tagA, tagB := k.m[addr(2)].Tag, k.m[addr(3)].Tag
	f(tagA, addr(2), a)
	f(tagB, addr(3), b)
	f(tagB, addr(4), b)
	f(tagA, addr(99), a)                     // the tag is proof, the address was checked with it
	f(bpf.ContainerTag(tagA, 5), addr(2), a) // of one of its containers
	f(tagA+tagB+1, addr(2), nil)
	f(portTag(12), addr(2), a)
	f(portTag(13), addr(2), nil) // a's address on b's port
	f(portTag(12), addr(9), nil)
	f(0, addr(2), a)
	f(0, addr(9), nil)
	if got := k.m[addr(4)]; got.Tag != tagB || got.Ifindex != 13 || got.TaskId[0] != 'b' ||
		got.TaskId[1] != 0 {
		t.Errorf("kernel's entry: got %+v", got)
	}
}

func TestResolveAllocs(t *testing.T) {
	k := newFakeKernel()
	table := New(k, zap.NewNop())
	apply(t, table, newTask("a", endpoint(2, 12)))
	tag, a, other := k.m[addr(2)].Tag, addr(2), addr(3)
	for name, f := range map[string]func(){
		"tag":       func() { table.Resolve(tag, a) },
		"tag miss":  func() { table.Resolve(tag+1, a) },
		"port":      func() { table.Resolve(portTag(12), a) },
		"port miss": func() { table.Resolve(portTag(12), other) },
		"none":      func() { table.Resolve(0, a) },
		"none miss": func() { table.Resolve(0, other) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: got %v allocs, want 0", name, n)
		}
	}
}

// A tag is never given to another task while the first one's connections may be open.
func TestTagsAreNotReused(t *testing.T) {
	k := newFakeKernel()
	table := New(k, zap.NewNop())
	seen := map[uint32]string{}
	for i := range 100 {
		name := fmt.Sprint(i)
		apply(t, table, newTask(name, endpoint(2, 12+i)))
		tag := k.m[addr(2)].Tag
		if had, ok := seen[tag]; ok {
			t.Fatalf("task %s has the tag %d, which %s had", name, tag, had)
		}
		seen[tag] = name
	}
	table.nextTag = bpf.TagTask
	for i := range 4 {
		apply(t, table, newTask(fmt.Sprint("w", i), endpoint(2, 12+i)))
		if tag := k.m[addr(2)].Tag; tag == 0 || tag > bpf.TagTask {
			t.Errorf("got tag %#x", tag)
		}
	}
}

// A task that goes on under another ARN keeps its tag, and with it its open connections: no reader
// misses it at any moment. One that lacks a container of the former task gets another tag, because
// that container may have made the connection.
func TestTagOfAnotherARN(t *testing.T) {
	in := func(cluster string, containers ...string) *task.Task {
		k := newTask("same", endpoint(2, 12))
		k.ARN = "arn:aws:ecs:eu-west-1:1:task/" + cluster + "/same"
		for _, id := range containers {
			k.Containers = append(k.Containers, &task.Container{ID: id})
		}
		return k
	}
	for _, c := range []struct {
		name string
		next *task.Task
		same bool
	}{
		{"before the former in the order", in("a", "c1", "c2"), true},
		{"after it", in("z", "c1", "c2"), true},
		{"with one more container", in("z", "c2", "c1", "c3"), true},
		{"with one less", in("z", "c1"), false},
		{"with another", in("z", "c1", "c3"), false},
	} {
		k := newFakeKernel()
		table := New(k, zap.NewNop())
		apply(t, table, in("c", "c1", "c2"))
		tag := k.m[addr(2)].Tag
		k.onPut = func(netip.Addr) {
			if c.same && table.Resolve(tag, addr(2)) == nil {
				t.Errorf("%s: no task while the kernel's map is written", c.name)
			}
		}
		apply(t, table, c.next)
		if got := k.m[addr(2)].Tag; (got == tag) != c.same {
			t.Errorf("%s: got tag %d, had %d", c.name, got, tag)
		}
		switch v := table.Resolve(tag, addr(2)); {
		case !c.same && v != nil:
			t.Errorf("%s: the former tag has %s", c.name, v.Task.ARN)
		case c.same && (v == nil || v.Task != c.next):
			t.Errorf("%s: the tag has %v", c.name, v)
		}
	}
}

// An address that two begin to claim at once is neither's, until one of them is gone.
func TestConflict(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	k := newFakeKernel()
	table := New(k, zap.New(core))
	a, b := newTask("a", endpoint(2, 12)), newTask("b", endpoint(2, 13), endpoint(3, 13))
	for range 3 {
		apply(t, table, a, b)
	}
	if v := table.Resolve(portTag(12), addr(2)); v != nil {
		t.Errorf("the address is %s's, want nobody's", v.Task.ID)
	}
	if _, ok := k.m[addr(2)]; ok {
		t.Error("the kernel has an owner for it")
	}
	if v := table.Resolve(portTag(13), addr(3)); v == nil || v.Task != b {
		t.Error("b lost the address that nobody else claims")
	}
	if got := table.Conflicts(); got != 1 || logs.Len() != 2 {
		t.Errorf("got %d conflicts and %d warnings, want 1 and one for each task", got,
			logs.Len())
	}
	apply(t, table, b)
	if v := table.Resolve(0, addr(2)); v == nil || v.Task != b {
		t.Error("b did not get the address when a was gone")
	}
	// Two tasks behind one port are two claimants too.
	apply(t, table, newTask("c", endpoint(5, 14)), newTask("d", endpoint(5, 14)))
	if _, ok := k.m[addr(5)]; ok || table.Conflicts() != 2 {
		t.Errorf("address of two tasks: in the kernel %v, conflicts %d", ok,
			table.Conflicts())
	}
}

func TestPortGone(t *testing.T) {
	k := newFakeKernel()
	table := New(k, zap.NewNop())
	a := newTask("a", endpoint(2, 12), endpoint(3, 13))
	apply(t, table, a)
	if err := table.PortGone(12); err != nil {
		t.Fatal(err)
	}
	apply(t, table, a) // the engine has not said anything yet
	if _, ok := k.m[addr(2)]; ok || table.Resolve(0, addr(2)) != nil {
		t.Error("the address behind the gone port still has a task")
	}
	if table.Resolve(0, addr(3)) == nil {
		t.Error("the other port's address has lost its task")
	}
	b := newTask("b", endpoint(2, 14))
	apply(t, table, a, b)
	if v := table.Resolve(portTag(14), addr(2)); v == nil || v.Task != b {
		t.Error("the address's new task does not get it")
	}
}

// A port that comes back under its number, before anybody has looked at its task again, is its
// task's again.
func TestPortCameBack(t *testing.T) {
	k := newFakeKernel()
	table := New(k, zap.NewNop())
	a := newTask("a", endpoint(2, 12))
	apply(t, table, a)
	if err := errors.Join(table.PortGone(12), table.PortCame(13)); err != nil {
		t.Fatal(err)
	}
	if _, ok := k.m[addr(2)]; ok {
		t.Error("another port came: the address has a task")
	}
	if err := table.PortCame(12); err != nil {
		t.Fatal(err)
	}
	apply(t, table, a)
	if v := table.Resolve(portTag(12), addr(2)); v == nil || v.Task != a ||
		k.m[addr(2)].Ifindex != 12 {
		t.Errorf("after it came back: got %v, in the kernel %v", v, k.m[addr(2)])
	}
}

// The kernel must never say that an address is the new task's while readers still say the old
// one's.
func TestReadersLoseFirst(t *testing.T) {
	k := newFakeKernel()
	table := New(k, zap.NewNop())
	apply(t, table, newTask("a", endpoint(2, 12)))
	k.onPut = func(a netip.Addr) {
		if v := table.Resolve(0, a); v != nil {
			t.Errorf("%s is still %s's", a, v.Task.ID)
		}
	}
	apply(t, table, newTask("b", endpoint(2, 13)))
}

func TestFullAndRetry(t *testing.T) {
	k := newFakeKernel()
	k.max = 2
	table := New(k, zap.NewNop())
	tasks := []*task.Task{newTask("a", endpoint(2, 12)), newTask("b", endpoint(3, 13)),
		newTask("c", endpoint(4, 14))}
	if err := table.Apply(tasks); !errors.Is(err, errFull) {
		t.Fatalf("got %v, want errFull", err)
	}
	count := func() (n int) {
		for i := 2; i <= 4; i++ {
			_, in := k.m[addr(i)]
			if (table.Resolve(0, addr(i)) != nil) != in {
				t.Errorf("%s: kernel %v, readers otherwise", addr(i), in)
			}
			if in {
				n++
			}
		}
		return n
	}
	if got := count(); got != 2 {
		t.Errorf("got %d tasks, want the 2 there is room for", got)
	}
	k.max = 3
	if err := table.Retry(); err != nil {
		t.Fatal(err)
	}
	if got := count(); got != 3 {
		t.Errorf("after Retry: got %d tasks, want 3", got)
	}
	k.onPut = func(netip.Addr) { t.Error("Retry wrote though nothing had failed") }
	if err := table.Retry(); err != nil {
		t.Fatal(err)
	}
	if k.reads != 1 {
		t.Errorf("the kernel's map was read %d times, want once", k.reads)
	}
}

func TestRestore(t *testing.T) {
	k := newFakeKernel()
	before := New(k, zap.NewNop())
	a, b, c := newTask("a", endpoint(2, 12)), newTask("b", endpoint(3, 13)),
		newTask("c", endpoint(4, 14))
	apply(t, before, a, b, c)
	var saved []Saved
	for _, v := range before.Views() {
		saved = append(saved, Saved{v.Tag, v.Task})
	}
	tags := map[string]uint32{"a": k.m[addr(2)].Tag, "b": k.m[addr(3)].Tag,
		"c": k.m[addr(4)].Tag}
	// In between: b's veth went, so the loader dropped the entry; c is not in the snapshot; d
	// is, but the map says that its address is a's.
	delete(k.m, addr(3))
	saved = saved[:2]
	saved = append(saved, Saved{tags["a"] + 100, newTask("d", endpoint(2, 12))})

	after := New(k, zap.NewNop())
	k.onPut = func(netip.Addr) { t.Error("Restore wrote to the kernel") }
	if err := after.Restore(saved); err != nil {
		t.Fatal(err)
	}
	k.onPut = nil
	if v := after.Resolve(tags["a"], addr(2)); v == nil || v.Task != a {
		t.Errorf("a: got %v", v)
	}
	if v := after.Resolve(tags["b"], addr(3)); v != nil {
		t.Error("b is believed, its veth is gone")
	}
	if v := after.Resolve(tags["a"]+100, addr(2)); v != nil {
		t.Error("d is believed, the map says otherwise")
	}
	if _, ok := k.m[addr(4)]; !ok {
		t.Error("c's entry did not stay")
	}
	// The first Apply: the same a and c (other pointers), and somebody new.
	apply(t, after, newTask("a", endpoint(2, 12)), newTask("c", endpoint(4, 14)), newTask("e", endpoint(5, 15)))
	if got := k.m[addr(2)].Tag; got != tags["a"] {
		t.Errorf("a's tag: got %d, want %d", got, tags["a"])
	}
	if got := k.m[addr(4)].Tag; got != tags["c"] {
		t.Errorf("c's tag: got %d, want %d", got, tags["c"])
	}
	for name, tag := range tags {
		if k.m[addr(5)].Tag == tag {
			t.Errorf("e has %s's tag", name)
		}
	}
}

func TestAwait(t *testing.T) {
	k := newFakeKernel()
	table := New(k, zap.NewNop())
	a := newTask("a", endpoint(2, 12))
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if v := table.Await(t.Context(), portTag(12), addr(2)); v == nil ||
				v.Task != a {
				t.Errorf("got %v", v)
			}
		})
	}
	waitFor(t, func() bool { table.wmu.Lock(); defer table.wmu.Unlock(); return table.waiting == 10 })
	if n := len(table.waits); n != 1 {
		t.Errorf("got %d waits for one address, want 1", n)
	}
	apply(t, table, newTask("b", endpoint(3, 13))) // does not concern them
	apply(t, table, a)
	wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if v := table.Await(ctx, portTag(14), addr(9)); v != nil {
		t.Errorf("got %v for nobody", v)
	}
	if len(table.waits) != 0 || table.waiting != 0 {
		t.Errorf("%d waits, %d waiting are left", len(table.waits), table.waiting)
	}
}

func TestAwaitLimits(t *testing.T) {
	table := New(newFakeKernel(), zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range maxWaitersPerAddr {
		wg.Go(func() { table.Await(ctx, 0, addr(2)) })
	}
	waitFor(t, func() bool { table.wmu.Lock(); defer table.wmu.Unlock(); return table.waiting == maxWaitersPerAddr })
	if v := table.Await(t.Context(), 0, addr(2)); v != nil || table.TurnedAway() != 1 {
		t.Errorf("one too many: got %v, turned away %d", v, table.TurnedAway())
	}
	done := make(chan struct{})
	go func() { defer close(done); table.Await(ctx, 0, addr(3)) }()
	waitFor(t, func() bool { table.wmu.Lock(); defer table.wmu.Unlock(); return table.waiting == maxWaitersPerAddr+1 })
	cancel()
	wg.Wait()
	<-done
}

// TestAwaitShares: one port, or all senders without a proof together, cannot fill the waiting room
// whatever addresses they make up: another port's first request waits for its task.
func TestAwaitShares(t *testing.T) {
	table := New(newFakeKernel(), zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	waiting := func() int { n, _ := table.Waiting(); return n }
	fill := func(tag uint32, n, want int) {
		t.Helper()
		had, turned := waiting(), table.TurnedAway()
		for i := range n {
			wg.Go(func() {
				table.Await(ctx, tag,
					netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}))
			})
		}
		waitFor(t, func() bool { return waiting() == had+want && table.TurnedAway() == turned+uint64(n-want) })
	}
	fill(bpf.TagNone, maxWaiters+100, maxUnproved)
	fill(portTag(11), 1000, maxWaitersPerTag)
	fill(5, 100, 100) // a task that is settling
	fill(bpf.ContainerTag(5, 3), 100, maxWaitersPerTag-100)
	a := &task.Task{ARN: "a", ID: "a", Endpoints: []task.Endpoint{{Addr: addr(2), Ifindex: 12}}}
	got := make(chan *View)
	go func() { got <- table.Await(ctx, portTag(12), addr(2)) }()
	had := maxUnproved + 2*maxWaitersPerTag
	waitFor(t, func() bool { return waiting() == had+1 })
	if err := table.Apply([]*task.Task{a}); err != nil {
		t.Fatal(err)
	}
	if v := <-got; v == nil || v.Task != a {
		t.Errorf("the first request of another port: got %v, want its task", v)
	}
	cancel()
	wg.Wait()
	if n := waiting(); n != 0 || len(table.waitsOf) != 0 {
		t.Errorf("%d waiting and shares of %v are left", n, table.waitsOf)
	}
}

func waitFor(t *testing.T, f func() bool) {
	t.Helper()
	expect.Until(t, "the condition", f)
}

// FuzzEqual does what the bytes say and checks after each step that readers and kernel agree, and
// that an address that another claims too is had by the one that had it before.
func FuzzEqual(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		b := make([]byte, 200)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		k := newFakeKernel()
		k.max = 6
		table := New(k, zap.NewNop())
		tasks := map[string]*task.Task{}
		gone := map[int]bool{}
		for len(ops) >= 4 {
			op, who, where, port := ops[0]%8, fmt.Sprint(ops[1]%5), int(ops[2]%8),
				10+int(ops[3]%8)
			ops = ops[4:]
			k.refuse = nil
			before := maps.Clone(k.m)
			switch op {
			case 0:
				delete(tasks, who)
			case 1:
				_ = table.PortGone(port)
				gone[port] = true
				check(t, table, k, before, tasks)
				continue
			case 2: // a process dies, the next one has a snapshot
				var saved []Saved
				for _, v := range table.Views() {
					saved = append(saved, Saved{v.Tag, v.Task})
				}
				table = New(k, zap.NewNop())
				if err := table.Restore(saved); err != nil {
					t.Fatal(err)
				}
			case 3:
				k.refuse = func(a netip.Addr) error {
					if a == addr(where) {
						return errFull
					}
					return nil
				}
			default:
				var eps []task.Endpoint
				if had := tasks[who]; had != nil && op > 5 {
					eps = append(eps, had.Endpoints...)
				}
				tasks[who] = newTask(who, append(eps, endpoint(where, port))...)
			}
			_ = table.Apply(slices.SortedFunc(maps.Values(tasks), byARN))
			check(t, table, k, before, tasks)
		}
	})
}

func check(t *testing.T, table *Table, k *fakeKernel, before map[netip.Addr]bpf.TaskValue,
	tasks map[string]*task.Task) {
	t.Helper()
	s := table.snap.Load()
	addrs := maps.Collect(s.addrs.all())
	if len(addrs) != len(k.m) {
		t.Fatalf("readers know %d addresses, the kernel %d", len(addrs), len(k.m))
	}
	for a, e := range addrs {
		if got := k.m[a]; got != value(e) {
			t.Fatalf("%s: kernel has %+v, readers %+v", a, got, value(e))
		}
		if table.Resolve(k.m[a].Tag, a) != e.view {
			t.Fatalf("%s: the kernel's tag leads elsewhere", a)
		}
		kept := before[a].Ifindex == uint32(e.ep.Ifindex) &&
			before[a].TaskId == taskID(e.view.Task.ID)
		for _, tk := range tasks {
			for _, ep := range tk.Endpoints {
				if ep.Addr == a && !kept && tk.ARN != e.view.Task.ARN &&
					!table.gone[ep.Ifindex] {
					t.Fatalf("%s is %s's, and %s claims it", a, e.view.Task.ID,
						tk.ID)
				}
			}
		}
	}
	tags := map[uint32]bool{}
	for tag, v := range s.tags.all() {
		if tags[tag] || v.Tag != tag {
			t.Fatalf("tag %d of %s", tag, v.Task.ID)
		}
		tags[tag] = true
	}
	wantWhole(t, table)
}
