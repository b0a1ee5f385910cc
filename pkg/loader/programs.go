package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// programs are the programs and maps that this process has loaded.
type programs struct {
	*bpf.Objects
	verdicts []string // names, in the C's order
	layout   uint32
}

// sized are the maps whose size Config.MaxEntries sets. A process that takes over keeps the size
// that they have.
var sized = []string{bpf.MetadMapIpTask, bpf.MetadMapNeighbours, bpf.MetadMapCounters}

// load loads the programs. They use the maps in given, which another process has passed on. If
// given is nil, they use the pinned maps, or new ones.
func load(cfg *Config, e *endpoint, given map[string]*ebpf.Map) (*programs, error) {
	if err := rlimit.RemoveMemlock(); err != nil { // needed before Linux 5.11
		return nil, fmt.Errorf("%w: raise RLIMIT_MEMLOCK: %w", ErrPermission, err)
	}
	spec, err := bpf.LoadMetad()
	if err != nil {
		return nil, err
	}
	p := new(programs)
	if p.verdicts, err = verdictNames(spec.Types); err != nil {
		return nil, err
	}
	if p.layout, err = layoutOf(spec); err != nil {
		return nil, err
	}
	if err := setVariables(spec, cfg, e); err != nil {
		return nil, err
	}
	if given == nil {
		given, err = openMaps(spec, cfg, p.layout)
		defer closeMaps(given) // LoadAndAssign copies the descriptors
		if err != nil {
			return nil, err
		}
	} else {
		for _, name := range sized {
			if m := given[name]; m != nil {
				spec.Maps[name].MaxEntries = m.MaxEntries()
			}
		}
	}
	p.Objects = new(bpf.Objects)
	if err := spec.LoadAndAssign(p.Objects,
		&ebpf.CollectionOptions{MapReplacements: given}); err != nil {
		if errors.Is(err, ebpf.ErrMapIncompatible) {
			err = fmt.Errorf("%w: %w", ErrLayout, err)
		}
		return nil, fmt.Errorf("load programs: %w", err)
	}
	slots, err := highMap(p.Slots)
	if err != nil {
		p.Slots = nil // highMap has closed it
		return nil, errors.Join(err, p.Close())
	}
	p.Slots = slots
	return p, nil
}

// LayoutVersion returns the version of the maps' layout and of a takeover's offer.
func LayoutVersion() (uint32, error) {
	spec, err := bpf.LoadMetad()
	if err != nil {
		return 0, err
	}
	return layoutOf(spec)
}

func layoutOf(spec *ebpf.CollectionSpec) (v uint32, err error) {
	if err := spec.Variables[bpf.MetadVarLayoutVersion].Get(&v); err != nil {
		return 0, fmt.Errorf("layout version: %w", err)
	}
	return v, nil
}

// setVariables sets the programs' constants from the configuration and the endpoint.
func setVariables(spec *ebpf.CollectionSpec, cfg *Config, e *endpoint) error {
	nsid, err := e.netnsID()
	if err != nil {
		return err
	}
	agent := cfg.AgentAddr
	for name, value := range map[string]any{
		bpf.MetadVarHostAddr:      be32(HostAddr),
		bpf.MetadVarServerNetns:   uint32(nsid),
		bpf.MetadVarAgentAddr:     be32(agent.Addr()),
		bpf.MetadVarAgentDport:    be16(agent.Port()),
		bpf.MetadVarMetad0Ifindex: uint32(e.metad0),
		bpf.MetadVarTrustBridge:   uint8(boolToInt(cfg.TrustBridge)),
		bpf.MetadVarHostLevels:    cfg.HostLevels,
		bpf.MetadVarExitDrop:      uint8(boolToInt(cfg.OnExit == OnExitDrop)),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// openMaps opens the pinned maps. With an error it also returns the maps that it has opened.
func openMaps(spec *ebpf.CollectionSpec, cfg *Config, layout uint32) (map[string]*ebpf.Map, error) {
	if n := uint32(cfg.MaxEntries); n != 0 {
		for _, name := range sized {
			spec.Maps[name].MaxEntries = n
		}
	}
	ms := map[string]*ebpf.Map{}
	for _, name := range pinned {
		m, err := openPinned(spec.Maps[name], cfg.PinDir, layout, cfg.Log)
		if err != nil {
			return ms, err
		}
		ms[name] = m
	}
	return ms, nil
}

func closeMaps(ms map[string]*ebpf.Map) {
	for _, m := range ms {
		m.Close()
	}
}

// maps returns all maps by name, in the order of a takeover's files.
func (p *programs) maps() (names []string, ms []*ebpf.Map) {
	return []string{
			bpf.MetadMapIpTask, bpf.MetadMapNeighbours, bpf.MetadMapCounters,
			bpf.MetadMapVerdicts,
			bpf.MetadMapEvents, bpf.MetadMapEventGates, bpf.MetadMapSlots,
			bpf.MetadMapHandshakes,
			bpf.MetadMapContainerCgroup, bpf.MetadMapHostCgroup,
			bpf.MetadMapPortNeighbours,
		}, []*ebpf.Map{
			p.IpTask, p.Neighbours, p.Counters, p.Verdicts,
			p.Events, p.EventGates, p.Slots, p.Handshakes,
			p.ContainerCgroup, p.HostCgroup, p.PortNeighbours,
		}
}

// arm fills the program array. From then on the hooks send packets to the server.
func (p *programs) arm() error {
	programs := [bpf.SlotCount]*ebpf.Program{bpf.SlotPort: p.FromPort,
		bpf.SlotBridge: p.FromBridge}
	// in the reverse of the order in which disarm empties them
	for slot, prog := range slices.Backward(programs[:]) {
		if err := p.Slots.Put(uint32(slot), prog); err != nil {
			return fmt.Errorf("arm: %w", err)
		}
	}
	return nil
}

// disarm empties the program array. From then on the hooks take only packets of connections that
// the server has.
func (p *programs) disarm() error {
	var errs []error
	for slot := range bpf.SlotCount {
		if err := p.Slots.Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("disarm: %w", err))
		}
	}
	return errors.Join(errs...)
}

// busyTime is how long new connections of a busy source are dropped: no client repeats its SYN
// sooner than after a second.
const busyTime = 250 * time.Millisecond

// setBusy drops new connections with the tag for busyTime. It is safe for concurrent use.
func (p *programs) setBusy(tag uint32) error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil { // bpf_ktime_get_ns
		return fmt.Errorf("read the clock: %w", err)
	}
	if err := p.Busy.Put(tag, uint64(now.Nano()+int64(busyTime))); err != nil {
		return fmt.Errorf("set %s: %w", bpf.MetadMapBusy, err)
	}
	return nil
}

// be32 returns addr as the kernel stores it in a __be32, or 0 if addr is not IPv4.
func be32(addr netip.Addr) uint32 {
	if !addr.Is4() {
		return 0
	}
	b := addr.As4()
	return binary.NativeEndian.Uint32(b[:])
}

// be16 returns a TCP port as the kernel stores it in a __be16.
func be16(dport uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], dport)
	return binary.NativeEndian.Uint16(b[:])
}

// addr4 returns the address that the kernel has stored in a __be32. The generated types show a
// __be32 as uint32.
func addr4(be uint32) netip.Addr {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], be)
	return netip.AddrFrom4(b)
}
