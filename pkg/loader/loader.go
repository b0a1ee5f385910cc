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
// To start, call Open, Listen and Arm. To stop, call Disarm, let the server finish its requests,
// and call Close.
//
// Loader only connects its parts. Each part has its own state and its own lock.
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

// Open makes the server's namespace, loads and attaches the programs, and starts to follow bridges
// and their ports. The programs take no packet before Arm. Open replaces metad0 and the filters of
// an earlier process, and continues with its pinned maps.
//
// Errors: ErrPermission, ErrKernel, ErrNoBPFFS, ErrPinDir, ErrBusy. A bridge that cannot be hooked
// is logged and is no error. An *ebpf.VerifierError prints in full with %+v.
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

// hostNS returns a new descriptor of ns, or of the calling thread's namespace if ns is not set.
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

// load loads the programs and makes the parts that use them. The function load explains given.
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

// exists reports whether the host has the device. If the follower has not heard of it yet, exists
// asks the kernel.
func (l *Loader) exists(ifindex int) bool {
	if l.ports.has(ifindex) {
		return true
	}
	_, err := l.nl.LinkByIndex(ifindex)
	return err == nil
}

// follow reads the existing devices, attaches to them, and starts following changes.
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
// SO_MARK is a bpf.Tag… or a task's tag. Call Listen once, after Open and before Arm. The caller
// closes the listener.
func (l *Loader) Listen() (net.Listener, error) {
	if err := l.fds.fill(); err != nil {
		return nil, err
	}
	if err := l.end.listen(); err != nil {
		return nil, err
	}
	return l.end.listener, nil
}

// Arm makes the programs take packets for the endpoint, at all hooks at once.
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

// Ready returns nil while the programs take packets for the endpoint. Otherwise it returns the
// reason: not armed yet, disarmed, or ErrEndpoint.
func (l *Loader) Ready() error { return l.gate.ready() }

// SetBridges sets the names of bridges to watch in addition to those that match Config.Bridges. It
// replaces the names of the last call.
func (l *Loader) SetBridges(names []string) { l.ports.setBridges(names) }

// Close removes everything from the kernel except the pinned maps, which the next start takes over.
// (Detach removes those too.) With OnExitDrop the filters also stay, and drop packets. Close the
// listener and its connections first. A second call does nothing.
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

// closeRest closes the descriptors that close and letGo treat alike.
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

// Put gives addr to the task in v, in place of the task that had it. A new tag resets the counters
// of the address. Errors: ErrFull; ErrNoPort if the host has no device v.Ifindex.
func (l *Loader) Put(addr netip.Addr, v *bpf.TaskValue) error {
	had, known := l.tasks.tasks.get(addr)
	if err := l.tasks.put(addr, v); err != nil {
		return err
	}
	if known && had.Ifindex == v.Ifindex {
		return nil
	}
	if device, is := l.ports.unwatched(int(v.Ifindex)); is {
		l.log.Warn("task address behind an unwatched device: its requests are refused "+
			"or go to the ECS agent",
			zap.Stringer("addr", addr), zap.String("device", device),
			zap.Uint32("ifindex", v.Ifindex))
	}
	return nil
}

// Delete takes addr from its task. It is no error if no task has addr.
func (l *Loader) Delete(addr netip.Addr) error { return l.tasks.delete(addr) }

// LeaveAlone sets the IPv4 addresses whose new connections the programs leave to the ECS agent, as
// long as no task has the address. Without Config.AgentAddr it has no effect.
func (l *Loader) LeaveAlone(addrs []netip.Addr) error { return l.left.set(addrs) }

// Entries returns the entries of the kernel's map of tasks.
func (l *Loader) Entries() (map[netip.Addr]bpf.TaskValue, error) { return l.tasks.entries() }
