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

// addrMap is a map of the kernel whose keys are IPv4 addresses.
type addrMap[V any] interface {
	get(netip.Addr) (V, bool)
	put(netip.Addr, *V) error
	delete(netip.Addr) error // of an address that is not there: no error
	all() (map[netip.Addr]V, error)
}

// portMap is a map of the kernel in which each port has entries of its own.
type portMap interface {
	dropPort(ifindex uint32) error
	clear() error
}

// taskMap is which task has an address, and what the tasks' addresses have sent. Its methods are
// safe for concurrent use.
type taskMap struct {
	tasks      addrMap[bpf.TaskValue]
	counters   addrMap[[]bpf.TaskCounters] // one for each CPU
	neighbours addrMap[bpf.Neighbour]      // at bridge devices
	ofPorts    portMap                     // the same on ports
	max        int
	exists     func(ifindex int) bool

	mu     sync.Mutex // guards byPort, and is held while an address changes hands
	byPort map[uint32]map[netip.Addr]bool
}

// open reads what the kernel's map holds, which an earlier process may have pinned.
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
	// Asked under the lock: should the device go from here on, dropPort finds the entry.
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

// delete takes addr from the task that has it, if there is one.
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
	err := errors.Join(t.tasks.delete(addr), t.counters.delete(addr)) // what packets see first
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

// ports returns the devices that have addresses of tasks behind them.
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

// uses reports whether tasks have addresses behind the device.
func (t *taskMap) uses(ifindex int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byPort[uint32(ifindex)]) > 0
}

// behind returns which task addresses are behind which device.
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

// dropPort forgets all addresses behind a device that exists no more.
func (t *taskMap) dropPort(ifindex int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for addr := range maps.Clone(t.byPort[uint32(ifindex)]) {
		errs = append(errs, t.remove(addr))
	}
	return errors.Join(append(errs, t.dropNeighbours(uint32(ifindex)))...)
}

// dropNeighbours forgets the addresses without a task that were seen at a device.
func (t *taskMap) dropNeighbours(ifindex uint32) error {
	if err := t.ofPorts.dropPort(ifindex); err != nil {
		return fmt.Errorf("clear %s: %w", bpf.MetadMapPortNeighbours, err)
	}
	all, err := t.neighbours.all()
	if errors.Is(err, ebpf.ErrIterationAborted) { // senders come and go meanwhile
		err = nil
	}
	errs := []error{err}
	for addr, n := range all {
		if n.Ifindex != ifindex {
			continue
		}
		// The address may just have been seen again, at another bridge: look once more, as
		// late as possible.
		if n, ok := t.neighbours.get(addr); ok && n.Ifindex == ifindex {
			errs = append(errs, t.neighbours.delete(addr))
		}
	}
	return errors.Join(errs...)
}

// clearNeighbours forgets what was learned: it belongs to ports and connections that may be gone.
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

// addrSet is a set of addresses. Its methods are safe for concurrent use.
type addrSet struct {
	m  addrMap[uint8]
	mu sync.Mutex // held while the set changes
}

// set makes addrs the set. What has no room is left out, with an error.
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
	if s := any(*v); k.m.Type() == ebpf.PerCPUHash { // takes a slice itself
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
		var v V // its own: a slice would be shared
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

// drop deletes the entries of the ports that are meant.
func (k kernelPorts) drop(meant func(ifindex uint32) bool) error {
	var key bpf.NeighbourPlace
	var value bpf.Neighbour
	var drop []bpf.NeighbourPlace
	it := k.m.Iterate()
	for it.Next(&key, &value) {
		if meant(key.Ifindex) {
			drop = append(drop, key)
		}
	}
	err := it.Err()
	if errors.Is(err, ebpf.ErrIterationAborted) { // senders come and go meanwhile
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
