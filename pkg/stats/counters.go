package stats

import "time"

// Counters is one reading of a container's counters, in the terms and units of the Engine API. The
// next reading uses the slices again, so a caller that keeps one copies it.
type Counters struct {
	Read     time.Time
	CPU      CPU
	Memory   Memory
	Pids     Pids
	Blkio    Blkio
	Networks []Network // ascending by name; empty: the key is left out
}

// CPU is cpu_stats. Times are nanoseconds.
type CPU struct {
	Total, Kernel, User uint64
	PerCPU              []uint64 // printed only if there is one for every online CPU
	System              uint64   // of the whole host
	Online              uint32

	Periods, ThrottledPeriods, ThrottledTime uint64
}

// Memory is memory_stats, in bytes except for Failcnt and OOMKills.
type Memory struct {
	Usage, MaxUsage, Failcnt, Limit uint64

	OOMKills uint64 // processes that the kernel killed for want of memory; not printed
	HasKills bool   // OOMKills is known: the Engine tells no such number

	Stats []Stat // ascending by key
}

// Stat is one element of memory_stats.stats.
type Stat struct {
	Key   string
	Value uint64
}

// Pids is pids_stats. As in Docker, no limit is 0 in cgroup v1 and the largest number in v2.
type Pids struct{ Current, Limit uint64 }

// Blkio is blkio_stats. A nil list prints as null, an empty one as [].
type Blkio struct {
	ServiceBytes, Serviced, Queue, ServiceTime, WaitTime, Merged, Time, Sectors []BlkioEntry
}

// BlkioEntry is one number of one block device.
type BlkioEntry struct {
	Major, Minor uint64
	Op           string // "Read", "Write", … in cgroup v1; "read", "write" in v2
	Value        uint64
}

// Network is one interface of networks.
type Network struct {
	Name string

	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// lists returns the lists in the order in which they are printed.
func (b *Blkio) lists() [8]*[]BlkioEntry {
	return [8]*[]BlkioEntry{&b.ServiceBytes, &b.Serviced, &b.Queue, &b.ServiceTime, &b.WaitTime,
		&b.Merged, &b.Time, &b.Sectors}
}
