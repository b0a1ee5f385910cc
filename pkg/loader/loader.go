// Package loader owns the kernel's side of metad: the server's namespace and its veth pair, the tc
// programs and where they are attached, the maps and their pins, and the listener's socket.
package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// Loader is metad's presence in the kernel. Its methods are safe for concurrent use.
//
// The order of a start is Open, Listen, Arm; of a stop Disarm, whatever the server needs to finish, Close.
type Loader struct {
	cfg      Config
	log      *zap.Logger
	mode     AttachMode // never AttachAuto
	host     netns.NsHandle
	server   netns.NsHandle
	nl       *netlink.Handle // in host
	objs     *bpf.MetadObjects
	metad0   int // ifindexes
	metad1   int
	fds      *lowFDs
	pairLink []*fdLink // of metad0 and metad1
	verdicts []string  // names, in the C's order
	layout   uint32
	listener net.Listener // the caller's; for Handover
	follower *follower

	closeOnce sync.Once
	closeErr  error

	mu       sync.Mutex
	byPort   map[uint32]map[netip.Addr]bool // ip_task's keys by ifindex
	links    map[int]netLink                // every device in host, as last heard
	hooks    map[int]*hook                  // by ifindex
	pending  []int                          // ports to hook when there is time
	silent   map[string]bool                // patterns that were told to match nothing
	resyncs  uint64
	hookErrs uint64
}

// Open makes the server's namespace, loads and attaches the programs, and follows bridges and their
// ports from then on. No packet is taken before Arm. What an earlier process left behind is
// replaced: metad0, filters; its pinned maps are taken over.
//
// Errors: ErrPermission, ErrKernel, ErrNoBPFFS; a bridge that cannot be hooked is logged, not
// returned. An *ebpf.VerifierError prints in full with %+v.
func Open(cfg Config) (_ *Loader, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("loader config: %w", err)
	}
	if err := checkHost(); err != nil {
		return nil, err
	}
	l := &Loader{cfg: cfg, log: cfg.Log, host: netns.None(), server: netns.None()}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	// Before anything else is opened: see lowFDs.
	if l.fds, err = reserveLowFDs(); err != nil {
		return nil, err
	}
	if l.host, err = hostNS(cfg.Netns); err != nil {
		return nil, err
	}
	if l.nl, err = netlink.NewHandleAt(l.host, unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	if err := makePinDir(cfg.PinDir); err != nil {
		return nil, err
	}
	if l.server, err = newServerNS(); err != nil {
		return nil, err
	}
	if l.metad0, l.metad1, err = makeVeth(l.nl, l.server); err != nil {
		return nil, err
	}
	if err := l.load(nil); err != nil {
		return nil, err
	}
	if err := l.attachPair(); err != nil {
		return nil, err
	}
	if err := l.follow(); err != nil {
		return nil, err
	}
	return l, nil
}

// hostNS returns a descriptor of our own for ns, or for the calling thread's namespace if there is none.
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

// load loads the programs: with the maps given by another process, or else with those it finds pinned
// or makes.
func (l *Loader) load(given map[string]*ebpf.Map) error {
	if err := rlimit.RemoveMemlock(); err != nil { // needed before Linux 5.11
		return fmt.Errorf("%w: raise RLIMIT_MEMLOCK: %w", ErrPermission, err)
	}
	spec, err := bpf.LoadMetad()
	if err != nil {
		return err
	}
	if l.verdicts, err = verdictNames(spec.Types); err != nil {
		return err
	}
	if err := spec.Variables[bpf.MetadVarLayoutVersion].Get(&l.layout); err != nil {
		return fmt.Errorf("layout version: %w", err)
	}
	nsid, err := netnsID(l.nl, l.server)
	if err != nil {
		return err
	}
	agent := l.cfg.AgentAddr
	for name, value := range map[string]any{
		bpf.MetadVarHostAddr:      be32(HostAddr),
		bpf.MetadVarServerNetns:   uint32(nsid),
		bpf.MetadVarAgentAddr:     be32(agent.Addr()),
		bpf.MetadVarAgentPort:     be16(agent.Port()),
		bpf.MetadVarMetad0Ifindex: uint32(l.metad0),
		bpf.MetadVarTrustBridge:   boolByte(l.cfg.TrustBridge),
		bpf.MetadVarExitDrop:      boolByte(l.cfg.OnExit == OnExitDrop),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	if given == nil {
		given, err = l.openMaps(spec)
		defer func() { // the collection has its own descriptors
			for _, m := range given {
				m.Close()
			}
		}()
		if err != nil {
			return err
		}
	} else {
		for name, m := range given {
			if spec.Maps[name] != nil {
				spec.Maps[name].MaxEntries = m.MaxEntries()
			}
		}
	}
	l.objs = new(bpf.MetadObjects)
	if err := spec.LoadAndAssign(l.objs, &ebpf.CollectionOptions{MapReplacements: given}); err != nil {
		l.objs = nil
		if errors.Is(err, ebpf.ErrMapIncompatible) {
			err = fmt.Errorf("%w: %w", ErrLayout, err)
		}
		return fmt.Errorf("load programs: %w", err)
	}
	slots, err := highMap(l.objs.Slots)
	if err != nil {
		return err
	}
	l.objs.Slots = slots
	return nil
}

// openMaps opens the pinned maps. The ones it has opened are returned also with an error.
func (l *Loader) openMaps(spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	if n := uint32(l.cfg.MaxEntries); n != 0 {
		for _, name := range []string{bpf.MetadMapIpTask, bpf.MetadMapNeighbours, bpf.MetadMapCounters} {
			spec.Maps[name].MaxEntries = n
		}
	}
	ms := map[string]*ebpf.Map{}
	for _, name := range pinned {
		m, err := openPinned(spec.Maps[name], l.cfg.PinDir, l.layout, l.log)
		if err != nil {
			return ms, err
		}
		ms[name] = m
	}
	// What was learned belongs to ports that may be gone and connections that are.
	if err := clearMap(ms[bpf.MetadMapNeighbours]); err != nil {
		return ms, fmt.Errorf("clear %s: %w", bpf.MetadMapNeighbours, err)
	}
	return ms, nil
}

func boolByte(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

func clearMap(m *ebpf.Map) error {
	var keys [][4]byte
	var key [4]byte
	value := make([]byte, m.ValueSize())
	it := m.Iterate()
	for it.Next(&key, &value) {
		keys = append(keys, key)
	}
	if err := it.Err(); err != nil {
		return err
	}
	for _, k := range keys {
		if err := m.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// pairHook is where one of our programs is on our own devices.
type pairHook struct {
	ns      netns.NsHandle
	ifindex int
	prog    *ebpf.Program
	name    string
	at      ebpf.AttachType
	parent  uint32
}

// pairHooks are those, in the order of pairLink.
func (l *Loader) pairHooks() []pairHook {
	return []pairHook{
		{l.server, l.metad1, l.objs.MetadCarry, bpf.MetadProgMetadCarry, ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS},
		{l.host, l.metad0, l.objs.MetadReply, bpf.MetadProgMetadReply, ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS},
		{l.host, l.metad0, l.objs.MetadHost, bpf.MetadProgMetadHost, ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS},
	}
}

// attachPair attaches to metad's own devices, which decides how to attach to all others.
func (l *Loader) attachPair() error {
	l.mode = l.cfg.Attach
	for _, d := range l.pairHooks() {
		if l.mode != AttachClsact {
			k, err := attachTCX(d.ns, d.ifindex, d.prog, d.at)
			switch {
			case err == nil:
				l.mode = AttachTCX
				low, err := l.fds.place(k, lowest)
				if err != nil {
					return err
				}
				l.pairLink = append(l.pairLink, low)
				continue
			case l.mode == AttachAuto && errors.Is(err, link.ErrNotSupported):
				l.mode = AttachClsact
			default:
				return fmt.Errorf("attach %s: %w", d.name, err)
			}
		}
		h, err := netlink.NewHandleAt(d.ns, unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		err = attachClsact(h, d.ifindex, d.prog, d.name, d.parent)
		h.Close()
		if err != nil {
			return fmt.Errorf("attach %s: %w", d.name, err)
		}
	}
	return nil
}

// Listen returns the listener on Endpoint in the server's namespace. An accepted connection's SO_MARK
// is a bpf.MetadTag or a task's tag. Call it once, after Open and before Arm; the caller closes it.
func (l *Loader) Listen() (net.Listener, error) {
	if err := l.fds.fill(); err != nil {
		return nil, err
	}
	var ln net.Listener
	err := inNS(l.server, func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), "tcp4", Endpoint.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in metad's namespace: %w", err)
	}
	l.listener = ln
	return ln, nil
}

// Arm starts taking packets for the endpoint, at all hooks at once.
func (l *Loader) Arm() error {
	if err := l.arm(); err != nil {
		return errors.Join(err, l.Disarm())
	}
	return nil
}

func (l *Loader) arm() error {
	programs := [bpf.MetadSlotSLOT_COUNT]*ebpf.Program{
		bpf.MetadSlotSLOT_PORT:   l.objs.FromPort,
		bpf.MetadSlotSLOT_BRIDGE: l.objs.FromBridge,
	}
	for slot, p := range slices.Backward(programs[:]) { // the other way round than they are emptied
		if err := l.objs.Slots.Put(uint32(slot), p); err != nil {
			return fmt.Errorf("arm: %w", err)
		}
	}
	if !l.cfg.HostRoute {
		return removeHostRoute(l.nl, l.metad0)
	}
	if err := addHostRoute(l.nl, l.metad0, l.server, l.metad1); err != nil {
		l.log.Warn("host processes do not reach the endpoint", zap.Error(err)) // and nobody else is hurt
	}
	return nil
}

// Disarm stops taking packets, those of open connections included. Answers still find their way out.
func (l *Loader) Disarm() error {
	var errs []error
	for slot := range bpf.MetadSlotSLOT_COUNT {
		if err := l.objs.Slots.Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("disarm: %w", err))
		}
	}
	errs = append(errs, removeHostRoute(l.nl, l.metad0))
	return errors.Join(errs...)
}

// Close takes everything out of the kernel but the pinned maps, which the next start takes over
// (Detach removes them too). With OnExitDrop the filters stay as well, and drop. The listener and
// its connections should be closed before. Closing again does nothing.
func (l *Loader) Close() error {
	l.closeOnce.Do(func() { l.closeErr = l.close() })
	return l.closeErr
}

func (l *Loader) close() error {
	var errs []error
	if l.objs != nil {
		errs = append(errs, l.Disarm())
	}
	l.pause()
	l.mu.Lock()
	for _, h := range l.hooks {
		if l.cfg.OnExit != OnExitDrop {
			errs = append(errs, l.unhook(h))
		}
	}
	l.mu.Unlock()
	for _, k := range slices.Backward(l.pairLink) {
		errs = append(errs, k.Close())
	}
	if l.metad0 != 0 {
		errs = append(errs, removeVeth(l.nl))
	}
	if l.objs != nil {
		errs = append(errs, l.objs.Close())
	}
	if l.server.IsOpen() {
		errs = append(errs, l.server.Close())
	}
	if l.nl != nil {
		l.nl.Close()
	}
	if l.host.IsOpen() {
		errs = append(errs, l.host.Close())
	}
	l.fds.close()
	return errors.Join(errs...)
}

// Put gives addr to the task in v, or replaces who had it. Counters start anew with a new tag.
// Errors: ErrFull; ErrNoPort if there is no device v.Ifindex.
func (l *Loader) Put(addr netip.Addr, v *bpf.MetadTaskValue) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	// Under the lock: if the device goes from here on, its going is heard of after the entry is in.
	if _, ok := l.links[int(v.Ifindex)]; !ok {
		if _, err := l.nl.LinkByIndex(int(v.Ifindex)); err != nil {
			return fmt.Errorf("put %s: ifindex %d: %w", addr, v.Ifindex, ErrNoPort)
		}
	}
	key := addr.As4()
	var had bpf.MetadTaskValue
	known := l.objs.IpTask.Lookup(&key, &had) == nil
	if !known || had.Tag != v.Tag {
		zero := make([]bpf.MetadTaskCounters, ebpf.MustPossibleCPU())
		if err := l.objs.Counters.Put(&key, zero); err != nil {
			return putErr(addr, bpf.MetadMapCounters, l.objs.Counters, err)
		}
	}
	if err := l.objs.IpTask.Put(&key, v); err != nil {
		return putErr(addr, bpf.MetadMapIpTask, l.objs.IpTask, err)
	}
	if known {
		l.forget(addr, had.Ifindex)
	}
	l.remember(addr, v.Ifindex)
	return nil
}

func putErr(addr netip.Addr, name string, m *ebpf.Map, err error) error {
	if errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("put %s: %s, %d entries: %w", addr, name, m.MaxEntries(), ErrFull)
	}
	return fmt.Errorf("put %s: %s: %w", addr, name, err)
}

// Delete takes addr from whoever had it; nobody is no error.
func (l *Loader) Delete(addr netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.delete(addr)
}

func (l *Loader) delete(addr netip.Addr) error {
	key := addr.As4()
	var had bpf.MetadTaskValue
	if l.objs.IpTask.Lookup(&key, &had) == nil {
		l.forget(addr, had.Ifindex)
	}
	var errs []error
	for _, m := range []*ebpf.Map{l.objs.IpTask, l.objs.Counters} { // the packets' view first
		if err := m.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("delete %s: %w", addr, err))
		}
	}
	return errors.Join(errs...)
}

func (l *Loader) remember(addr netip.Addr, ifindex uint32) {
	if l.byPort[ifindex] == nil {
		l.byPort[ifindex] = map[netip.Addr]bool{}
	}
	l.byPort[ifindex][addr] = true
}

func (l *Loader) forget(addr netip.Addr, ifindex uint32) {
	delete(l.byPort[ifindex], addr)
	if len(l.byPort[ifindex]) == 0 {
		delete(l.byPort, ifindex)
	}
}

// Entries returns what the kernel's map of tasks holds.
func (l *Loader) Entries() (map[netip.Addr]bpf.MetadTaskValue, error) {
	entries := map[netip.Addr]bpf.MetadTaskValue{}
	var key [4]byte
	var v bpf.MetadTaskValue
	it := l.objs.IpTask.Iterate()
	for it.Next(&key, &v) {
		entries[netip.AddrFrom4(key)] = v
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", bpf.MetadMapIpTask, err)
	}
	return entries, nil
}

// portGone forgets all that was known behind a device that exists no more.
func (l *Loader) portGone(ifindex int) error {
	var errs []error
	for addr := range maps.Clone(l.byPort[uint32(ifindex)]) {
		errs = append(errs, l.delete(addr))
	}
	var key [4]byte
	var n bpf.MetadNeighbour
	var gone [][4]byte
	it := l.objs.Neighbours.Iterate()
	for it.Next(&key, &n) {
		if n.Ifindex == uint32(ifindex) {
			gone = append(gone, key)
		}
	}
	for _, k := range gone {
		// The address may just have been seen again, on another port: look once more, as late as possible.
		if l.objs.Neighbours.Lookup(&k, &n) != nil || n.Ifindex != uint32(ifindex) {
			continue
		}
		if err := l.objs.Neighbours.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Detach removes what is left of metad in the host's namespace and under PinDir, whether it exited
// cleanly, was killed, or is still running: filters, links, metad0, pins. Nobody else's. Doing it
// again does nothing.
func Detach(cfg Config) (err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return fmt.Errorf("loader config: %w", err)
	}
	if err := checkHost(); err != nil {
		return err
	}
	ns, err := hostNS(cfg.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	all, err := whole(h.LinkList)
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, d := range all {
		errs = append(errs, detachClsact(h, d.Attrs().Index, netlink.HANDLE_MIN_INGRESS))
	}
	errs = append(errs, inNS(ns, func() error {
		var errs []error
		for _, d := range all {
			errs = append(errs, detachTCX(d.Attrs().Index))
		}
		return errors.Join(errs...)
	}))
	errs = append(errs, removeVeth(h), removePins(cfg.PinDir))
	return errors.Join(errs...)
}

// detachTCX takes our programs off the ingress hook of a device in the thread's namespace, also those
// whose links another process holds.
func detachTCX(ifindex int) error {
	q, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) ||
			errors.Is(err, os.ErrNotExist) {
			return nil // no TCX, nothing there, or the device is gone
		}
		return fmt.Errorf("query programs of ifindex %d: %w", ifindex, err)
	}
	var errs []error
	for _, a := range q.Programs {
		id, ok := a.LinkID()
		if !ok || !isOurs(a.ID) {
			continue
		}
		k, err := link.NewFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = errors.Join(k.Detach(), k.Close())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("detach from ifindex %d: %w", ifindex, err))
		}
	}
	return errors.Join(errs...)
}

func isOurs(id ebpf.ProgramID) bool {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return false
	}
	defer p.Close()
	info, err := p.Info()
	return err == nil && filterNames[info.Name]
}

// be32 is addr as the kernel keeps it in a __be32; 0 if it is not IPv4.
func be32(addr netip.Addr) uint32 {
	if !addr.Is4() {
		return 0
	}
	b := addr.As4()
	return binary.NativeEndian.Uint32(b[:])
}

// be16 is port as the kernel keeps it in a __be16.
func be16(port uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], port)
	return binary.NativeEndian.Uint16(b[:])
}

// addr4 reads an address as the kernel keeps it in a __be32, which the generated types show as uint32.
func addr4(be uint32) netip.Addr {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], be)
	return netip.AddrFrom4(b)
}
