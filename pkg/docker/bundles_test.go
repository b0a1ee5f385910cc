package docker

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"

	"metad/pkg/task"
)

// writeBundle does what containerd and runc do when a container is started.
func writeBundle(t testing.TB, root, id string, pid int) {
	t.Helper()
	dir := filepath.Join(root, id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writePID(t, dir, pid)
}

func writePID(t testing.TB, dir string, pid int) {
	t.Helper()
	temp := filepath.Join(dir, "."+pidFile)
	if err := os.WriteFile(temp, []byte(strconv.Itoa(pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(dir, pidFile)); err != nil {
		t.Fatal(err)
	}
}

func TestBundles(t *testing.T) {
	there, later := t.TempDir(), filepath.Join(t.TempDir(), "io.containerd.runtime.v2.task",
		"moby")
	b, err := openBundles([]string{there, later})
	if err != nil {
		t.Fatal(err)
	}
	b.watchRoots()
	writeBundle(t, there, "a", 7) // all of it before anybody looks
	ended := make(chan error)
	go func() { ended <- b.run() }()
	want := func(id string, pid int) {
		t.Helper()
		for {
			select {
			case got := <-b.found:
				if got == (newborn{id, pid}) {
					return
				}
				if got.id != "a" && got.id != "first" { // one may be told of twice
					t.Fatalf("got %v, want %s %d", got, id, pid)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("not told of %s", id)
			}
		}
	}
	want("a", 7)
	b.watchRoots()
	if err := os.MkdirAll(later, 0o700); err != nil { // nobody looks again
		t.Fatal(err)
	}
	writeBundle(t, later, "first", 9)
	want("first", 9)
	bundle := filepath.Join(later, "b")
	if err := os.Mkdir(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Millisecond) // the watch is set while there is no process yet
	writePID(t, bundle, 8)
	want("b", 8)
	if err := os.RemoveAll(there); err != nil {
		t.Fatal(err)
	}
	for done := false; !done; time.Sleep(time.Millisecond) {
		done = true
		b.mu.Lock()
		for _, w := range b.paths {
			done = done && !strings.HasPrefix(w.dir, there)
		}
		b.mu.Unlock()
	}
	if b.watches(there) {
		t.Error("a directory that is gone is taken for watched")
	}
	if err := b.close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := b.close(); err != nil {
		t.Error(err)
	}
}

// startWithBirths starts w, following the bundles in dir as well.
func (w *watched) startWithBirths(t testing.TB, dir string) {
	t.Helper()
	var err error
	if w.births, err = openBundles([]string{dir}); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	<-w.Synced()
}

// TestFollowNewborn: a container has its address before the Engine says that it runs, whether or
// not it has been inspected before; and loses it again if it never comes to run.
func TestFollowNewborn(t *testing.T) {
	created := func(c *container.InspectResponse) {
		*c.State = container.State{Status: "created"}
	}
	for _, name := range []string{"inspected before", "inspected after", "never runs",
		"was stopped"} {
		t.Run(name, func(t *testing.T) {
			e := startEngine(t)
			dir := t.TempDir()
			w := newWatched(t, e)
			w.startWithBirths(t, dir)
			before := created
			if name == "was stopped" {
				before = stopped
			}
			id := e.run(before)
			known := func(tasks []*task.Task) bool {
				_, c := find(tasks, id)
				return c != nil
			}
			release := make(chan struct{})
			if name == "inspected after" {
				e.mu.Lock()
				e.onInspect = func(string) { <-release }
				e.mu.Unlock()
				e.emit(events.ActionCreate, id)
				for w.Status().Inspects == 0 {
					time.Sleep(time.Millisecond)
				}
			} else {
				e.emit(events.ActionCreate, id)
				w.until(t, "created", known)
			}
			writeBundle(t, dir, id, 4321)
			if name == "inspected after" {
				time.Sleep(50 * time.Millisecond) // let Run take it in
				close(release)
			}
			w.until(t, "an endpoint before it runs", func(tasks []*task.Task) bool {
				tk, c := find(tasks, id)
				return c != nil && len(tk.Endpoints) == 1 &&
					tk.Endpoints[0].Ifindex == 4321 &&
					c.KnownStatus == task.StatusRunning && c.PID == 0 &&
					c.ExitCode == nil
			})
			if name == "never runs" {
				w.mu.Lock()
				w.readNS = func(*task.Container) (*namespace, error) {
					return nil, errNotIts
				}
				w.mu.Unlock()
				e.emit(events.ActionDie, id)
				w.until(t, "no endpoint", func(tasks []*task.Task) bool {
					tk, c := find(tasks, id)
					return len(tk.Endpoints) == 0 &&
						c.KnownStatus == task.StatusCreated
				})
				return
			}
			e.change(id, func(c *container.InspectResponse) {
				*c.State = container.State{Status: "running", Running: true,
					Pid: 4321, StartedAt: time.Now().UTC().Format(
						time.RFC3339Nano)}
			})
			e.emit(events.ActionStart, id)
			w.until(t, "started", func(tasks []*task.Task) bool {
				_, c := find(tasks, id)
				return up(id)(tasks) && c.PID == 4321
			})
		})
	}
}

// TestFollowNewbornWaitsForNobody: the Engine answers for none of many containers that are ending,
// nor for one that is about to run.
func TestFollowNewbornWaitsForNobody(t *testing.T) {
	e := startEngine(t)
	dir := t.TempDir()
	var ending []string
	for range 2 * places[priorityEvent] {
		ending = append(ending, e.run())
	}
	id := e.run(func(c *container.InspectResponse) {
		*c.State = container.State{Status: "created"}
	})
	w := newWatched(t, e)
	w.startWithBirths(t, dir)
	release := make(chan struct{})
	e.mu.Lock()
	e.onInspect = func(string) { <-release }
	e.mu.Unlock()
	for _, id := range ending {
		e.emit(events.ActionDie, id)
	}
	w.until(t, "the others to have ended", func(tasks []*task.Task) bool {
		return !slices.ContainsFunc(tasks, func(tk *task.Task) bool {
			return len(tk.Endpoints) > 0
		})
	})
	e.emit(events.ActionUpdate, id) // an inspect of it stands in line too
	for w.Status().Events < uint64(len(ending)+1) {
		time.Sleep(time.Millisecond)
	}
	writeBundle(t, dir, id, 4321)
	w.until(t, "an endpoint before it runs", func(tasks []*task.Task) bool {
		tk, c := find(tasks, id)
		return len(tk.Endpoints) == 1 && c.PID == 0
	})
	e.change(id, func(c *container.InspectResponse) {
		*c.State = container.State{Status: "running", Running: true, Pid: 4321,
			StartedAt: time.Now().UTC().Format(time.RFC3339Nano)}
	})
	close(release)
	w.until(t, "the inspect that stood in line", up(id))
}
