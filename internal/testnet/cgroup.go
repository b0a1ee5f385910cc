package testnet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Cgroups is the host's cgroup v2, mounted nowhere. Tests move their own process, and it goes back
// at their end.
type Cgroups struct {
	t    testing.TB
	root string // a path by a descriptor
	name string // of the test's own directory below it
}

// NewCgroups makes a directory for the test, which goes with it.
func NewCgroups(t testing.TB) *Cgroups {
	t.Helper()
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		t.Fatalf("cgroup v2: %v", err)
	}
	defer unix.Close(fs)
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("cgroup v2: %v", err)
	}
	c := &Cgroups{t, fmt.Sprintf("/proc/self/fd/%d", root), fmt.Sprintf("metad-test-%d",
		os.Getpid())}
	t.Cleanup(func() {
		c.Enter(c.root)
		var dirs []string
		_ = filepath.Walk(filepath.Join(c.root, c.name), func(path string, i os.FileInfo,
			err error) error {
			if err == nil && i.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for i := range dirs {
			if err := os.Remove(dirs[len(dirs)-1-i]); err != nil {
				t.Errorf("remove cgroup: %v", err)
			}
		}
		unix.Close(root)
	})
	return c
}

// Add makes a cgroup below the test's own, at level 2 and deeper, and returns its directory and id.
func (c *Cgroups) Add(name string) (dir string, id uint64) {
	c.t.Helper()
	dir = filepath.Join(c.root, c.name, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	var i syscall.Stat_t
	if err := syscall.Stat(dir, &i); err != nil {
		c.t.Fatal(err)
	}
	return dir, i.Ino
}

// Enter moves the test's process: the sockets that it makes from then on are made in dir.
func (c *Cgroups) Enter(dir string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
		c.t.Fatal(err)
	}
}

// EnterNetPrio has the test's process use cgroup v1's net_prio for a moment. Before Linux 5.15 no
// socket of the host has a v2 cgroup from then on, until it is booted again.
func EnterNetPrio(t testing.TB) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("net_prio", dir, "cgroup", 0, "net_prio"); err != nil {
		t.Fatalf("mount net_prio: %v", err)
	}
	group := filepath.Join(dir, "metad-test")
	enter := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
	}
	err := os.Mkdir(group, 0o755)
	if err == nil {
		err = errors.Join(enter(group), enter(dir), os.Remove(group))
	}
	if err := errors.Join(err, unix.Unmount(dir, 0)); err != nil {
		t.Fatalf("use net_prio: %v", err)
	}
}
