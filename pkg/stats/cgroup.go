package stats

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"metad/pkg/fdbudget"
	"metad/pkg/task"

	"golang.org/x/sys/unix"
)

// CgroupConfig holds the places of the kernel's files. The zero value means the usual places.
type CgroupConfig struct {
	// mount point of cgroup v2, or of the directory of the v1 controllers; "": /sys/fs/cgroup
	CgroupRoot string
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

// Visible reports whether the cgroup source can work here: it must be able to read the files of
// cgroup v1 or v2 and the host's processes. In a private cgroup namespace (metad in a container)
// it cannot read the other cgroups: their paths begin with "/..".
func Visible(cfg CgroupConfig) bool {
	cfg.setDefaults()
	b, err := os.ReadFile(filepath.Join(cfg.ProcRoot, "1/cgroup"))
	if err != nil || bytes.Contains(b, []byte(":/..")) {
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
	cfg CgroupConfig
	v2  bool
	// of the host, which is what the Engine gives as the limit of a container without
	memTotal uint64
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
	fileMemoryOOM // v1
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
	fileMemoryOOM:      {dirMemory, "memory.oom_control\x00", atOnce},
	fileMemoryLimit:    {dirMemory, "memory.limit_in_bytes\x00", atOnce},
	// Of blkio only the throttle files exist on the kernels we run on: CFQ's went with Linux
	// 5.0.
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

// cgroupFeed is a container's cgroups. Between two readings nothing of it is open, or, while it is
// hot and the budget allows, all its files.
type cgroupFeed struct {
	src *CgroupSource
	pid int
	id  string
	net netFeed

	// Open during a reading that needs them. -1: not open, or the controller is not there: its
	// part of the sample is left empty, as the Engine leaves it.
	dir [dirCount]int32
	// Open has opened them, and net/dev, for the first reading, which follows at once
	reached bool

	kept     [fileCount]keptFile
	held     int  // of the budget; 0: files are not kept
	complete bool // all of the files are open

	rare rareNumbers

	has              [dirCount]bool // v1: the controller is there
	cpuStat          bool           // v1: the kernel can throttle
	io, memory, pids bool           // v2: controllers enabled
}

// Open finds the container's cgroups through its process.
func (s *CgroupSource) Open(t *task.Task, c *task.Container, _ func(*Counters)) (Feed, error) {
	f := &cgroupFeed{src: s, pid: c.PID, id: c.ID}
	for i := range f.dir {
		f.dir[i] = -1
	}
	process, eni := netProcess(t, c)
	var err error
	if f.net, err = s.net.open(process, eni, c.NetworkMode == "host"); err != nil {
		return nil, err
	}
	if err = f.reach(); err == nil {
		err = f.describe()
	}
	if err != nil {
		f.leave()
		return nil, err
	}
	f.reached = true
	return f, nil
}

// reach opens the container's directories and net/dev. It returns an error if they are not the
// container's.
func (f *cgroupFeed) reach() error {
	s := f.src
	proc, err := openProc(s.cfg.ProcRoot, f.pid)
	if err != nil {
		return err
	}
	defer unix.Close(proc)
	// The network comes first. The check that the process is the container's comes after it,
	// and so finds a process number that was used again meanwhile.
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

// describe finds which controllers the container has. Its directories must be open.
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

// leave ends a reading: it closes the directories and the files that are not kept.
func (f *cgroupFeed) leave() {
	f.reached = false
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

// Close closes all files.
func (f *cgroupFeed) Close() {
	f.cool()
	f.leave()
}

// cool closes the files that are kept.
func (f *cgroupFeed) cool() {
	for i := range f.kept {
		f.kept[i].close()
	}
	f.net.dev.close()
	f.src.cfg.Budget.Drop(f.held)
	f.held, f.complete = 0, false
}

// budget decides whether the files stay open after the coming reading.
func (f *cgroupFeed) budget(hot bool) {
	b := f.src.cfg.Budget
	switch {
	case f.held > 0 && (!hot || b.Over()):
		f.cool()
	case f.held == 0 && hot && b.Keep(f.src.fileCount):
		f.held = f.src.fileCount
	}
}

// filled is called when a reading has opened all the files that it keeps. It returns the rest of
// the budget.
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
