package loader

import (
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// The effect of a kill -9 on clients depends on the order in which the kernel releases the
// process's files. It releases the highest number first (close_files in kernel/fs/file.c queues
// them in ascending order as task work, which runs last in, first out). The wanted order:
//
//  1. the program array: every hook leaves every packet alone at once, however many there are;
//  2. connections and the listener: what is open is reset, and the reset still finds its way out;
//  3. links, of which each takes an RCU grace period: bridge devices, ports, metad0; and the
//     namespace.
//
// So the array gets a high number, and links, which come and go while the process runs, get low
// ones that were reserved before anything else was opened.
const (
	maxLowFDs   = 256   // links; beyond that they get what is free
	highFDLimit = 65536 // the kernel's table of files is as long as the highest number
)

// lowFDs is a set of file descriptor numbers, reserved by copies of one meaningless descriptor.
type lowFDs struct {
	dummy int
	top   int // the highest of them

	mu   sync.Mutex // guards what follows
	free []int      // ascending
	held map[int]bool
}

// reserveLowFDs takes the lowest free numbers, at most a quarter of the process's limit.
func reserveLowFDs() (*lowFDs, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return nil, fmt.Errorf("RLIMIT_NOFILE: %w", err)
	}
	dummy, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("reserve file descriptors: %w", err)
	}
	f := &lowFDs{dummy: dummy, held: map[int]bool{}}
	for range min(maxLowFDs, lim.Cur/4) {
		fd, err := unix.FcntlInt(uintptr(dummy), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			f.close()
			return nil, fmt.Errorf("reserve file descriptors: %w", err)
		}
		f.free = append(f.free, fd)
		f.held[fd] = true
		f.top = fd
	}
	return f, nil
}

// fill takes the lower numbers that have become free since. Files that are opened later are then
// released before the links.
func (f *lowFDs) fill() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		fd, err := unix.FcntlInt(uintptr(f.dummy), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("reserve file descriptors: %w", err)
		}
		if fd > f.top {
			return unix.Close(fd)
		}
		i, _ := slices.BinarySearch(f.free, fd)
		f.free = slices.Insert(f.free, i, fd)
		f.held[fd] = true
	}
}

// where is an end of the reserved numbers.
type where bool

const (
	lowest  where = false
	highest where = true
)

// links returns how many links there are at reserved numbers, which is all of them up to maxLowFDs.
func (f *lowFDs) links() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.held) - len(f.free)
}

// fdLink is a link of which only the file descriptor is known.
type fdLink struct {
	fd   int
	pool *lowFDs
}

// place moves a link to a reserved number. It takes k over, also when it fails.
func (f *lowFDs) place(k link.Link, w where) (*fdLink, error) {
	defer k.Close()
	raw, ok := k.(interface{ FD() int })
	if !ok {
		return nil, fmt.Errorf("link %T has no descriptor", k)
	}
	return f.placeFD(raw.FD(), w)
}

// placeFD copies the link's descriptor to a reserved number.
func (f *lowFDs) placeFD(fd int, w where) (*fdLink, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.free) == 0 {
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return &fdLink{fd, f}, err
	}
	i := 0
	if w == highest {
		i = len(f.free) - 1
	}
	low := f.free[i]
	if err := unix.Dup3(fd, low, unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("place link: %w", err)
	}
	f.free = slices.Delete(f.free, i, i+1)
	return &fdLink{low, f}, nil
}

// update puts p in the place of the link's program.
func (k *fdLink) update(p *ebpf.Program) error {
	fd, err := unix.FcntlInt(uintptr(k.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	l, err := link.NewFromFD(fd) // takes fd over
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	defer l.Close()
	if err := l.Update(p); err != nil {
		return fmt.Errorf("update link: %w", err)
	}
	return nil
}

// Close detaches the program. The number stays reserved.
func (k *fdLink) Close() error {
	f := k.pool
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.held[k.fd] {
		return unix.Close(k.fd)
	}
	if err := unix.Dup3(f.dummy, k.fd, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("close link: %w", err)
	}
	i, _ := slices.BinarySearch(f.free, k.fd)
	f.free = slices.Insert(f.free, i, k.fd)
	return nil
}

// close gives all numbers back; no link may be open.
func (f *lowFDs) close() {
	if f == nil {
		return
	}
	for fd := range f.held {
		unix.Close(fd)
	}
	unix.Close(f.dummy)
}

// highMap moves a map to a high number. It takes m over, also when it fails.
func highMap(m *ebpf.Map) (*ebpf.Map, error) {
	defer m.Close()
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return nil, fmt.Errorf("RLIMIT_NOFILE: %w", err)
	}
	const room = 64 // for others of its kind: a test, a takeover
	from := int(min(lim.Cur, highFDLimit)) - room
	fd, err := unix.FcntlInt(uintptr(m.FD()), unix.F_DUPFD_CLOEXEC, from)
	if err != nil {
		return nil, fmt.Errorf("move %s: %w", m, err)
	}
	high, err := ebpf.NewMapFromFD(fd) // takes fd over
	if err != nil {
		return nil, fmt.Errorf("move %s: %w", m, err)
	}
	return high, nil
}
