package docker

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"metad/pkg/task"
)

// cgroups finds containers' own cgroups of version 2. Safe for concurrent use.
type cgroups struct {
	procRoot string
	root     string // where version 2 is mounted; "": the host has none
}

// openCgroups looks for version 2 below mounted, where the host has its cgroups: there itself, or
// beside the controllers of version 1. A metad in a cgroup namespace of its own sees no other
// process's cgroup as it is called outside: then none is found.
func openCgroups(procRoot, mounted string) *cgroups {
	for _, root := range []string{mounted, filepath.Join(mounted, "unified")} {
		var fs unix.Statfs_t
		if unix.Statfs(root, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			return &cgroups{procRoot, root}
		}
	}
	return &cgroups{procRoot: procRoot}
}

// of returns the cgroup that was made for the container with the full id, of which pid is a
// process; zero if it has none. The directory is named after the container, so that a process id
// that is another's by now does no harm.
func (g *cgroups) of(pid int, id string) task.Cgroup {
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
			case holdsContainer(name):
				return "", 0
			}
		}
	}
	return "", 0
}

// maxLevel is more than any runtime's cgroups are deep.
const maxLevel = 32

// holdsContainer reports whether a cgroup's name is that of a container's.
func holdsContainer(name string) bool {
	name = strings.TrimSuffix(name, ".scope")
	id := name[strings.LastIndexByte(name, '-')+1:]
	return len(id) == 64 && strings.Trim(id, "0123456789abcdef") == ""
}
