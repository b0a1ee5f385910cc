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

// defaultBundleDirs are the directories where containerd keeps the bundles of Docker's containers,
// if it is a service, and if it is a child of dockerd.
var defaultBundleDirs = []string{
	"/run/containerd/io.containerd.runtime.v2.task/moby",
	"/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby",
}

// pidFile is written into a bundle by runc create. At that time the container's process exists and
// its network is connected, but its program does not run yet.
const pidFile = "init.pid"

// newborn is a container that is about to run.
type newborn struct {
	id  string
	pid int
}

// bundles reports containers that are about to run. The Engine reports a container only after its
// start, and an inspect waits until then.
type bundles struct {
	dirs  []string
	file  *os.File // inotify
	found chan newborn

	mu    sync.Mutex
	paths map[int32]watchedDir // by watch descriptor
	roots map[string]bool      // those of dirs that are watched
}

// watchedDir is a directory that is watched.
type watchedDir struct {
	dir  string
	kind watchKind
}

type watchKind int

const (
	watchBundle watchKind = iota
	watchRoot             // one of dirs
	watchAbove            // where one of dirs, or what it is in, will come to be
)

var watchMasks = map[watchKind]uint32{
	watchBundle: unix.IN_MOVED_TO | unix.IN_CLOSE_WRITE | unix.IN_ONLYDIR,
	watchRoot:   unix.IN_CREATE | unix.IN_ONLYDIR,
	watchAbove:  unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_ONLYDIR,
}

func openBundles(dirs []string) (*bundles, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("start inotify: %w", err)
	}
	return &bundles{dirs: dirs, file: os.NewFile(uintptr(fd), "inotify"),
		found: make(chan newborn, 1024),
		paths: map[int32]watchedDir{}, roots: map[string]bool{}}, nil
}

// close ends run. It may be called more than once.
func (b *bundles) close() error {
	if err := b.file.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// watchRoots watches the directories that exist, and the nearest parents of those that do not:
// containerd makes them for the first container after a start of the host.
func (b *bundles) watchRoots() {
	for _, dir := range b.dirs {
		if !b.watches(dir) {
			b.watchRoot(dir, false)
		}
	}
}

// watchRoot watches root, or the nearest directory above it that exists. A new root may already
// have bundles.
func (b *bundles) watchRoot(root string, isNew bool) {
	kindOf := map[bool]watchKind{true: watchRoot, false: watchAbove}
	// tries: something that is there and cannot be watched is no reason to go on
	const most = 20
	for range most {
		dir, below := root, ""
		for !b.watch(dir, kindOf[dir == root]) {
			if dir == filepath.Dir(dir) {
				return
			}
			dir, below = filepath.Dir(dir), dir
		}
		if dir == root {
			if isNew {
				b.scan(root)
			}
			return
		}
		if _, err := os.Stat(below); err != nil {
			return
		}
		isNew = true // it has come to be since it was tried
	}
}

// appeared is called for a new directory that may be a root, or above one.
func (b *bundles) appeared(dir string) {
	for _, root := range b.dirs {
		if !b.watches(root) && strings.HasPrefix(root+"/", dir+"/") {
			b.watchRoot(root, true)
		}
	}
}

func (b *bundles) watches(root string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.roots[root]
}

// scan finds the bundles that were made before root was watched.
func (b *bundles) scan(root string) {
	list, _ := os.ReadDir(root) // none: it will appear
	for _, e := range list {
		b.bundle(filepath.Join(root, e.Name()))
	}
}

// bundle watches a new bundle.
func (b *bundles) bundle(dir string) {
	b.watch(dir, watchBundle)
	b.report(dir) // it may have been there before the watch
}

// watch watches a directory and reports whether that succeeded. If not, the Engine's events must
// do.
func (b *bundles) watch(dir string, kind watchKind) (ok bool) {
	conn, err := b.file.SyscallConn() // not the bare descriptor: it may be closed meanwhile
	if err != nil {
		return false
	}
	b.mu.Lock() // events must find the directory
	defer b.mu.Unlock()
	_ = conn.Control(func(fd uintptr) {
		wd, err := unix.InotifyAddWatch(int(fd), dir, watchMasks[kind])
		if ok = err == nil; !ok {
			return
		}
		b.paths[int32(wd)] = watchedDir{dir, kind}
		if kind == watchRoot {
			b.roots[dir] = true
		}
	})
	return ok
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
		// inotify(7): struct inotify_event is wd, mask, cookie and len, 4 bytes each, and
		// len bytes of name.
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(rest))
			mask := binary.NativeEndian.Uint32(rest[4:])
			end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(rest[12:]))
			if end > len(rest) {
				break
			}
			b.event(wd, mask,
				strings.TrimRight(string(rest[unix.SizeofInotifyEvent:end]),
					"\x00"))
			rest = rest[end:]
		}
	}
}

func (b *bundles) event(wd int32, mask uint32, name string) {
	b.mu.Lock()
	in := b.paths[wd]
	if mask&unix.IN_IGNORED != 0 { // removed
		delete(b.paths, wd)
		delete(b.roots, in.dir)
	}
	b.mu.Unlock()
	switch {
	case in.dir == "" || name == "":
	case in.kind == watchBundle:
		if name == pidFile {
			b.report(in.dir)
		}
	case mask&unix.IN_ISDIR == 0:
	case in.kind == watchRoot:
		b.bundle(filepath.Join(in.dir, name))
	default:
		b.appeared(filepath.Join(in.dir, name))
	}
}

// report reports the container of a bundle, if its process exists.
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
