package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// VerdictCount is the number of packets with one verdict since the map was made. An earlier process
// may have made it.
type VerdictCount struct {
	Name    string // the C's name without VERDICT_, in lower case: "port_task"
	Packets uint64
}

// Verdicts returns all counts in the order of the C's enum.
func (l *Loader) Verdicts() ([]VerdictCount, error) {
	counts := make([]VerdictCount, len(l.progs.verdicts))
	var perCPU []bpf.VerdictCount
	for i, name := range l.progs.verdicts {
		key := uint32(i)
		if err := l.progs.Verdicts.Lookup(&key, &perCPU); err != nil {
			return nil, fmt.Errorf("read %s: %w", bpf.MetadMapVerdicts, err)
		}
		counts[i].Name = name
		for _, c := range perCPU {
			counts[i].Packets += c.Packets
		}
	}
	return counts, nil
}

// verdictNames reads the names from the C's enum, so that they are written once.
func verdictNames(types *btf.Spec) ([]string, error) {
	var e *btf.Enum
	if err := types.TypeByName("verdict", &e); err != nil {
		return nil, fmt.Errorf("enum verdict: %w", err)
	}
	names := make([]string, bpf.VerdictLimit)
	for _, v := range e.Values {
		if v.Value < uint64(len(names)) {
			names[v.Value] = strings.ToLower(strings.TrimPrefix(v.Name, "VERDICT_"))
		}
	}
	return names, nil
}

// TaskCounters counts what one task's address has sent.
type TaskCounters struct {
	Packets     uint64
	Bytes       uint64    // of frames
	Connections uint64    // SYNs
	LastSeen    time.Time // zero: never
}

// Counters returns the counters of every address that has a task.
func (l *Loader) Counters() (map[netip.Addr]TaskCounters, error) {
	all, err := l.tasks.counters.all()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", bpf.MetadMapCounters, err)
	}
	counters := make(map[netip.Addr]TaskCounters, len(all))
	for addr, perCPU := range all {
		var sum TaskCounters
		var last uint64
		for _, c := range perCPU {
			sum.Packets += c.Packets
			sum.Bytes += c.Bytes
			sum.Connections += c.Connections
			last = max(last, c.LastSeenNs)
		}
		if last != 0 {
			sum.LastSeen = fromKtime(last)
		}
		counters[addr] = sum
	}
	return counters, nil
}

// fromKtime converts bpf_ktime_get_ns, which is CLOCK_MONOTONIC.
func fromKtime(ns uint64) time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(int64(ns) - now.Nano()))
}

// Event is one packet of an unknown or refused source.
type Event struct {
	Verdict  string     // a name as in VerdictCount
	Addr     netip.Addr // its source
	MAC      [6]byte    // its source
	Ifindex  int        // of the device that it arrived at
	Time     time.Time
	HeldBack uint64 // packets since the last event, of which no event was made
}

// Events calls f for every event until ctx ends, and then returns nil. It makes one call at a time.
//
// The kernel makes at most one event a second for each verdict and device. Two devices can share a
// gate (event_gates in the C); then it makes one for both.
func (l *Loader) Events(ctx context.Context, f func(Event)) error {
	r, err := ringbuf.NewReader(l.progs.Events)
	if err != nil {
		return fmt.Errorf("read %s: %w", bpf.MetadMapEvents, err)
	}
	defer r.Close()
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	var rec ringbuf.Record
	for {
		if err := r.ReadInto(&rec); err != nil {
			if errors.Is(err, os.ErrClosed) && ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("read %s: %w", bpf.MetadMapEvents, err)
		}
		var e bpf.Event
		if _, err := binary.Decode(rec.RawSample, binary.NativeEndian, &e); err != nil {
			return fmt.Errorf("read %s: %w", bpf.MetadMapEvents, err)
		}
		f(Event{
			Verdict:  l.progs.verdicts[e.Verdict],
			Addr:     addr4(e.Addr),
			MAC:      e.Mac,
			Ifindex:  int(e.Ifindex),
			Time:     fromKtime(e.TimeNs),
			HeldBack: e.HeldBack,
		})
	}
}

// Ports returns the bridge devices and ports that are hooked or should be, in the order of their
// ifindexes.
func (l *Loader) Ports() []Port { return l.ports.list() }

// Status is the loader's state in numbers.
type Status struct {
	Attach          AttachMode // the chosen mode: tcx or clsact
	Metad0          int        // ifindex
	Bridges         int        // watched
	Ports           int        // hooked
	NotAttached     int        // bridges and ports that should be hooked and cannot be
	Pending         int        // ports that are not attached yet after a start
	Tasks           int        // addresses that have a task
	MaxTasks        int
	Resyncs         uint64 // full readings of the devices; above 1: messages were lost
	AttachErrors    uint64
	WaitingPatterns []string // bridge patterns that match nothing
	Unwatched       int      // task addresses of Loader.Unwatched
}

// Status returns the state now.
func (l *Loader) Status() Status {
	s := Status{Attach: l.tc.mode, Metad0: l.end.metad0, Tasks: l.tasks.count(),
		MaxTasks: l.tasks.max}
	l.ports.status(&s)
	s.Unwatched = len(l.Unwatched())
	return s
}

// Unwatched is a task's address behind a device that is not a port of a watched bridge. Its
// requests are refused or go to the ECS agent.
type Unwatched struct {
	Addr    netip.Addr
	Ifindex int
	Device  string
}

// Unwatched returns those addresses in order.
func (l *Loader) Unwatched() []Unwatched {
	var all []Unwatched
	for addr, ifindex := range l.tasks.behind() {
		if name, is := l.ports.unwatched(ifindex); is {
			all = append(all, Unwatched{addr, ifindex, name})
		}
	}
	slices.SortFunc(all, func(a, b Unwatched) int { return a.Addr.Compare(b.Addr) })
	return all
}

// HardwareAddr returns the MAC for printing.
func (e Event) HardwareAddr() net.HardwareAddr { return e.MAC[:] }
