package docker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// defaultBundleDirs are where containerd keeps the bundles of Docker's containers: as a service of
// its own, and as dockerd's child.
var defaultBundleDirs = []string{
	"/run/containerd/io.containerd.runtime.v2.task/moby",
	"/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby",
}

// pidFile is written into a bundle by runc create: the container's process exists then and its network is
// connected, but its program does not run yet.
const pidFile = "init.pid"

// newborn is a container that is about to run.
type newborn struct {
	id  string
	pid int
}

// bundles tells of containers that are about to run. The Engine says so only afterwards, and until
// then an inspect of the container is kept waiting.
type bundles struct {
	dirs  []string
	file  *os.File // inotify
	found chan newborn

	mu    sync.Mutex
	paths map[int32]string // watch descriptor → directory
	roots map[string]bool  // those of dirs that are watched
}

func openBundles(dirs []string) (*bundles, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("start inotify: %w", err)
	}
	return &bundles{dirs: dirs, file: os.NewFile(uintptr(fd), "inotify"), found: make(chan newborn, 1024),
		paths: map[int32]string{}, roots: map[string]bool{}}, nil
}

// close ends run. It may be called more than once.
func (b *bundles) close() error {
	if err := b.file.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// watchRoots watches what is there of the directories: containerd makes them when it needs them.
func (b *bundles) watchRoots() {
	for _, dir := range b.dirs {
		b.mu.Lock()
		watched := b.roots[dir]
		b.mu.Unlock()
		if !watched {
			b.watch(dir, unix.IN_CREATE|unix.IN_ONLYDIR, true)
		}
	}
}

// watch watches a directory, if it exists. What cannot be watched is left to the Engine to tell of.
func (b *bundles) watch(dir string, mask uint32, root bool) {
	conn, err := b.file.SyscallConn() // not the bare descriptor: it may be closed meanwhile
	if err != nil {
		return
	}
	b.mu.Lock() // events must find the directory
	defer b.mu.Unlock()
	_ = conn.Control(func(fd uintptr) {
		wd, err := unix.InotifyAddWatch(int(fd), dir, mask)
		if err != nil {
			return
		}
		b.paths[int32(wd)] = dir
		if root {
			b.roots[dir] = true
		}
	})
}

// run follows the directories until close.
func (b *bundles) run() error {
	buf := make([]byte, 64<<10)
	for {
		n, err := b.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read inotify: %w", err)
		}
		// inotify(7): struct inotify_event is wd, mask, cookie and len, 4 bytes each, and len bytes of name.
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(rest))
			mask := binary.NativeEndian.Uint32(rest[4:])
			end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(rest[12:]))
			if end > len(rest) {
				break
			}
			b.event(wd, mask, strings.TrimRight(string(rest[unix.SizeofInotifyEvent:end]), "\x00"))
			rest = rest[end:]
		}
	}
}

func (b *bundles) event(wd int32, mask uint32, name string) {
	b.mu.Lock()
	dir := b.paths[wd]
	root := b.roots[dir]
	if mask&unix.IN_IGNORED != 0 { // removed
		delete(b.paths, wd)
		delete(b.roots, dir)
	}
	b.mu.Unlock()
	switch {
	case dir == "" || name == "":
	case root && mask&unix.IN_ISDIR != 0:
		bundle := filepath.Join(dir, name)
		b.watch(bundle, unix.IN_MOVED_TO|unix.IN_CLOSE_WRITE|unix.IN_ONLYDIR, false)
		b.report(bundle) // it may have been there before the watch
	case !root && name == pidFile:
		b.report(dir)
	}
}

// report tells of the container of a bundle, if its process exists.
func (b *bundles) report(bundle string) {
	text, err := os.ReadFile(filepath.Join(bundle, pidFile))
	if err != nil {
		return
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid <= 0 {
		return
	}
	select {
	case b.found <- newborn{filepath.Base(bundle), pid}:
	default: // the Engine will tell
	}
}
