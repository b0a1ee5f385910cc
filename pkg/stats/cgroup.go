package stats

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"metad/pkg/fdbudget"
	"metad/pkg/task"

	"golang.org/x/sys/unix"
)

// CgroupConfig says where the kernel's files are. The zero value is a host's usual places.
type CgroupConfig struct {
	CgroupRoot string // mount point of cgroup v2, or of the directory of the v1 controllers; "": /sys/fs/cgroup
	ProcRoot   string // "": /proc

	// Links lists a network namespace's interfaces; nil: ListLinks.
	Links func(nsfd int) ([]Link, error)

	Budget *fdbudget.Budget // of what is kept open; nil: the process's
}

func (c *CgroupConfig) setDefaults() {
	if c.CgroupRoot == "" {
		c.CgroupRoot = "/sys/fs/cgroup"
	}
	if c.ProcRoot == "" {
		c.ProcRoot = "/proc"
	}
	if c.Links == nil {
		c.Links = ListLinks
	}
	if c.Budget == nil {
		c.Budget = fdbudget.Process()
	}
}

// Visible reports whether the cgroup source can work here: the files of cgroup v1 or v2 and the host's
// processes are there to be read. In a private cgroup namespace (metad in a container of its own) what is
// outside it is not: the paths there begin with "/..".
func Visible(cfg CgroupConfig) bool {
	cfg.setDefaults()
	if b, err := os.ReadFile(filepath.Join(cfg.ProcRoot, "1/cgroup")); err != nil || bytes.Contains(b, []byte(":/..")) {
		return false
	}
	for _, name := range []string{"cgroup.controllers", "cpuacct/cpuacct.usage"} {
		if _, err := os.ReadFile(filepath.Join(cfg.CgroupRoot, name)); err == nil {
			return true
		}
	}
	return false
}

// CgroupSource reads the kernel's cgroup files, version 1 or 2, and the interfaces' counters. It
// computes what the Engine computes of them (moby: daemon/stats_unix.go, containerd/cgroups). It is
// used by one Sampler.
type CgroupSource struct {
	cfg      CgroupConfig
	v2       bool
	memTotal uint64 // of the host, which is what the Engine gives as the limit of a container without
	net      netSource

	files     *[fileCount]cgroupFile
	fileCount int // how many of them a container has at most, net/dev included

	// Scratch, and what all feeds share. Guarded by the sampler's lock, as every Feed is.
	buf    []byte
	path   []byte
	c      Counters
	blkio  [2][]BlkioEntry
	system struct {
		at     time.Time
		ns     uint64
		online uint32
	}
}

// NewCgroupSource returns the source for this host. It fails if the host's own files cannot be
// read. A host in hybrid mode, v1 controllers with an empty v2 tree beside them, is a v1 host.
func NewCgroupSource(cfg CgroupConfig) (*CgroupSource, error) {
	cfg.setDefaults()
	b, err := os.ReadFile(filepath.Join(cfg.ProcRoot, "meminfo"))
	if err != nil {
		return nil, fmt.Errorf("cgroup statistics: %w", err)
	}
	total, err := parseMemTotal(b)
	if err != nil {
		return nil, fmt.Errorf("cgroup statistics: meminfo: %w", err)
	}
	s := &CgroupSource{
		cfg:      cfg,
		memTotal: total,
		net:      newNetSource(cfg.ProcRoot, cfg.Links),
		files:    &filesV1,
		buf:      make([]byte, maxFileBytes),
	}
	if _, err := os.Stat(filepath.Join(cfg.CgroupRoot, "cgroup.controllers")); err == nil {
		s.v2, s.files = true, &filesV2
	}
	s.fileCount = 1
	for _, f := range s.files {
		if f.name != "" {
			s.fileCount++
		}
	}
	return s, nil
}

// Where a feed's directories are: cgroup v1 has one per controller, v2 one in all.
const (
	dirCPUAcct = iota // v2: the only one
	dirCPU
	dirMemory
	dirBlkio
	dirPids
	dirCount
)

var controllersV1 = [dirCount]string{"cpuacct", "cpu", "memory", "blkio", "pids"}

// The files that are read.
const (
	filePerCPU  = iota // v1
	fileCPUAcct        // v1
	fileCPUStat
	fileMemoryStat
	fileMemoryUsage
	fileMemoryPeak // v1
	fileMemoryFailures
	fileMemoryLimit
	fileIOBytes
	fileIOs // v1
	filePids
	filePidsLimit
	fileCount
)

// cgroupFile is the place of a file; the name ends in a NUL.
type cgroupFile struct {
	dir  int
	name string
	how  manner
}

var filesV1 = [fileCount]cgroupFile{
	filePerCPU:         {dirCPUAcct, "cpuacct.usage_percpu\x00", atOnce},
	fileCPUAcct:        {dirCPUAcct, "cpuacct.stat\x00", atOnce},
	fileCPUStat:        {dirCPU, "cpu.stat\x00", atOnce},
	fileMemoryStat:     {dirMemory, "memory.stat\x00", whole},
	fileMemoryUsage:    {dirMemory, "memory.usage_in_bytes\x00", atOnce},
	fileMemoryPeak:     {dirMemory, "memory.max_usage_in_bytes\x00", atOnce},
	fileMemoryFailures: {dirMemory, "memory.failcnt\x00", atOnce},
	fileMemoryLimit:    {dirMemory, "memory.limit_in_bytes\x00", atOnce},
	// Of blkio only the throttle files exist on the kernels we run on: CFQ's went with Linux 5.0.
	fileIOBytes:   {dirBlkio, "blkio.throttle.io_service_bytes\x00", whole},
	fileIOs:       {dirBlkio, "blkio.throttle.io_serviced\x00", whole},
	filePids:      {dirPids, "pids.current\x00", atOnce},
	filePidsLimit: {dirPids, "pids.max\x00", atOnce},
}

var filesV2 = [fileCount]cgroupFile{
	fileCPUStat:        {0, "cpu.stat\x00", whole},
	fileMemoryStat:     {0, "memory.stat\x00", whole},
	fileMemoryUsage:    {0, "memory.current\x00", atOnce},
	fileMemoryFailures: {0, "memory.events\x00", whole},
	fileMemoryLimit:    {0, "memory.max\x00", atOnce},
	fileIOBytes:        {0, "io.stat\x00", whole},
	filePids:           {0, "pids.current\x00", atOnce},
	filePidsLimit:      {0, "pids.max\x00", atOnce},
}

// rareEvery is how often numbers are read that change by hand only (docker update), or cannot have changed as long
// as others are what they are.
const rareEvery = 10 * time.Second

// rareNumbers are such numbers, as last read. Their files are not kept open.
type rareNumbers struct {
	due bool      // they are read in this reading
	at  time.Time // of the last one

	memoryLimit, memoryFailures, pidsLimit uint64
	periods                                uint64 // v1: none as long as the container's CPU time has no limit

	// What was read when the container had used this much CPU time and memory. As long as it uses no more of either, it
	// has not run, and only the kernel can have changed memory.stat (writing pages back): that shows the next time
	// that the numbers are due. memory.stat costs as much as all other files together.
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

// begin decides whether they are read in the reading at now. Containers that were opened together take turns.
func (r *rareNumbers) begin(now time.Time, turn int) {
	if r.due = now.Sub(r.at) >= rareEvery; !r.due {
		return
	}
	if r.at.IsZero() {
		now = now.Add(-time.Duration(turn) * time.Second % rareEvery)
	}
	r.at = now
}

// failing reports whether the memory's limit can have been hit since the last reading: it has been before, or is near.
func (r *rareNumbers) failing(m *Memory) bool {
	return r.memoryFailures != 0 || max(m.Usage, m.MaxUsage) > r.memoryLimit/2
}

// cgroupFeed is a container's cgroups. Between two readings nothing of it is open, or, while it is hot and the
// budget allows, all its files.
type cgroupFeed struct {
	src *CgroupSource
	pid int
	id  string
	net netFeed

	// Open during a reading that needs them. -1: not open, or the controller is not there: its part of the sample
	// is left empty, as the Engine leaves it.
	dir [dirCount]int32

	kept     [fileCount]keptFile
	held     int  // of the budget; 0: files are not kept
	complete bool // all of the files are open

	rare rareNumbers

	has              [dirCount]bool // v1: the controller is there
	cpuStat          bool           // v1: the kernel can throttle
	io, memory, pids bool           // v2: controllers enabled
}

// Open finds the container's cgroups by its process.
func (s *CgroupSource) Open(t *task.Task, c *task.Container, _ func(*Counters)) (Feed, error) {
	f := &cgroupFeed{src: s, pid: c.PID, id: c.ID}
	for i := range f.dir {
		f.dir[i] = -1
	}
	defer f.leave()
	process, eni := netProcess(t, c)
	var err error
	if f.net, err = s.net.open(process, eni, c.NetworkMode == "host"); err != nil {
		return nil, err
	}
	if err := f.reach(); err != nil {
		return nil, err
	}
	if err := f.describe(); err != nil {
		return nil, err
	}
	return f, nil
}

// reach opens the container's directories and net/dev. They are the container's, or it is an error.
func (f *cgroupFeed) reach() error {
	s := f.src
	proc, err := openProc(s.cfg.ProcRoot, f.pid)
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	// The network comes first: only after it do we learn that the process was the container's, and
	// a number used again meanwhile shows in the check.
	if err := f.net.reach(proc, f.pid, s.buf); err != nil {
		return err
	}
	membership, err := readFile(proc, "cgroup\x00", s.buf, inPieces)
	if err != nil {
		return fmt.Errorf("cgroup of process %d: %w", f.pid, gone(err))
	}
	if s.v2 {
		path, err := cgroupPath(membership, "", f.id)
		if err != nil {
			return err
		}
		return f.openCgroup(0, "", path)
	}
	for i, controller := range controllersV1 {
		path, err := cgroupPath(membership, controller, f.id)
		if errors.Is(err, errNoController) && i != dirCPUAcct {
			continue
		}
		if err != nil {
			return fmt.Errorf("controller %q: %w", controller, err)
		}
		if err := f.openCgroup(i, controller, path); err != nil {
			return err
		}
	}
	return nil
}

func (f *cgroupFeed) openCgroup(i int, controller string, path []byte) error {
	if f.dir[i] >= 0 {
		return nil
	}
	s := f.src
	s.path = append(append(s.path[:0], s.cfg.CgroupRoot...), '/')
	s.path = append(append(append(s.path, controller...), path...), 0)
	fd, err := openDir(s.path)
	f.dir[i] = int32(fd)
	return err
}

// describe finds out which controllers the container has. Its directories are open.
func (f *cgroupFeed) describe() error {
	s := f.src
	if !s.v2 {
		for i := range f.dir {
			f.has[i] = f.dir[i] >= 0
		}
		if f.has[dirCPU] {
			// A kernel without CONFIG_CFS_BANDWIDTH has no such file.
			_, err := f.file(fileCPUStat)
			f.cpuStat = err == nil
			if isShort(err) {
				return err
			}
		}
		return nil
	}
	list, err := readFile(int(f.dir[0]), "cgroup.controllers\x00", s.buf, whole)
	if err != nil {
		return gone(err)
	}
	list, _, _ = nextLine(list)
	for {
		var name []byte
		if name, list = nextField(list); len(name) == 0 {
			return nil
		}
		switch string(name) {
		case "io":
			f.io = true
		case "memory":
			f.memory = true
		case "pids":
			f.pids = true
		}
	}
}

// leave ends a reading: the directories are closed, and files that are not kept.
func (f *cgroupFeed) leave() {
	if f.held == 0 {
		f.net.dev.close()
	}
	for i, fd := range f.dir {
		if fd >= 0 {
			unix.Close(int(fd))
			f.dir[i] = -1
		}
	}
}

// Close lets go of what is open.
func (f *cgroupFeed) Close() { f.cool() }

// cool closes the files.
func (f *cgroupFeed) cool() {
	for i := range f.kept {
		f.kept[i].close()
	}
	f.net.dev.close()
	f.src.cfg.Budget.Drop(f.held)
	f.held, f.complete = 0, false
}

// budget decides whether the files stay open after the reading that begins.
func (f *cgroupFeed) budget(hot bool) {
	b := f.src.cfg.Budget
	switch {
	case f.held > 0 && (!hot || b.Over()):
		f.cool()
	case f.held == 0 && hot && b.Keep(f.src.fileCount):
		f.held = f.src.fileCount
	}
}

// filled takes note that a reading has opened all that it keeps, and gives back what it had no use for.
func (f *cgroupFeed) filled() {
	if f.held == 0 || f.complete {
		return
	}
	open := 0
	for i := range f.kept {
		if f.kept[i].fd != 0 {
			open++
		}
	}
	if f.net.dev.fd != 0 {
		open++
	}
	f.src.cfg.Budget.Drop(f.held - open)
	f.held, f.complete = open, true
}

// file reads a cgroup file into the source's buffer. The bytes are valid until the next one.
func (f *cgroupFeed) file(i int) ([]byte, error) { return f.read(i, true) }

// read is file, for a file that does not stay open unless keep says so.
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
	// The files of a removed cgroup are not there, or give ENODEV while they are read. Where the
	// cgroup lives on, a file that is missing is damage.
	if err := f.alive(at.dir); err != nil {
		return nil, err
	}
	if !errors.Is(err, errDamaged) {
		err = fmt.Errorf("%w: %w", errDamaged, err)
	}
	return nil, f.wrong(i, err)
}

// alive returns errGone if the cgroup is no more, another error if that could not be found out.
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

// wrong says which file an error is about.
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

// rarely reads a file of one number into dst if it is time for that.
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

// memoryStat reads memory.stat, unless it says what it said the last time.
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

// Sample reads everything now, but for the numbers that change rarely. The counters are valid until the next call on any feed of the source.
func (f *cgroupFeed) Sample(hot bool) (*Counters, error) {
	if f.net.waiting() {
		return nil, errNotYet
	}
	s := f.src
	f.budget(hot)
	defer f.leave()
	if !f.complete {
		if err := f.reach(); err != nil {
			return nil, err
		}
	}
	now := time.Now()
	f.rare.begin(now, f.pid)
	c := &s.c
	*c = Counters{
		Read:     now,
		CPU:      CPU{PerCPU: c.CPU.PerCPU[:0]},
		Memory:   Memory{Stats: c.Memory.Stats[:0]},
		Networks: c.Networks[:0],
	}
	var err error
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
	if c.Networks, err = f.net.read(c.Networks, s.buf, f.held > 0); err != nil {
		return nil, err
	}
	f.filled()
	return c, nil
}

// readSystem fills in the host's CPU time. The kernel counts it in ticks of 10 ms, so a reading is as
// good as new for that long, and the containers of one tick share it.
func (s *CgroupSource) readSystem(c *Counters) error {
	if now := time.Now(); s.system.at.IsZero() || now.Sub(s.system.at) >= nsPerTick {
		f, err := os.Open(filepath.Join(s.cfg.ProcRoot, "stat"))
		if err != nil {
			return err
		}
		// The CPUs come first; what follows them (interrupts) may be much longer.
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
	s := f.src
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
			if f.rare.memoryFailures, err = parseValue(b); err != nil {
				return f.wrong(fileMemoryFailures, err)
			}
		}
		c.Memory.Limit, c.Memory.Failcnt = f.rare.memoryLimit, f.rare.memoryFailures
	}
	if f.has[dirBlkio] {
		for i, file := range [2]int{fileIOBytes, fileIOs} {
			if b, err = f.file(file); err != nil {
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

func (f *cgroupFeed) readPids(c *Counters) error {
	err := errors.Join(f.value(filePids, &c.Pids.Current), f.rarely(filePidsLimit, &f.rare.pidsLimit))
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
		if err := errors.Join(f.value(fileMemoryUsage, &c.Memory.Usage), f.rarely(fileMemoryLimit, &f.rare.memoryLimit)); err != nil {
			return err
		}
		if err := f.memoryStat(&c.Memory, f.rare.idle(&c.CPU), memoryKeysV2, memoryIndexV2); err != nil {
			return err
		}
		if often := f.rare.failing(&c.Memory); often || f.rare.due {
			if b, err = f.read(fileMemoryFailures, often); err != nil {
				return err
			}
			if f.rare.memoryFailures, err = parseOOM(b); err != nil {
				return f.wrong(fileMemoryFailures, err)
			}
		}
		c.Memory.Limit, c.Memory.Failcnt = f.rare.memoryLimit, f.rare.memoryFailures
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

// gone turns the errors of a process that ended into errGone.
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return errGone
	}
	return err
}
