package stats

import (
	"bytes"
	"fmt"
)

// parseProcStat reads the head of /proc/stat: the host's CPU time in nanoseconds, which is the sum
// of the first seven columns (guest time is in user time already), and the number of CPUs. Only
// whole lines count: the file may be cut off behind the CPUs.
func parseProcStat(b []byte) (system uint64, online uint32, err error) {
	for {
		line, rest, ok := nextLine(b)
		if !ok || len(line) < 4 || string(line[:3]) != "cpu" {
			break
		}
		b = rest
		if line[3] != ' ' {
			online++
			continue
		}
		line = line[4:]
		for range 7 {
			var v uint64
			if v, line, ok = nextUint(line); !ok {
				return 0, 0, fmt.Errorf("%w: too few columns", errDamaged)
			}
			system += v
		}
	}
	if system == 0 || online == 0 {
		return 0, 0, fmt.Errorf("%w: no CPU", errDamaged)
	}
	return system * nsPerTick, online, nil
}

// parseMemTotal returns MemTotal of /proc/meminfo in bytes.
func parseMemTotal(b []byte) (uint64, error) {
	for {
		line, rest, ok := nextLine(b)
		if !ok {
			return 0, fmt.Errorf("%w: no MemTotal", errDamaged)
		}
		b = rest
		if line, ok = bytes.CutPrefix(line, []byte("MemTotal:")); !ok {
			continue
		}
		if v, _, ok := nextUint(line); ok {
			return v * 1024, nil
		}
		return 0, fmt.Errorf("%w: MemTotal is not a number", errDamaged)
	}
}

// netLines walks /proc/<pid>/net/dev.
type netLines struct {
	rest []byte
	err  error
}

// newNetLines checks and cuts off the two lines of headings.
func newNetLines(b []byte) netLines {
	for range 2 {
		line, rest, ok := nextLine(b)
		if !ok || bytes.IndexByte(line, '|') < 0 {
			return netLines{err: fmt.Errorf("%w: no headings", errDamaged)}
		}
		b = rest
	}
	return netLines{rest: b}
}

// next returns the next interface's name, valid as long as the buffer, and fills n's counters.
func (l *netLines) next(n *Network) (name []byte, ok bool) {
	if l.err != nil || len(l.rest) == 0 {
		return nil, false
	}
	line, rest, ok := nextLine(l.rest)
	if !ok {
		l.err = fmt.Errorf("%w: half a line", errDamaged)
		return nil, false
	}
	l.rest = rest
	// A name may hold a colon; the numbers do not.
	i := bytes.LastIndexByte(line, ':')
	if i < 0 {
		l.err = fmt.Errorf("%w: no name", errDamaged)
		return nil, false
	}
	name = bytes.TrimLeft(line[:i], " ")
	line = line[i+1:]
	// bytes packets errs drop fifo frame compressed multicast | bytes packets errs drop …
	columns := [16]*uint64{
		0: &n.RxBytes, 1: &n.RxPackets, 2: &n.RxErrors, 3: &n.RxDropped,
		8: &n.TxBytes, 9: &n.TxPackets, 10: &n.TxErrors, 11: &n.TxDropped,
	}
	for _, c := range columns {
		var v uint64
		if v, line, ok = nextUint(line); !ok {
			l.err = fmt.Errorf("%w: too few columns", errDamaged)
			return nil, false
		}
		if c != nil {
			*c = v
		}
	}
	return name, true
}

// cgroupPath returns the path of the container's cgroup for a controller ("" for cgroup v2) as
// /proc/<pid>/cgroup tells it: up to the component that names the container, because its processes
// may have made cgroups of their own below. The error is errNoController when the controller is not
// mounted, and errNotOurs when nothing in its path names the container: then the process is not, or
// no longer, the container's.
func cgroupPath(b []byte, controller, id string) ([]byte, error) {
	for {
		line, rest, ok := nextLine(b)
		if !ok {
			return nil, errNoController
		}
		b = rest
		_, line, _ = bytes.Cut(line, []byte{':'}) // the hierarchy's number
		list, path, ok := bytes.Cut(line, []byte{':'})
		if !ok || !inList(list, controller) {
			continue
		}
		at := index(path, id)
		if id == "" || at < 0 || path[0] != '/' || bytes.Contains(path, []byte("/..")) {
			return nil, errNotOurs
		}
		if end := bytes.IndexByte(path[at:], '/'); end >= 0 {
			path = path[:at+end]
		}
		return path, nil
	}
}
