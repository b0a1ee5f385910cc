package docker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"metad/pkg/task"
)

// A container's own cgroup is the directory that is named after it, and no other: not one above it,
// not one below, not one inside of another container's.
func TestOwnCgroup(t *testing.T) {
	id, other := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	f := func(list, path string, level uint8) {
		t.Helper()
		if p, l := ownCgroup(list, id); p != path || l != level {
			t.Errorf("%q: got %q at level %d, want %q at %d", list, p, l, path, level)
		}
	}
	f("0::/docker/"+id+"\n", "docker/"+id, 2)
	f("0::/docker/"+id+"/init/leaf\n", "docker/"+id, 2)
	f("0::/system.slice/docker-"+id+".scope\n", "system.slice/docker-"+id+".scope", 2)
	f("0::/ecs/1234/"+id+"\n", "ecs/1234/"+id, 3)
	f("0::/ecstasks.slice/ecstasks-1234.slice/docker-"+id+".scope\n", "ecstasks.slice/ecstasks-1234.slice/docker-"+id+".scope", 3)
	f("4:memory:/docker/"+id+"\n0::/docker/"+id+"\n", "docker/"+id, 2) // hybrid
	f("4:memory:/docker/"+id+"\n", "", 0)
	f("4:memory:/docker/"+id+"\n0::/\n", "", 0)
	f("0::/docker/"+other+"\n", "", 0)
	f("0::/docker/"+other+"/"+id+"\n", "", 0) // packets from it are the other's too
	f("0::/system.slice/docker-"+other+".scope/docker/"+id+"\n", "", 0)
	f("0::/docker/"+id[:12]+"\n", "", 0)
	f("0::/docker/x"+id+"\n", "", 0)
	f("0::/../docker/"+id+"\n", "", 0) // seen from another cgroup namespace
	f("0::/user.slice/../docker/"+id+"\n", "", 0)
	f("0::/"+strings.Repeat("d/", 40)+id+"\n", "", 0)
	f("", "", 0)
}

// Of a cgroup in another's the outer container is the one: its packets are the outer one's.
func TestNearest(t *testing.T) {
	id, other := strings.Repeat("a1", 32), strings.Repeat("b2", 32)
	f := func(path, want string) {
		t.Helper()
		if got := nearest(path); got != want {
			t.Errorf("%q: got %q, want %q", path, got, want)
		}
	}
	f("docker/"+id, id)
	f("docker/"+id+"/init/leaf", id)
	f("docker/"+id+"/docker/"+other, id)
	f("ecs.slice/docker-"+id+".scope/"+other, id)
	f("system.slice/ssh.service", "")
	f("docker/"+id[1:], "")
	f("", "")
}

// Where there is no version 2, no container has a cgroup, whatever its process says.
func TestNoCgroup2(t *testing.T) {
	id, proc := strings.Repeat("a1", 32), t.TempDir()
	if err := os.Mkdir(filepath.Join(proc, "7"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(proc, "7/cgroup"), []byte("0::/docker/"+id+"\n"),
		0o644); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "docker", id), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := OpenCgroups(proc, root).of(7, id); got != (task.Cgroup{}) {
		t.Errorf("got %v", got)
	}
	g := &Cgroups{proc, root} // as if it were one
	if got := g.of(7, id); got.ID == 0 || got.Level != 2 {
		t.Errorf("got %v", got)
	}
	if got := g.of(8, id); got != (task.Cgroup{}) {
		t.Errorf("no such process: got %v", got)
	}
	if got := g.of(7, strings.Repeat("b2", 32)); got != (task.Cgroup{}) {
		t.Errorf("another's process: got %v", got)
	}
}
