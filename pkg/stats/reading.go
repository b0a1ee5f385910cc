package stats

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// rareEvery is how often the rare numbers are read. They change only by hand (docker update), or
// cannot have changed while other numbers are equal.
const rareEvery = 10 * time.Second

// rareNumbers are the rare numbers of the last reading. Their files are not kept open.
type rareNumbers struct {
	due bool      // they are read in this reading
	at  time.Time // of the last one

	memoryLimit, memoryFailures, pidsLimit uint64
	oomKills                               uint64
	hasKills                               bool
	periods                                uint64 // v1: none while CPU time has no limit

	// The last memory.stat, with the CPU time and the memory of the container at that time.
	// While both are equal, the container has not run, and only the kernel can have changed
	// memory.stat (by writing pages back). That shows when the rare numbers are due.
	// memory.stat costs as much as all other files together.
	cpu, memory uint64 // of the last reading
	times       [2]uint64
	stats       []uint64 // in the order of the keys
}

// idle reports whether the container has not run since the last reading.
func (r *rareNumbers) idle(c *CPU) bool {
	idle := !r.due && c.Total == r.cpu && r.stats != nil
	r.cpu = c.Total
	return idle
}

// begin decides whether the reading at now has them. Containers that were opened together take
// turns.
func (r *rareNumbers) begin(now time.Time, turn int) {
	if r.due = now.Sub(r.at) >= rareEvery; !r.due {
		return
	}
	if r.at.IsZero() {
		now = now.Add(-time.Duration(turn) * time.Second % rareEvery)
	}
	r.at = now
}

// failing reports whether the container can have hit its memory limit since the last reading: it
// has hit it before, or is near it.
func (r *rareNumbers) failing(m *Memory) bool {
	return r.memoryFailures != 0 || max(m.Usage, m.MaxUsage) > r.memoryLimit/2
}

// tell fills in what was read of the memory, now or before.
func (r *rareNumbers) tell(m *Memory) {
	m.Limit, m.Failcnt = r.memoryLimit, r.memoryFailures
	m.OOMKills, m.HasKills = r.oomKills, r.hasKills
}

// file reads a cgroup file into the source's buffer. The bytes are valid until the next one.
func (f *cgroupFeed) file(i int) ([]byte, error) { return f.read(i, true) }

// read is file for a file that stays open only with keep.
func (f *cgroupFeed) read(i int, keep bool) ([]byte, error) {
	keep = keep && f.held > 0
	if keep && f.kept[i].fd == 0 {
		f.complete = false // one file more
	}
	at := f.src.files[i]
	if f.kept[i].fd == 0 && f.dir[at.dir] < 0 {
		if err := f.reach(); err != nil {
			return nil, err
		}
	}
	b, err := f.kept[i].read(int(f.dir[at.dir]), at.name, f.src.buf, at.how, keep)
	if err == nil {
		return b, nil
	}
	if isShort(err) {
		return nil, f.wrong(i, err)
	}
	// The files of a removed cgroup are missing, or a read returns ENODEV. While the cgroup
	// exists, a missing file is damage.
	if err := f.alive(at.dir); err != nil {
		return nil, err
	}
	if !errors.Is(err, errDamaged) {
		err = fmt.Errorf("%w: %w", errDamaged, err)
	}
	return nil, f.wrong(i, err)
}

// alive returns errGone if the cgroup is gone, and another error if it cannot tell.
func (f *cgroupFeed) alive(dir int) error {
	if f.dir[dir] < 0 {
		if err := f.reach(); err != nil {
			return err
		}
	}
	fd, err := openat(int(f.dir[dir]), "cgroup.procs\x00")
	if isShort(err) {
		return err
	}
	if err != nil {
		return errGone
	}
	return unix.Close(fd)
}

// wrong adds the name of the file to an error.
func (f *cgroupFeed) wrong(i int, err error) error {
	if err == nil {
		return nil
	}
	name := f.src.files[i].name
	return fmt.Errorf("%s: %w", name[:len(name)-1], err)
}

func (f *cgroupFeed) value(i int, dst *uint64) error {
	b, err := f.file(i)
	if err == nil {
		*dst, err = parseValue(b)
		err = f.wrong(i, err)
	}
	return err
}

// rarely reads a file of one number into dst if the rare numbers are due.
func (f *cgroupFeed) rarely(i int, dst *uint64) error {
	if !f.rare.due {
		return nil
	}
	b, err := f.read(i, false)
	if err == nil {
		*dst, err = parseValue(b)
		err = f.wrong(i, err)
	}
	return err
}

// memoryStat reads memory.stat, unless it cannot have changed.
func (f *cgroupFeed) memoryStat(m *Memory, idle bool, keys []string, index map[string]int) error {
	r := &f.rare
	unchanged := idle && m.Usage == r.memory
	r.memory = m.Usage
	if unchanged {
		for i, v := range r.stats {
			m.Stats = append(m.Stats, Stat{Key: keys[i], Value: v})
		}
		return nil
	}
	b, err := f.file(fileMemoryStat)
	if err != nil {
		return err
	}
	if m.Stats, err = parseMemoryStat(b, m.Stats, keys, index); err != nil {
		return f.wrong(fileMemoryStat, err)
	}
	r.stats = slices.Grow(r.stats[:0], len(m.Stats))
	for _, s := range m.Stats {
		r.stats = append(r.stats, s.Value)
	}
	return nil
}

// Sample reads everything now, except rare numbers that are not due. The counters are valid until
// the next call on any feed of the source.
func (f *cgroupFeed) Sample(hot bool) (*Counters, error) {
	if f.net.waiting() {
		return nil, errNotYet
	}
	s := f.src
	f.budget(hot)
	defer f.leave()
	if !f.complete && !f.reached {
		if err := f.reach(); err != nil {
			return nil, err
		}
	}
	now := time.Now()
	c := &s.c
	*c = Counters{
		Read:     now,
		CPU:      CPU{PerCPU: c.CPU.PerCPU[:0]},
		Memory:   Memory{Stats: c.Memory.Stats[:0]},
		Networks: c.Networks[:0],
	}
	// First of all: the interfaces may not be listed yet, which would make the rest useless.
	var err error
	if c.Networks, err = f.net.read(c.Networks, s.buf, f.held > 0); err != nil {
		return nil, err
	}
	f.rare.begin(now, f.pid)
	if s.v2 {
		err = f.readV2(c)
	} else {
		err = f.readV1(c)
	}
	if err != nil {
		return nil, err
	}
	// The Engine's rule for a container without a limit.
	c.Memory.Limit = min(c.Memory.Limit, s.memTotal)
	if err := s.readSystem(c); err != nil {
		return nil, err
	}
	f.filled()
	return c, nil
}

// readSystem fills in the host's CPU time. The kernel counts it in ticks of 10 ms, so a reading
// stays good for that long, and the containers of one tick share it.
func (s *CgroupSource) readSystem(c *Counters) error {
	if now := time.Now(); s.system.at.IsZero() || now.Sub(s.system.at) >= nsPerTick {
		f, err := os.Open(filepath.Join(s.cfg.ProcRoot, "stat"))
		if err != nil {
			return err
		}
		// The CPUs come first; the interrupts after them may be much longer.
		n, err := f.Read(s.buf)
		f.Close()
		if err != nil {
			return fmt.Errorf("%w: stat: %w", errDamaged, err)
		}
		if s.system.ns, s.system.online, err = parseProcStat(s.buf[:n]); err != nil {
			return fmt.Errorf("stat: %w", err)
		}
		s.system.at = now
	}
	c.CPU.System, c.CPU.Online = s.system.ns, s.system.online
	return nil
}

func (f *cgroupFeed) readV1(c *Counters) error {
	b, err := f.file(filePerCPU)
	if err != nil {
		return err
	}
	if c.CPU.PerCPU, c.CPU.Total, err = parsePerCPU(b, c.CPU.PerCPU); err != nil {
		return f.wrong(filePerCPU, err)
	}
	idle := f.rare.idle(&c.CPU)
	if idle {
		c.CPU.User, c.CPU.Kernel = f.rare.times[0], f.rare.times[1]
	} else {
		if b, err = f.file(fileCPUAcct); err != nil {
			return err
		}
		if err := parseCPUAcctStat(b, &c.CPU); err != nil {
			return f.wrong(fileCPUAcct, err)
		}
		f.rare.times = [2]uint64{c.CPU.User, c.CPU.Kernel}
	}
	if f.cpuStat && (f.rare.due || f.rare.periods != 0) {
		if b, err = f.read(fileCPUStat, f.rare.periods != 0); err != nil {
			return err
		}
		if err := parseCPUStatV1(b, &c.CPU); err != nil {
			return f.wrong(fileCPUStat, err)
		}
		f.rare.periods = c.CPU.Periods
	}
	if f.has[dirMemory] {
		if err := f.value(fileMemoryUsage, &c.Memory.Usage); err != nil {
			return err
		}
		if err := f.memoryStat(&c.Memory, idle, memoryKeysV1, memoryIndexV1); err != nil {
			return err
		}
		if err := errors.Join(
			f.value(fileMemoryPeak, &c.Memory.MaxUsage),
			f.rarely(fileMemoryLimit, &f.rare.memoryLimit),
		); err != nil {
			return err
		}
		if often := f.rare.failing(&c.Memory); often || f.rare.due {
			if b, err = f.read(fileMemoryFailures, often); err != nil {
				return err
			}
			before := f.rare.memoryFailures
			if f.rare.memoryFailures, err = parseValue(b); err != nil {
				return f.wrong(fileMemoryFailures, err)
			}
			if err := f.oomKillsV1(before); err != nil {
				return err
			}
		}
		f.rare.tell(&c.Memory)
	}
	if f.has[dirBlkio] {
		if err := f.readBlkioV1(c); err != nil {
			return err
		}
	}
	if f.has[dirPids] {
		if err := f.readPids(c); err != nil {
			return err
		}
		if c.Pids.Limit == math.MaxUint64 {
			c.Pids.Limit = 0
		}
	}
	return nil
}

func (f *cgroupFeed) readBlkioV1(c *Counters) error {
	s := f.src
	for i, file := range [2]int{fileIOBytes, fileIOs} {
		b, err := f.file(file)
		if err != nil {
			return err
		}
		if s.blkio[i], err = parseBlkio(b, s.blkio[i]); err != nil {
			return f.wrong(file, err)
		}
	}
	none := []BlkioEntry{}
	c.Blkio = Blkio{
		ServiceBytes: s.blkio[0], Serviced: s.blkio[1], Queue: none, ServiceTime: none,
		WaitTime: none, Merged: none, Time: none, Sectors: none,
	}
	return nil
}

// oomKillsV1 reads how many processes were killed, if the memory limit was hit since it was hit
// before times, or the rare numbers are due: the host's memory can run out too. A container whose
// file is not as it should be has no such number; the Engine has none either.
func (f *cgroupFeed) oomKillsV1(before uint64) error {
	if !f.rare.due && f.rare.memoryFailures == before {
		return nil
	}
	b, err := f.read(fileMemoryOOM, false)
	if err == nil {
		f.rare.oomKills, f.rare.hasKills, err = parsePair(b, "oom_kill")
	}
	if errors.Is(err, errDamaged) {
		f.rare.oomKills, f.rare.hasKills = 0, false
		return nil
	}
	return err
}

func (f *cgroupFeed) readPids(c *Counters) error {
	err := errors.Join(
		f.value(filePids, &c.Pids.Current),
		f.rarely(filePidsLimit, &f.rare.pidsLimit),
	)
	c.Pids.Limit = f.rare.pidsLimit
	return err
}

func (f *cgroupFeed) readV2(c *Counters) error {
	s := f.src
	b, err := f.file(fileCPUStat)
	if err != nil {
		return err
	}
	if err := parseCPUStatV2(b, &c.CPU); err != nil {
		return f.wrong(fileCPUStat, err)
	}
	if f.memory {
		if err := errors.Join(
			f.value(fileMemoryUsage, &c.Memory.Usage),
			f.rarely(fileMemoryLimit, &f.rare.memoryLimit),
		); err != nil {
			return err
		}
		idle := f.rare.idle(&c.CPU)
		if err := f.memoryStat(&c.Memory, idle, memoryKeysV2, memoryIndexV2); err != nil {
			return err
		}
		if often := f.rare.failing(&c.Memory); often || f.rare.due {
			if b, err = f.read(fileMemoryFailures, often); err != nil {
				return err
			}
			if f.rare.memoryFailures, err = parseOOM(b); err != nil {
				return f.wrong(fileMemoryFailures, err)
			}
			f.rare.oomKills, f.rare.hasKills, _ = parsePair(b, "oom_kill")
		}
		f.rare.tell(&c.Memory)
	}
	if f.io {
		if b, err = f.file(fileIOBytes); err != nil {
			return err
		}
		if s.blkio[0], err = parseIOStat(b, s.blkio[0]); err != nil {
			return f.wrong(fileIOBytes, err)
		}
		if len(s.blkio[0]) > 0 {
			c.Blkio.ServiceBytes = s.blkio[0]
		}
	}
	if f.pids {
		return f.readPids(c)
	}
	return nil
}

// gone returns errGone for the errors of a process that has ended.
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return errGone
	}
	return err
}
