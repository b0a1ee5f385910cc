package stats

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
)

// errDamaged means that a file does not have the kernel's format.
var errDamaged = errors.New("damaged")

// The errors of cgroupPath.
var (
	errNoController = errors.New("controller is not mounted")
	errNotOurs      = errors.New("process is not in the container's cgroup")
)

// userHZ is the unit of cpuacct.stat and /proc/stat, the same on every architecture (sysconf's
// _SC_CLK_TCK); nsPerTick converts it.
const (
	userHZ    = 100
	nsPerTick = 1e9 / userHZ
)

// maxNumbers is the largest number of CPUs, devices or interfaces in a file. The kernel has at
// most 8192 CPUs.
const maxNumbers = 8192

// The keys of memory_stats.stats, as the Engine prints them: ascending. The kernel's files hold
// more keys, which are not shown. A key that they lack is 0 (moby: daemon/stats_unix.go).
var (
	memoryKeysV1 = []string{
		"active_anon", "active_file", "cache", "dirty", "hierarchical_memory_limit",
		"hierarchical_memsw_limit",
		"inactive_anon", "inactive_file", "mapped_file", "pgfault", "pgmajfault", "pgpgin",
		"pgpgout", "rss", "rss_huge",
		"total_active_anon", "total_active_file", "total_cache", "total_dirty",
		"total_inactive_anon",
		"total_inactive_file", "total_mapped_file", "total_pgfault", "total_pgmajfault",
		"total_pgpgin",
		"total_pgpgout", "total_rss", "total_rss_huge", "total_unevictable",
		"total_writeback", "unevictable", "writeback",
	}
	memoryKeysV2 = []string{
		"active_anon", "active_file", "anon", "anon_thp", "file", "file_dirty",
		"file_mapped", "file_writeback",
		"inactive_anon", "inactive_file", "kernel_stack", "pgactivate", "pgdeactivate",
		"pgfault", "pglazyfree",
		"pglazyfreed", "pgmajfault", "pgrefill", "pgscan", "pgsteal", "shmem", "slab",
		"slab_reclaimable",
		"slab_unreclaimable", "sock", "thp_collapse_alloc", "thp_fault_alloc",
		"unevictable", "workingset_activate",
		"workingset_nodereclaim", "workingset_refault",
	}
	memoryIndexV1 = indexOf(memoryKeysV1)
	memoryIndexV2 = indexOf(memoryKeysV2)
)

func indexOf(keys []string) map[string]int {
	m := make(map[string]int, len(keys))
	for i, k := range keys {
		m[k] = i
	}
	return m
}

// parseValue reads a file of one number; "max" is the largest.
func parseValue(b []byte) (uint64, error) {
	line, rest, ok := nextLine(b)
	if !ok || len(rest) > 0 {
		return 0, fmt.Errorf("%w: not one line", errDamaged)
	}
	if string(line) == "max" {
		return math.MaxUint64, nil
	}
	v, ok := parseUint(line)
	if !ok {
		return 0, fmt.Errorf("%w: not a number", errDamaged)
	}
	return v, nil
}

// parsePerCPU reads cpuacct.usage_percpu, "n n n \n", into dst. Their sum is cpuacct.usage: the
// kernel adds up the same counters.
func parsePerCPU(b []byte, dst []uint64) ([]uint64, uint64, error) {
	dst = dst[:0]
	line, rest, ok := nextLine(b)
	if !ok || len(rest) > 0 {
		return dst, 0, fmt.Errorf("%w: not one line", errDamaged)
	}
	var sum uint64
	for {
		var f []byte
		if f, line = nextField(line); len(f) == 0 {
			break
		}
		v, ok := parseUint(f)
		if !ok || len(dst) == maxNumbers {
			return dst, 0, fmt.Errorf("%w: not a number per CPU", errDamaged)
		}
		dst = append(dst, v)
		sum += v
	}
	if len(dst) == 0 {
		return dst, 0, fmt.Errorf("%w: no CPU", errDamaged)
	}
	return dst, sum, nil
}

// parseMemoryStat reads memory.stat of either cgroup version into dst, one element for each of
// keys.
func parseMemoryStat(b []byte, dst []Stat, keys []string, index map[string]int) ([]Stat, error) {
	dst = slices.Grow(dst[:0], len(keys))[:len(keys)]
	for i, k := range keys {
		dst[i] = Stat{Key: k}
	}
	found := 0
	p := pairs{rest: b}
	for key, v, ok := p.next(); ok; key, v, ok = p.next() {
		if i, known := index[string(key)]; known {
			dst[i].Value = v
			found++
		}
	}
	if p.err != nil {
		return dst, p.err
	}
	// A kernel lacks a few of the keys at most (swap accounting off, a key renamed). Less than
	// half of them is a file cut off between two lines.
	if found < len(keys)/2 {
		return dst, fmt.Errorf("%w: only %d of %d keys", errDamaged, found, len(keys))
	}
	return dst, nil
}

// parseCPUStatV1 reads the throttling of cgroup v1's cpu.stat.
func parseCPUStatV1(b []byte, c *CPU) error {
	found := 0
	p := pairs{rest: b}
	for key, v, ok := p.next(); ok; key, v, ok = p.next() {
		switch string(key) {
		case "nr_periods":
			c.Periods = v
		case "nr_throttled":
			c.ThrottledPeriods = v
		case "throttled_time":
			c.ThrottledTime = v
		default:
			continue
		}
		found++
	}
	if p.err == nil && found != 3 {
		return fmt.Errorf("%w: keys missing", errDamaged)
	}
	return p.err
}

// parseCPUAcctStat reads cgroup v1's cpuacct.stat.
func parseCPUAcctStat(b []byte, c *CPU) error {
	found := 0
	p := pairs{rest: b}
	for key, v, ok := p.next(); ok; key, v, ok = p.next() {
		switch string(key) {
		case "user":
			c.User = v * nsPerTick
		case "system":
			c.Kernel = v * nsPerTick
		default:
			continue
		}
		found++
	}
	if p.err == nil && found != 2 {
		return fmt.Errorf("%w: keys missing", errDamaged)
	}
	return p.err
}

// parseCPUStatV2 reads cgroup v2's cpu.stat. The throttling is not there without the cpu
// controller.
func parseCPUStatV2(b []byte, c *CPU) error {
	found := 0
	p := pairs{rest: b}
	for key, v, ok := p.next(); ok; key, v, ok = p.next() {
		switch string(key) {
		case "usage_usec":
			c.Total = v * 1000
			found++
		case "user_usec":
			c.User = v * 1000
			found++
		case "system_usec":
			c.Kernel = v * 1000
			found++
		case "nr_periods":
			c.Periods = v
		case "nr_throttled":
			c.ThrottledPeriods = v
		case "throttled_usec":
			c.ThrottledTime = v * 1000
		}
	}
	if p.err == nil && found != 3 {
		return fmt.Errorf("%w: keys missing", errDamaged)
	}
	return p.err
}

// parseOOM returns "oom" of memory.events, which the Engine reports as failcnt.
func parseOOM(b []byte) (oom uint64, err error) {
	oom, found, err := parsePair(b, "oom")
	if err == nil && !found {
		err = fmt.Errorf("%w: no oom", errDamaged)
	}
	return oom, err
}

// parsePair returns the number of one key, and whether it is there.
func parsePair(b []byte, want string) (n uint64, found bool, err error) {
	p := pairs{rest: b}
	for key, v, ok := p.next(); ok; key, v, ok = p.next() {
		if string(key) == want {
			n, found = v, true
		}
	}
	return n, found, p.err
}

// device reads "major:minor".
func device(f []byte) (major, minor uint64, ok bool) {
	i := bytes.IndexByte(f, ':')
	if i < 0 {
		return 0, 0, false
	}
	major, ok = parseUint(f[:i])
	if !ok {
		return 0, 0, false
	}
	minor, ok = parseUint(f[i+1:])
	return major, minor, ok
}

// blkioOp returns op as a string that needs no memory of its own.
func blkioOp(op []byte) (string, bool) {
	switch string(op) {
	case "Read":
		return "Read", true
	case "Write":
		return "Write", true
	case "Sync":
		return "Sync", true
	case "Async":
		return "Async", true
	case "Discard":
		return "Discard", true
	case "Total":
		return "Total", true
	}
	return "", false
}

// parseBlkio reads a file of cgroup v1's blkio.throttle.*: "8:0 Read 4096" lines, and "Total 4096",
// which is not shown. The result is never nil.
func parseBlkio(b []byte, dst []BlkioEntry) ([]BlkioEntry, error) {
	if dst = dst[:0]; dst == nil {
		dst = []BlkioEntry{}
	}
	if len(b) == 0 {
		return dst, fmt.Errorf("%w: no total", errDamaged)
	}
	for len(b) > 0 {
		line, rest, ok := nextLine(b)
		if !ok {
			return dst, fmt.Errorf("%w: half a line", errDamaged)
		}
		b = rest
		dev, line := nextField(line)
		if string(dev) == "Total" {
			continue
		}
		var e BlkioEntry
		if e.Major, e.Minor, ok = device(dev); !ok {
			return dst, fmt.Errorf("%w: not a device", errDamaged)
		}
		op, line := nextField(line)
		if e.Op, ok = blkioOp(op); !ok {
			return dst, fmt.Errorf("%w: unknown operation", errDamaged)
		}
		if e.Value, _, ok = nextUint(line); !ok || len(dst) == maxNumbers {
			return dst, fmt.Errorf("%w: not a number", errDamaged)
		}
		dst = append(dst, e)
	}
	return dst, nil
}

// parseIOStat reads cgroup v2's io.stat: "8:0 rbytes=4096 wbytes=0 rios=1 …", a read and a write
// entry for each device.
//
// Kernels before 5.18 can forget to end the line of a device without counters ("8:16 8:0
// rbytes=…"): the numbers belong to the last device named.
func parseIOStat(b []byte, dst []BlkioEntry) ([]BlkioEntry, error) {
	dst = dst[:0]
	for len(b) > 0 {
		line, rest, ok := nextLine(b)
		if !ok {
			return dst, fmt.Errorf("%w: half a line", errDamaged)
		}
		b = rest
		dev, line := nextField(line)
		major, minor, ok := device(dev)
		if !ok {
			return dst, fmt.Errorf("%w: not a device", errDamaged)
		}
		var rbytes, wbytes uint64
		some := false
		for {
			var f []byte
			if f, line = nextField(line); len(f) == 0 {
				break
			}
			i := bytes.IndexByte(f, '=')
			if i < 0 {
				if major, minor, ok = device(f); !ok {
					return dst, fmt.Errorf("%w: not a pair", errDamaged)
				}
				continue
			}
			some = true
			switch string(f[:i]) {
			case "rbytes":
				rbytes, ok = parseUint(f[i+1:])
			case "wbytes":
				wbytes, ok = parseUint(f[i+1:])
			}
			if !ok {
				return dst, fmt.Errorf("%w: not a number", errDamaged)
			}
		}
		if !some {
			continue
		}
		if len(dst)+2 > maxNumbers {
			return dst, fmt.Errorf("%w: too many devices", errDamaged)
		}
		dst = append(dst,
			BlkioEntry{Major: major, Minor: minor, Op: "read", Value: rbytes},
			BlkioEntry{Major: major, Minor: minor, Op: "write", Value: wbytes})
	}
	return dst, nil
}
