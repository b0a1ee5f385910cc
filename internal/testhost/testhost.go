// Package testhost makes a host of thousands of containers. Network namespaces, veths, cgroups and
// processes are real; the Docker Engine is a fake that reports them. metad runs on the host as a
// process, and the test drives it from outside. The end of the test removes everything.
package testhost

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/events"
	"github.com/vishvananda/netns"

	"metad/internal/testnet"
)

// portsPerBridge is less than the most that a bridge can have, 1023 (net/bridge/br_private.h).
const portsPerBridge = 1000

// Host is a made-up host.
type Host struct {
	*testnet.Host
	Engine  *Engine
	Bundles string // where containerd would keep its bundles

	t       testing.TB
	cgroups *cgroups
	bridges []*testnet.Bridge
	ports   int
	start   chan func() // run on one thread that enters namespaces
}

// Task is a running task.
type Task struct {
	*testnet.Task
	ID, ARN    string
	Containers []*Container // the first one has the network, the others are in its namespace

	host *Host
}

// Container is one container.
type Container struct {
	ID, Name string
	PID      int
}

// New returns a host without tasks.
func New(t testing.TB) *Host {
	t.Helper()
	h := &Host{Host: testnet.NewHost(t), Bundles: t.TempDir(), t: t,
		cgroups: newCgroups(t), start: make(chan func())}
	h.Engine = newEngine(t)
	// Children end with the thread that started them, so the thread lives until the test ends.
	var starter sync.WaitGroup
	starter.Go(func() {
		runtime.LockOSThread() // never unlocked: it has been in other namespaces
		for f := range h.start {
			f()
		}
	})
	t.Cleanup(func() { close(h.start); starter.Wait() })
	return h
}

// randomHex returns n hexadecimal digits.
func randomHex(n int) string {
	b := make([]byte, n/2)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// bridge returns one with a port free.
func (h *Host) bridge() *testnet.Bridge {
	if h.ports%portsPerBridge == 0 {
		n := len(h.bridges)
		b := h.AddBridge(fmt.Sprintf("br-%d", n), fmt.Sprintf("10.%d.0.1/16", n))
		h.bridges = append(h.bridges, b)
	}
	h.ports++
	return h.bridges[len(h.bridges)-1]
}

// AddTask starts a task of n containers, and the Engine reports it as Docker does: created, a
// bundle with a process, started. AddTask returns when the Engine has reported all starts. first,
// if it is not nil, is called when the program of the first container can begin to run, before the
// Engine reports its start.
func (h *Host) AddTask(n int, first func(*Task)) *Task {
	h.t.Helper()
	t := &Task{ID: randomHex(32), host: h}
	t.ARN = "arn:aws:ecs:us-west-2:111122223333:task/density/" + t.ID
	for i := range n {
		c := &Container{ID: randomHex(64), Name: fmt.Sprintf("container-%d", i)}
		t.Containers = append(t.Containers, c)
		h.Engine.create(t, c)
	}
	t.Task = h.bridge().AddTask("")
	for i, c := range t.Containers {
		if err := h.run(t, c); err != nil {
			h.t.Fatalf("start %s of task %s: %v", c.Name, t.ID, err)
		}
		if i == 0 {
			h.bundle(c)
			if first != nil {
				first(t)
			}
		}
		h.Engine.started(t, c)
	}
	return t
}

// run starts the container's process, in its namespace and its cgroups.
func (h *Host) run(t *Task, c *Container) error {
	done := make(chan error, 1)
	h.start <- func() {
		if err := netns.Set(t.NS); err != nil {
			done <- err
			return
		}
		var err error
		c.PID, err = syscall.ForkExec("/bin/busybox", []string{"sleep", "1000000"},
			&syscall.ProcAttr{
				Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL,
					Setsid: true}})
		done <- err
	}
	if err := <-done; err != nil {
		return err
	}
	h.t.Cleanup(func() { h.end(c) })
	return h.cgroups.add(c)
}

// bundle writes the container's process id as containerd does, before its program runs.
func (h *Host) bundle(c *Container) {
	dir := filepath.Join(h.Bundles, c.ID)
	err := os.Mkdir(dir, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, ".init.pid"), []byte(strconv.Itoa(c.PID)),
			0o600)
	}
	if err == nil {
		err = os.Rename(filepath.Join(dir, ".init.pid"), filepath.Join(dir, "init.pid"))
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// end kills the container's process and removes its cgroups.
func (h *Host) end(c *Container) {
	if c.PID == 0 {
		return
	}
	err := syscall.Kill(c.PID, syscall.SIGKILL)
	if err == nil {
		_, err = syscall.Wait4(c.PID, nil, 0, nil)
	}
	c.PID = 0
	if err := errors.Join(err, h.cgroups.remove(c)); err != nil {
		h.t.Errorf("end %s: %v", c.ID, err)
	}
}

// Stop ends the task as Docker does, the network's owner last. Its containers stay, stopped, until
// Destroy.
func (t *Task) Stop() {
	t.host.t.Helper()
	for i := len(t.Containers) - 1; i >= 0; i-- {
		c := t.Containers[i]
		t.host.end(c)
		if i == 0 {
			t.Remove()
		}
		t.host.Engine.stopped(t, c)
		_ = os.RemoveAll(filepath.Join(t.host.Bundles, c.ID))
	}
}

// Destroy removes the stopped task's containers from the Engine.
func (t *Task) Destroy() {
	for _, c := range t.Containers {
		t.host.Engine.destroy(t, c)
	}
}

// cgroups makes cgroups where this kernel has its controllers.
type cgroups struct {
	roots []string // of the host that is made up
}

func newCgroups(t testing.TB) *cgroups {
	t.Helper()
	const mounted = "/sys/fs/cgroup"
	controllers := []string{"cpu", "cpuacct", "memory", "blkio", "pids"}
	if _, err := os.Stat(mounted + "/cgroup.controllers"); err == nil {
		controllers = []string{""}
	}
	g := &cgroups{}
	for _, c := range controllers {
		root, err := os.MkdirTemp(filepath.Join(mounted, c), "metad-test-")
		if err != nil {
			t.Fatalf("make a cgroup: %v", err)
		}
		if c == "" { // version 2 gives controllers from one level to the next
			for _, dir := range []string{mounted, root} {
				if err := os.WriteFile(dir+"/cgroup.subtree_control",
					[]byte("+cpu +io +memory +pids"), 0); err != nil {
					t.Fatalf("enable controllers: %v", err)
				}
			}
		}
		g.roots = append(g.roots, root)
		t.Cleanup(func() {
			if err := removeCgroup(root); err != nil {
				t.Errorf("remove cgroup: %v", err)
			}
		})
	}
	return g
}

func (g *cgroups) add(c *Container) error {
	for _, root := range g.roots {
		dir := filepath.Join(root, c.ID)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(dir+"/cgroup.procs", []byte(strconv.Itoa(c.PID)),
			0); err != nil {
			return err
		}
	}
	return nil
}

func (g *cgroups) remove(c *Container) error {
	var errs []error
	for _, root := range g.roots {
		errs = append(errs, removeCgroup(filepath.Join(root, c.ID)))
	}
	return errors.Join(errs...)
}

// removeCgroup waits until the kernel has removed the processes that were in it.
func removeCgroup(dir string) error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		err := syscall.Rmdir(dir)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(end) {
			return fmt.Errorf("remove %s: %w", dir, err)
		}
	}
}

// event is the Engine's report of a change of a container.
func (t *Task) event(c *Container, action events.Action) events.Message {
	attributes := labels(t, c)
	attributes["name"], attributes["image"] = dockerName(t, c), image
	now := time.Now()
	return events.Message{Type: events.ContainerEventType, Action: action, Scope: "local",
		Time: now.Unix(), TimeNano: now.UnixNano(),
		Actor: events.Actor{ID: c.ID, Attributes: attributes}}
}
