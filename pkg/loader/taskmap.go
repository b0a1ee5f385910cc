package loader

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// addrMap is a kernel map whose keys are IPv4 addresses.
type addrMap[V any] interface {
	get(netip.Addr) (V, bool)
	put(netip.Addr, *V) error
	delete(netip.Addr) error // a missing address is no error
	all() (map[netip.Addr]V, error)
}

// portMap is a kernel map in which each port has its own entries.
type portMap interface {
	dropPort(ifindex uint32) error
	clear() error
}

// taskMap stores which task has an address, and counts what each task's address has sent. It also
// clears what the programs have learned of addresses without a task. Its methods are safe for
// concurrent use.
type taskMap struct {
	tasks      addrMap[bpf.TaskValue]
	counters   addrMap[[]bpf.TaskCounters] // one for each CPU
	neighbours addrMap[bpf.Neighbour]      // addresses without a task, seen at bridge devices
	ofPorts    portMap                     // the same, seen at ports
	max        int                         // entries that tasks has room for
	exists     func(ifindex int) bool

	mu     sync.Mutex // guards byPort; also held while an address moves to another task
	byPort map[uint32]map[netip.Addr]bool
}

// open reads the entries of the kernel's map. An earlier process may have pinned it.
func (t *taskMap) open() error {
	entries, err := t.entries()
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byPort = map[uint32]map[netip.Addr]bool{}
	for addr, v := range entries {
		t.remember(addr, v.Ifindex)
	}
	return nil
}

// put gives addr to the task in v. Errors: ErrFull, ErrNoPort.
func (t *taskMap) put(addr netip.Addr, v *bpf.TaskValue) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	// The lock is held from here on, so that dropPort finds the entry if the device is deleted
	// after this check.
	if !t.exists(int(v.Ifindex)) {
		return fmt.Errorf("put %s: ifindex %d: %w", addr, v.Ifindex, ErrNoPort)
	}
	had, known := t.tasks.get(addr)
	if !known || had.Tag != v.Tag {
		zero := make([]bpf.TaskCounters, ebpf.MustPossibleCPU())
		if err := t.counters.put(addr, &zero); err != nil {
			return t.putErr(addr, bpf.MetadMapCounters, err)
		}
	}
	if err := t.tasks.put(addr, v); err != nil {
		return t.putErr(addr, bpf.MetadMapIpTask, err)
	}
	if known {
		t.forget(addr, had.Ifindex)
	}
	t.remember(addr, v.Ifindex)
	return nil
}

func (t *taskMap) putErr(addr netip.Addr, name string, err error) error {
	if errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("put %s: %s, %d entries: %w", addr, name, t.max, ErrFull)
	}
	return fmt.Errorf("put %s: %s: %w", addr, name, err)
}

// delete takes addr from its task, if it has one.
func (t *taskMap) delete(addr netip.Addr) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.remove(addr)
}

// remove is called with mu held.
func (t *taskMap) remove(addr netip.Addr) error {
	if had, known := t.tasks.get(addr); known {
		t.forget(addr, had.Ifindex)
	}
	// The task goes first, because a packet looks it up before it is counted.
	err := errors.Join(t.tasks.delete(addr), t.counters.delete(addr))
	if err != nil {
		return fmt.Errorf("delete %s: %w", addr, err)
	}
	return nil
}

func (t *taskMap) remember(addr netip.Addr, ifindex uint32) {
	if t.byPort[ifindex] == nil {
		t.byPort[ifindex] = map[netip.Addr]bool{}
	}
	t.byPort[ifindex][addr] = true
}

func (t *taskMap) forget(addr netip.Addr, ifindex uint32) {
	delete(t.byPort[ifindex], addr)
	if len(t.byPort[ifindex]) == 0 {
		delete(t.byPort, ifindex)
	}
}

// ports returns the ifindexes of the devices that have task addresses behind them, in order.
func (t *taskMap) ports() []int {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []int
	for ifindex := range t.byPort {
		all = append(all, int(ifindex))
	}
	slices.Sort(all)
	return all
}

// uses reports whether the device has task addresses behind it.
func (t *taskMap) uses(ifindex int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byPort[uint32(ifindex)]) > 0
}

// behind returns the ifindex of the device of each task address.
func (t *taskMap) behind() map[netip.Addr]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := map[netip.Addr]int{}
	for ifindex, addrs := range t.byPort {
		for addr := range addrs {
			all[addr] = int(ifindex)
		}
	}
	return all
}

// dropPort deletes all addresses behind a device that no longer exists.
func (t *taskMap) dropPort(ifindex int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for addr := range maps.Clone(t.byPort[uint32(ifindex)]) {
		errs = append(errs, t.remove(addr))
	}
	return errors.Join(append(errs, t.dropNeighbours(uint32(ifindex)))...)
}

// dropNeighbours deletes the addresses without a task that the programs saw at a device.
func (t *taskMap) dropNeighbours(ifindex uint32) error {
	if err := t.ofPorts.dropPort(ifindex); err != nil {
		return fmt.Errorf("clear %s: %w", bpf.MetadMapPortNeighbours, err)
	}
	all, err := t.neighbours.all()
	if errors.Is(err, ebpf.ErrIterationAborted) { // packets change the map meanwhile
		err = nil
	}
	errs := []error{err}
	for addr, n := range all {
		if n.Ifindex != ifindex {
			continue
		}
		// A packet may have moved the address to another bridge meanwhile. So read the
		// entry again, as late as possible.
		if n, ok := t.neighbours.get(addr); ok && n.Ifindex == ifindex {
			errs = append(errs, t.neighbours.delete(addr))
		}
	}
	return errors.Join(errs...)
}

// clearNeighbours deletes all addresses without a task: their ports and connections may be gone.
func (t *taskMap) clearNeighbours() error {
	all, err := t.neighbours.all()
	errs := []error{err}
	for addr := range all {
		errs = append(errs, t.neighbours.delete(addr))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clear %s: %w", bpf.MetadMapNeighbours, err)
	}
	if err := t.ofPorts.clear(); err != nil {
		return fmt.Errorf("clear %s: %w", bpf.MetadMapPortNeighbours, err)
	}
	return nil
}

func (t *taskMap) entries() (map[netip.Addr]bpf.TaskValue, error) {
	all, err := t.tasks.all()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", bpf.MetadMapIpTask, err)
	}
	return all, nil
}

// count returns how many addresses have a task.
func (t *taskMap) count() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, addrs := range t.byPort {
		n += len(addrs)
	}
	return n
}

// addrSet is a set of addresses in the kernel. Its methods are safe for concurrent use.
type addrSet struct {
	m  addrMap[uint8]
	mu sync.Mutex // held while the set changes
}

// set replaces the set with addrs. If the map is full, it leaves addresses out and returns an
// error.
func (s *addrSet) set(addrs []netip.Addr) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	had, err := s.m.all()
	if err != nil {
		return fmt.Errorf("read %s: %w", bpf.MetadMapLeftAlone, err)
	}
	var fresh []netip.Addr
	for _, addr := range addrs {
		if _, ok := had[addr]; !ok {
			fresh = append(fresh, addr)
		}
		delete(had, addr)
	}
	var errs []error
	for addr := range had {
		errs = append(errs, s.m.delete(addr))
	}
	for _, addr := range fresh {
		errs = append(errs, s.m.put(addr, new(uint8)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("set %s: %w", bpf.MetadMapLeftAlone, err)
	}
	return nil
}

// kernelMap is an addrMap in the kernel.
type kernelMap[V any] struct{ m *ebpf.Map }

func (k kernelMap[V]) get(addr netip.Addr) (v V, ok bool) {
	key := addr.As4()
	err := k.m.Lookup(&key, &v)
	return v, err == nil
}

func (k kernelMap[V]) put(addr netip.Addr, v *V) error {
	key := addr.As4()
	var value any = v
	if s := any(*v); k.m.Type() == ebpf.PerCPUHash { // wants the slice, not a pointer to it
		value = s
	}
	return k.m.Put(&key, value)
}

func (k kernelMap[V]) delete(addr netip.Addr) error {
	key := addr.As4()
	if err := k.m.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

func (k kernelMap[V]) all() (map[netip.Addr]V, error) {
	all := map[netip.Addr]V{}
	var key [4]byte
	it := k.m.Iterate()
	for {
		var v V // a new one for each entry: entries would share a slice
		if !it.Next(&key, &v) {
			return all, it.Err()
		}
		all[netip.AddrFrom4(key)] = v
	}
}

// kernelPorts is a portMap in the kernel.
type kernelPorts struct{ m *ebpf.Map }

func (k kernelPorts) dropPort(ifindex uint32) error {
	return k.drop(func(of uint32) bool { return of == ifindex })
}

func (k kernelPorts) clear() error { return k.drop(func(uint32) bool { return true }) }

// drop deletes the entries of the ports for which match returns true.
func (k kernelPorts) drop(match func(ifindex uint32) bool) error {
	var key bpf.NeighbourPlace
	var value bpf.Neighbour
	var drop []bpf.NeighbourPlace
	it := k.m.Iterate()
	for it.Next(&key, &value) {
		if match(key.Ifindex) {
			drop = append(drop, key)
		}
	}
	err := it.Err()
	if errors.Is(err, ebpf.ErrIterationAborted) { // packets change the map meanwhile
		err = nil
	}
	errs := []error{err}
	for _, key := range drop {
		if err := k.m.Delete(&key); !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
