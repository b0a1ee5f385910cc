package docker

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"metad/pkg/task"
)

// Cgroups finds containers' own cgroups of version 2. Safe for concurrent use.
type Cgroups struct {
	procRoot string
	root     string // where version 2 is mounted; "": the host has none
}

// OpenCgroups looks for version 2 below mounted, where the host has its cgroups: there itself, or
// beside the controllers of version 1. procRoot is where the host's processes are seen. A metad in
// a cgroup namespace of its own sees no other process's cgroup as it is called outside: then none
// is found.
func OpenCgroups(procRoot, mounted string) *Cgroups {
	for _, root := range []string{mounted, filepath.Join(mounted, "unified")} {
		var fs unix.Statfs_t
		if unix.Statfs(root, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			return &Cgroups{procRoot, root}
		}
	}
	return &Cgroups{procRoot: procRoot}
}

// of returns the cgroup that was made for the container with the full id, of which pid is a
// process; zero if it has none. The directory is named after the container, so that a process id
// that is another's by now does no harm.
func (g *Cgroups) of(pid int, id string) task.Cgroup {
	if g.root == "" {
		return task.Cgroup{}
	}
	list, err := os.ReadFile(filepath.Join(g.procRoot, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return task.Cgroup{}
	}
	path, level := ownCgroup(string(list), id)
	var st unix.Stat_t
	if level == 0 || unix.Stat(filepath.Join(g.root, path), &st) != nil {
		return task.Cgroup{}
	}
	return task.Cgroup{ID: st.Ino, Level: level}
}

// Container returns the full id of the container that the cgroup with the id, or one above it, was
// made for: the one nearest to the root, whose packets they are. Nothing needs to be known of the
// container for that. It returns "" if there is none, the cgroup is gone, or the kernel does not
// show it: that takes CAP_DAC_READ_SEARCH, and a metad that sees the host's cgroups from their
// root.
func (g *Cgroups) Container(cgroup uint64) string {
	if g.root == "" {
		return ""
	}
	mount, err := os.Open(g.root)
	if err != nil {
		return ""
	}
	defer mount.Close()
	// FILEID_KERNFS, since Linux 5.5: a directory's handle is the cgroup's
	// id.
	const kernfs = 0xfe
	handle := unix.NewFileHandle(kernfs, binary.NativeEndian.AppendUint64(nil, cgroup))
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), handle, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return ""
	}
	below, ok := strings.CutPrefix(path, g.root+"/")
	if !ok {
		return ""
	}
	return nearest(below)
}

// nearest returns the id of the first container that a path's directories are named after, "" if
// there is none.
func nearest(path string) string {
	for name := range strings.SplitSeq(path, "/") {
		if id := containerID(name); id != "" {
			return id
		}
	}
	return ""
}

// ownCgroup returns the path of the container's own cgroup and its level, 0 if the process is in
// none. list is what /proc/PID/cgroup says. The process may be further down: a container may make
// cgroups of its own.
//
// cgroupfs has the directory <parent>/<id>, systemd <parent>.slice/docker-<id>.scope. A cgroup
// below another container's is none: packets from it are that one's too.
func ownCgroup(list, id string) (path string, level uint8) {
	for line := range strings.Lines(list) {
		whole, v2 := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/")
		if !v2 {
			continue
		}
		names := strings.Split(whole, "/")
		for i, name := range names {
			switch {
			case name == "..", i >= maxLevel:
				return "", 0
			case name == id, strings.HasSuffix(name, "-"+id+".scope"):
				return strings.Join(names[:i+1], "/"), uint8(i + 1)
			case containerID(name) != "":
				return "", 0
			}
		}
	}
	return "", 0
}

// maxLevel is more than any runtime's cgroups are deep.
const maxLevel = 32

// containerID returns the id of the container that a cgroup's name is that of, "" if it is none's.
func containerID(name string) string {
	name = strings.TrimSuffix(name, ".scope")
	id := name[strings.LastIndexByte(name, '-')+1:]
	if len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "" {
		return ""
	}
	return id
}
