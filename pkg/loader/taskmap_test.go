package loader

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"metad/bpf"
)

// fakeMap is an addrMap that holds max addresses.
type fakeMap[V any] struct {
	mu   sync.Mutex
	m    map[netip.Addr]V
	max  int
	then func(what string) // called after each change
}

func newFakeMap[V any](max int) *fakeMap[V] {
	return &fakeMap[V]{m: map[netip.Addr]V{}, max: max, then: func(string) {}}
}

func (f *fakeMap[V]) get(a netip.Addr) (v V, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, ok = f.m[a]
	return v, ok
}

func (f *fakeMap[V]) put(a netip.Addr, v *V) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.m[a]; !ok && len(f.m) == f.max {
		return unix.E2BIG
	}
	f.m[a] = *v
	f.then("put")
	return nil
}

func (f *fakeMap[V]) delete(a netip.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.m, a)
	f.then("delete")
	return nil
}

func (f *fakeMap[V]) all() (map[netip.Addr]V, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.m), nil
}

// fakePorts notes what is to be forgotten.
type fakePorts struct {
	dropped []uint32
	cleared bool
}

func (f *fakePorts) dropPort(ifindex uint32) error {
	f.dropped = append(f.dropped, ifindex)
	return nil
}

func (f *fakePorts) clear() error {
	f.cleared = true
	return nil
}

type fakeTasks struct {
	*taskMap
	tasks      *fakeMap[bpf.TaskValue]
	counters   *fakeMap[[]bpf.TaskCounters]
	neighbours *fakeMap[bpf.Neighbour]
	ofPorts    *fakePorts
}

// newFakeTasks returns a map of tasks on a host whose devices are all there but 99.
func newFakeTasks(t *testing.T) fakeTasks {
	t.Helper()
	f := fakeTasks{tasks: newFakeMap[bpf.TaskValue](3),
		counters:   newFakeMap[[]bpf.TaskCounters](3),
		neighbours: newFakeMap[bpf.Neighbour](9)}
	f.ofPorts = &fakePorts{}
	f.taskMap = &taskMap{
		tasks: f.tasks, counters: f.counters, neighbours: f.neighbours, ofPorts: f.ofPorts,
		max:    3,
		exists: func(ifindex int) bool { return ifindex != 99 },
	}
	if err := f.open(); err != nil {
		t.Fatal(err)
	}
	return f
}

func addr(n byte) netip.Addr { return netip.AddrFrom4([4]byte{169, 254, 172, n}) }

func (f fakeTasks) mustPut(t *testing.T, n byte, tag, ifindex uint32) {
	t.Helper()
	if err := f.put(addr(n), &bpf.TaskValue{Tag: tag, Ifindex: ifindex}); err != nil {
		t.Fatal(err)
	}
}

// A new task at an address starts with empty counters; the same task again keeps them.
func TestTaskMapCounters(t *testing.T) {
	f := newFakeTasks(t)
	f.mustPut(t, 1, 7, 3)
	f.counters.m[addr(1)][0].Packets = 5
	f.mustPut(t, 1, 7, 4) // on another port
	if c, _ := f.counters.get(addr(1)); c[0].Packets != 5 {
		t.Errorf("the same task: got %+v, want 5 packets", c[0])
	}
	f.mustPut(t, 1, 8, 4)
	if c, _ := f.counters.get(addr(1)); c[0].Packets != 0 {
		t.Errorf("the next task: got %+v, want none", c[0])
	}
}

// A full map refuses the next address with ErrFull, and those in it stay.
func TestTaskMapFull(t *testing.T) {
	f := newFakeTasks(t)
	for n := range byte(3) {
		f.mustPut(t, n, uint32(n)+1, 3)
	}
	if err := f.put(addr(9), &bpf.TaskValue{Tag: 9, Ifindex: 3}); !errors.Is(err, ErrFull) {
		t.Errorf("got %v, want ErrFull", err)
	}
	f.mustPut(t, 1, 20, 3)
	if n := f.count(); n != 3 {
		t.Errorf("got %d addresses, want 3", n)
	}
}

// An entry for a device that does not exist is refused, and nothing is written.
func TestTaskMapNoPort(t *testing.T) {
	f := newFakeTasks(t)
	if err := f.put(addr(1), &bpf.TaskValue{Tag: 1, Ifindex: 99}); !errors.Is(err, ErrNoPort) {
		t.Errorf("got %v, want ErrNoPort", err)
	}
	if len(f.tasks.m)+len(f.counters.m) != 0 {
		t.Errorf("written: %v, %v", f.tasks.m, f.counters.m)
	}
}

// What is deleted leaves the packets' view first; deleting what is not there is no error.
func TestTaskMapDelete(t *testing.T) {
	f := newFakeTasks(t)
	f.mustPut(t, 1, 1, 3)
	var order []string
	f.tasks.then = func(what string) { order = append(order, what+" task") }
	f.counters.then = func(what string) { order = append(order, what+" counters") }
	if err := f.delete(addr(1)); err != nil {
		t.Fatal(err)
	}
	if want := []string{"delete task", "delete counters"}; !slices.Equal(order, want) {
		t.Errorf("got %v, want %v", order, want)
	}
	if err := f.delete(addr(2)); err != nil {
		t.Errorf("not there: %v", err)
	}
	if f.uses(3) || f.count() != 0 {
		t.Error("the port still has an address")
	}
}

// With a device go the addresses behind it, and no others: not one that has moved to another port.
func TestTaskMapDropPort(t *testing.T) {
	f := newFakeTasks(t)
	f.mustPut(t, 1, 1, 3)
	f.mustPut(t, 2, 2, 3)
	f.mustPut(t, 3, 3, 4)
	f.mustPut(t, 2, 2, 4)
	for n, ifindex := range map[byte]uint32{7: 3, 8: 4} {
		f.neighbours.m[addr(n)] = bpf.Neighbour{Ifindex: ifindex}
	}
	if err := f.dropPort(3); err != nil {
		t.Fatal(err)
	}
	left := slices.SortedFunc(maps.Keys(f.tasks.m), netip.Addr.Compare)
	if want := []netip.Addr{addr(2), addr(3)}; !slices.Equal(left, want) {
		t.Errorf("left: got %v, want %v", left, want)
	}
	if _, ok := f.neighbours.get(addr(8)); !ok || len(f.neighbours.m) != 1 {
		t.Errorf("neighbours: got %v, want 8's alone", f.neighbours.m)
	}
	if !slices.Equal(f.ofPorts.dropped, []uint32{3}) {
		t.Errorf("dropped the neighbours of ports %v, want 3", f.ofPorts.dropped)
	}
	if got := f.ports(); !slices.Equal(got, []int{4}) {
		t.Errorf("ports: got %v, want 4", got)
	}
}

// A neighbour that was seen on another port while a device's are dropped stays.
func TestTaskMapNeighbourMoves(t *testing.T) {
	f := newFakeTasks(t)
	moving := movingMap{f.neighbours}
	f.taskMap.neighbours = moving
	f.neighbours.m[addr(7)] = bpf.Neighbour{Ifindex: 3}
	if err := f.dropPort(3); err != nil {
		t.Fatal(err)
	}
	if n, ok := f.neighbours.get(addr(7)); !ok || n.Ifindex != 4 {
		t.Errorf("got %+v, %v, want it on port 4", n, ok)
	}
}

// movingMap moves every neighbour to port 4 once all have been read.
type movingMap struct{ *fakeMap[bpf.Neighbour] }

func (m movingMap) all() (map[netip.Addr]bpf.Neighbour, error) {
	all, err := m.fakeMap.all()
	for a := range all {
		m.m[a] = bpf.Neighbour{Ifindex: 4}
	}
	return all, err
}

// What an earlier process has pinned is known by its port from the start.
func TestTaskMapOpen(t *testing.T) {
	f := newFakeTasks(t)
	f.tasks.m[addr(1)] = bpf.TaskValue{Tag: 1, Ifindex: 3}
	if err := f.open(); err != nil {
		t.Fatal(err)
	}
	if !f.uses(3) || f.count() != 1 {
		t.Errorf("ports: got %v", f.ports())
	}
	f.neighbours.m[addr(2)] = bpf.Neighbour{Ifindex: 3}
	if err := f.clearNeighbours(); err != nil || len(f.neighbours.m) != 0 ||
		!f.ofPorts.cleared {
		t.Errorf("neighbours: got %v, %v, want none", f.neighbours.m, err)
	}
}

// However an entry and its device's end fall together, no entry stays for a device that is gone.
func TestTaskMapDeviceGoes(t *testing.T) {
	for range 2000 {
		f := newFakeTasks(t)
		var gone atomic.Bool
		f.exists = func(int) bool { return !gone.Load() }
		var wg sync.WaitGroup
		wg.Go(func() { _ = f.put(addr(1), &bpf.TaskValue{Tag: 1, Ifindex: 3}) })
		wg.Go(func() {
			// as the follower: first the device, then what is behind it
			gone.Store(true)
			if err := f.dropPort(3); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		if len(f.tasks.m) != 0 {
			t.Fatal("an entry is left for a device that is gone")
		}
	}
}

// The set is what was given last. What has no room is an error, and the rest is there.
func TestAddrSet(t *testing.T) {
	a, b, c := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"),
		netip.MustParseAddr("10.0.0.3")
	m := newFakeMap[uint8](2)
	s := addrSet{m: m}
	f := func(addrs []netip.Addr, full bool, want ...netip.Addr) {
		t.Helper()
		if err := s.set(addrs); errors.Is(err, unix.E2BIG) != full || err != nil && !full {
			t.Errorf("%v: got %v, full: %v", addrs, err, full)
		}
		if got := slices.SortedFunc(maps.Keys(m.m), netip.Addr.Compare); !slices.Equal(got,
			want) {
			t.Errorf("%v: got %v, want %v", addrs, got, want)
		}
	}
	f([]netip.Addr{a, b}, false, a, b)
	f([]netip.Addr{b, c}, false, b, c)
	f([]netip.Addr{a, b, c}, true, b, c)
	f(nil, false)
}
