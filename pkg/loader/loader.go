// Package loader owns the kernel's side of metad: the server's namespace and its veth pair, the tc
// programs and where they are attached, the maps and their pins, and the listener's socket.
package loader

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// Loader is metad's presence in the kernel. Its methods are safe for concurrent use.
//
// The order of a start is Open, Listen, Arm; of a stop Disarm, whatever the server needs to finish,
// Close.
//
// It only puts its parts together; each of them has a state and a lock of its own.
type Loader struct {
	cfg   Config
	log   *zap.Logger
	fds   *lowFDs
	host  netns.NsHandle
	nl    *netlink.Handle // in host
	end   *endpoint
	progs *programs
	tc    *tcAttacher
	gate  *gate
	lock  *netnsLock

	tasks    *taskMap
	left     addrSet // the addresses of LeaveAlone
	ports    *ports
	follower *follower

	closeOnce sync.Once
	closeErr  error
}

// Open makes the server's namespace, loads and attaches the programs, and follows bridges and their
// ports from then on. No packet is taken before Arm. What an earlier process left behind is
// replaced: metad0, filters; its pinned maps are taken over.
//
// Errors: ErrPermission, ErrKernel, ErrNoBPFFS, ErrPinDir, ErrBusy; a bridge that cannot be hooked
// is logged, not returned. An *ebpf.VerifierError prints in full with %+v.
func Open(cfg Config) (_ *Loader, err error) {
	l, err := newLoader(cfg)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.host, err = hostNS(l.cfg.Netns); err != nil {
		return nil, err
	}
	if l.nl, err = netlink.NewHandleAt(l.host, unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	if err := makePinDir(l.cfg.PinDir); err != nil {
		return nil, err
	}
	if l.lock, err = lockNetns(l.host, lockWait); err != nil {
		return nil, err
	}
	if l.end, err = newEndpoint(l.nl); err != nil {
		return nil, err
	}
	if err := l.load(nil); err != nil {
		return nil, err
	}
	if err := l.tasks.clearNeighbours(); err != nil {
		return nil, err
	}
	if err := l.gate.attach(); err != nil {
		return nil, err
	}
	if err := l.follow(); err != nil {
		return nil, err
	}
	return l, nil
}

// newLoader returns a loader that has nothing in the kernel yet.
func newLoader(cfg Config) (*Loader, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("loader config: %w", err)
	}
	if err := checkHost(); err != nil {
		return nil, err
	}
	fds, err := reserveLowFDs() // before anything else is opened
	if err != nil {
		return nil, err
	}
	return &Loader{cfg: cfg, log: cfg.Log, fds: fds, host: netns.None()}, nil
}

// hostNS returns a descriptor of our own for ns, or for the calling thread's namespace if there is
// none.
func hostNS(ns netns.NsHandle) (netns.NsHandle, error) {
	if ns <= 0 {
		h, err := netns.Get()
		if err != nil {
			return netns.None(), fmt.Errorf("host network namespace: %w", err)
		}
		return h, nil
	}
	fd, err := unix.FcntlInt(uintptr(ns), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return netns.None(), fmt.Errorf("Netns: %w", err)
	}
	return netns.NsHandle(fd), nil
}

// load loads the programs and makes the parts that work with them. For given see the function load.
func (l *Loader) load(given map[string]*ebpf.Map) (err error) {
	if l.progs, err = load(&l.cfg, l.end, given); err != nil {
		return err
	}
	l.tc = &tcAttacher{mode: l.cfg.Attach, mixed: l.cfg.Attach == AttachAuto, host: l.host,
		nl: l.nl, fds: l.fds,
		progs: &l.progs.MetadPrograms}
	l.gate = &gate{progs: l.progs, end: l.end, tc: l.tc, hostRoute: l.cfg.HostRoute, log: l.log}
	l.ports = newPorts(l.tc, l.cfg.Bridges, l.log)
	l.tasks = &taskMap{
		tasks:      kernelMap[bpf.TaskValue]{l.progs.IpTask},
		counters:   kernelMap[[]bpf.TaskCounters]{l.progs.Counters},
		neighbours: kernelMap[bpf.Neighbour]{l.progs.Neighbours},
		ofPorts:    kernelPorts{l.progs.PortNeighbours},
		max:        int(l.progs.IpTask.MaxEntries()),
		exists:     l.exists,
	}
	l.left.m = kernelMap[uint8]{l.progs.LeftAlone}
	return nil
}

// exists reports whether the host has the device: as followed, or, if it is that new, as the kernel
// says.
func (l *Loader) exists(ifindex int) bool {
	if l.ports.has(ifindex) {
		return true
	}
	_, err := l.nl.LinkByIndex(ifindex)
	return err == nil
}

// follow reads what is there, attaches to it, and starts following changes.
func (l *Loader) follow() error {
	if err := l.tasks.open(); err != nil {
		return err
	}
	f := &follower{
		host: l.host, nl: l.nl, ports: l.ports, tasks: l.tasks, log: l.log,
		onPort: l.cfg.OnPort, onPortGone: l.cfg.OnPortGone, own: l.end.metad0, gate: l.gate,
		done: make(chan struct{}),
	}
	if err := f.start(); err != nil {
		return err
	}
	l.follower = f
	return nil
}

// pause stops following devices.
func (l *Loader) pause() {
	if l.follower != nil {
		l.follower.stop()
		l.follower = nil
	}
}

// Listen returns the listener on Endpoint in the server's namespace. An accepted connection's
// SO_MARK is a bpf.Tag… or a task's tag. Call it once, after Open and before Arm; the caller closes
// it.
func (l *Loader) Listen() (net.Listener, error) {
	if err := l.fds.fill(); err != nil {
		return nil, err
	}
	if err := l.end.listen(); err != nil {
		return nil, err
	}
	return l.end.listener, nil
}

// Arm starts taking packets for the endpoint, at all hooks at once.
func (l *Loader) Arm() error {
	if err := l.gate.arm(); err != nil {
		return errors.Join(err, l.Disarm())
	}
	return nil
}

// Busy drops new connections with the tag, of a task without its container or of a port, for a
// quarter of a second.
func (l *Loader) Busy(tag uint32) error { return l.progs.setBusy(tag) }

// Disarm stops taking packets, but for those of connections that the server has.
func (l *Loader) Disarm() error {
	return l.gate.disarm()
}

// Ready returns nil while packets for the endpoint are taken, or why they are not: not armed yet,
// disarmed, or ErrEndpoint.
func (l *Loader) Ready() error { return l.gate.ready() }

// SetBridges names bridges to watch beside those that Config.Bridges match. The names replace those
// of the last call.
func (l *Loader) SetBridges(names []string) { l.ports.setBridges(names) }

// Close takes everything out of the kernel but the pinned maps, which the next start takes over
// (Detach removes them too). With OnExitDrop the filters stay as well, and drop. The listener and
// its connections should be closed before. Closing again does nothing.
func (l *Loader) Close() error {
	l.closeOnce.Do(func() { l.closeErr = l.close() })
	return l.closeErr
}

func (l *Loader) close() error {
	var errs []error
	if l.gate != nil {
		errs = append(errs, l.Disarm())
	}
	l.pause()
	if l.ports != nil && l.cfg.OnExit != OnExitDrop {
		errs = append(errs, l.ports.close())
	}
	if l.gate != nil {
		errs = append(errs, l.gate.close())
	}
	if l.end != nil {
		errs = append(errs, l.end.close())
	}
	return errors.Join(append(errs, l.closeRest())...)
}

// closeRest closes what leaves nothing in the kernel behind.
func (l *Loader) closeRest() error {
	var errs []error
	if l.progs != nil {
		errs = append(errs, l.progs.Close())
	}
	if l.nl != nil {
		l.nl.Close()
	}
	if l.lock != nil {
		errs = append(errs, l.lock.Close())
	}
	if l.host.IsOpen() {
		errs = append(errs, l.host.Close())
	}
	l.fds.close()
	return errors.Join(errs...)
}

// Put gives addr to the task in v, or replaces the task that had it. Counters start anew with a new
// tag. Errors: ErrFull; ErrNoPort if there is no device v.Ifindex.
func (l *Loader) Put(addr netip.Addr, v *bpf.TaskValue) error {
	had, known := l.tasks.tasks.get(addr)
	if err := l.tasks.put(addr, v); err != nil {
		return err
	}
	if known && had.Ifindex == v.Ifindex {
		return nil
	}
	if device, is := l.ports.unwatched(int(v.Ifindex)); is {
		l.log.Warn("a task's address is behind a device that metad does not watch: its "+
			"requests are refused, or go to the agent",
			zap.Stringer("addr", addr), zap.String("device", device),
			zap.Uint32("ifindex", v.Ifindex))
	}
	return nil
}

// Delete takes addr from the task that has it. That no task has it is no error.
func (l *Loader) Delete(addr netip.Addr) error { return l.tasks.delete(addr) }

// LeaveAlone has the new connections of these IPv4 addresses, and of no other, left to the ECS
// agent as long as no task has the address. Without Config.AgentAddr it has no effect.
func (l *Loader) LeaveAlone(addrs []netip.Addr) error { return l.left.set(addrs) }

// Entries returns what the kernel's map of tasks holds.
func (l *Loader) Entries() (map[netip.Addr]bpf.TaskValue, error) { return l.tasks.entries() }
