package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/pkg/task"
)

func TestFollowLife(t *testing.T) {
	e := startEngine(t)
	before := e.run()
	w := watch(t, e)
	if !up(before)(w.current()) {
		t.Fatalf("first Apply without a container that was there: %s", show(w.current()))
	}
	kept, _ := find(w.current(), before)

	id := e.run()
	e.emit(events.ActionStart, id)
	w.until(t, "started", up(id))
	if tk, _ := find(w.current(), before); tk != kept {
		t.Error("another's start has changed a task's pointer")
	}
	_, c := find(w.current(), id)
	cell := c.Stats
	e.change(id, func(c *container.InspectResponse) { c.Name = "/renamed" })
	e.emit(events.ActionRename, id)
	w.until(t, "renamed", func(tasks []*task.Task) bool {
		_, c := find(tasks, id)
		return c.DockerName == "renamed"
	})
	e.change(id, stopped)
	e.emit(events.ActionDie, id)
	// M17: it stays.
	w.until(t, "stopped", func(tasks []*task.Task) bool {
		tk, c := find(tasks, id)
		return c != nil && c.KnownStatus == task.StatusStopped && len(tk.Endpoints) == 0
	})
	if _, c = find(w.current(), id); c.Stats != cell {
		t.Error("the statistics' cell has changed")
	}
	e.remove(id)
	e.emit(events.ActionDestroy, id)
	w.until(t, "removed", func(tasks []*task.Task) bool {
		tk, _ := find(tasks, id)
		return tk == nil
	})
	if !slices.IsSortedFunc(w.current(), func(a, b *task.Task) int {
		return cmp.Compare(a.ARN, b.ARN)
	}) {
		t.Error("tasks are not in order")
	}
}

// TestFollowDieFreesAddress: the address of a container that has ended is free although the Engine
// does not answer for it yet.
func TestFollowDieFreesAddress(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	w := watch(t, e)
	release := make(chan struct{})
	e.mu.Lock()
	e.onInspect = func(string) { <-release }
	e.mu.Unlock()
	defer close(release)
	e.emit(events.ActionDie, id)
	w.until(t, "no endpoint", func(tasks []*task.Task) bool {
		tk, _ := find(tasks, id)
		return tk != nil && len(tk.Endpoints) == 0
	})
}

// TestFollowDieDuringLook: what a look saw before the container ended does not come back.
func TestFollowDieDuringLook(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	w := watch(t, e)
	reading, release, never := make(chan struct{}, 100), make(chan struct{}),
		make(chan struct{})
	defer close(never)
	w.mu.Lock()
	w.readNS = func(c *task.Container) (*namespace, error) {
		if c.ID == id {
			reading <- struct{}{}
			<-release
		}
		return fakeNamespace(c)
	}
	w.mu.Unlock()
	e.emit(events.ActionUpdate, id)
	<-reading
	e.mu.Lock()
	e.onInspect = func(asked string) {
		if asked == id {
			<-never
		}
	}
	e.mu.Unlock()
	free := func(tasks []*task.Task) bool {
		tk, _ := find(tasks, id)
		return len(tk.Endpoints) == 0
	}
	e.emit(events.ActionDie, id)
	w.until(t, "no endpoint", free)
	close(release)
	time.Sleep(20 * time.Millisecond) // let Run take in what was seen
	other := e.run()
	e.emit(events.ActionStart, other)
	w.until(t, "another", up(other))
	if !free(w.current()) {
		t.Error("the endpoint of a container that has ended is back")
	}
}

// TestFollowDieDuringFailedLook: only what that look would have found is of before.
func TestFollowDieDuringFailedLook(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	w := watch(t, e)
	asked, release := make(chan struct{}, 100), make(chan struct{})
	var looks atomic.Int32
	e.mu.Lock()
	e.onInspect = func(string) {
		asked <- struct{}{}
		n := looks.Add(1)
		if n == 1 {
			<-release
		}
		if n <= 2 { // the client asks twice
			panic(http.ErrAbortHandler) // no answer
		}
	}
	e.mu.Unlock()
	e.emit(events.ActionPause, id)
	<-asked
	before := w.Status().Events
	e.emit(events.ActionDie, id)
	e.change(id, func(c *container.InspectResponse) { c.State.Pid = 77 })
	e.emit(events.ActionStart, id)
	for w.Status().Events < before+2 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond) // let Run take the events in
	close(release)
	w.until(t, "the next life's address", func(tasks []*task.Task) bool {
		tk, _ := find(tasks, id)
		return len(tk.Endpoints) == 1 && tk.Endpoints[0].Ifindex == 77
	})
}

// TestFollowOldDie: a die event told again after a reconnect is not of this life.
func TestFollowOldDie(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	w := watch(t, e)
	tk, _ := find(w.current(), id)
	e.mu.Lock()
	for ch := range e.streams {
		ch <- events.Message{Type: events.ContainerEventType, Action: events.ActionDie,
			Actor:    events.Actor{ID: id},
			TimeNano: time.Now().Add(-time.Hour).UnixNano()}
	}
	e.mu.Unlock()
	other := e.run()
	e.emit(events.ActionStart, other)
	w.until(t, "what came after", up(other))
	if now, _ := find(w.current(), id); now != tk {
		t.Errorf("an old event has changed the task: %s", show(now))
	}
}

// TestFollowGoneBeforeInspect: an event, and then the Engine knows nothing of it.
func TestFollowGoneBeforeInspect(t *testing.T) {
	e := startEngine(t)
	w := watch(t, e)
	for i := range 20 {
		id := e.run()
		e.emit(events.ActionCreate, id)
		if i%2 == 0 {
			e.emit(events.ActionStart, id)
		}
		e.remove(id)
		if i%3 == 0 {
			e.emit(events.ActionDestroy, id)
		}
	}
	id := e.run()
	e.emit(events.ActionStart, id)
	w.until(t, "only what is there", func(tasks []*task.Task) bool {
		return len(tasks) == 1 && up(id)(tasks)
	})
	for w.Status().Containers != 1 {
		time.Sleep(time.Millisecond)
	}
}

// TestFollowSlowInspect: containers that the Engine does not answer for hold up nobody else, even
// if there are more of them than places.
func TestFollowSlowInspect(t *testing.T) {
	e := startEngine(t)
	w := watch(t, e)
	release := make(chan struct{})
	slow := map[string]bool{}
	e.mu.Lock()
	e.onInspect = func(id string) {
		e.mu.Lock()
		wait := slow[id]
		e.mu.Unlock()
		if wait {
			<-release
		}
	}
	e.mu.Unlock()
	var last string
	for range 3 * places[priorityRecheck] {
		last = e.run()
		e.mu.Lock()
		slow[last] = true
		e.mu.Unlock()
		e.emit(events.ActionCreate, last) // and now it is being started
	}
	for range 10 {
		id := e.run()
		e.emit(events.ActionStart, id)
		w.until(t, "start of another", up(id))
	}
	close(release)
	w.until(t, "the slow ones", up(last))
}

// TestFollowAnnounced: a task is settling while the Engine does not answer for a container that was
// created for it, and not when that container is gone or cannot be inspected.
func TestFollowAnnounced(t *testing.T) {
	e := startEngine(t)
	labels := func(c *container.InspectResponse) {
		c.Config.Labels = map[string]string{
			task.LabelTaskARN: "arn:aws:ecs:us-west-2:111122223333:task/default/a", task.LabelContainerName: c.Name[1:]}
	}
	first := e.run(labels)
	w := watch(t, e)
	settling := func(want bool, containers int) func([]*task.Task) bool {
		return func(tasks []*task.Task) bool {
			tk, _ := find(tasks, first)
			return tk.Settling == want && len(tk.Containers) == containers
		}
	}
	release := make(chan struct{})
	e.mu.Lock()
	e.onInspect = func(string) { <-release }
	e.mu.Unlock()
	second := e.run(labels)
	e.emit(events.ActionCreate, second)
	w.until(t, "announced", settling(true, 1))
	gone := e.run(labels)
	e.emit(events.ActionCreate, gone)
	e.remove(gone)
	e.emit(events.ActionDestroy, gone)
	close(release)
	w.until(t, "known", settling(false, 2))
	again := e.run(labels)
	answer := make(chan struct{})
	e.mu.Lock()
	e.onInspect = func(string) { <-answer }
	e.mu.Unlock()
	e.emit(events.ActionCreate, again)
	w.until(t, "announced again", settling(true, 2))
	before := w.Status().Events
	e.emit(events.ActionCreate, again) // told again, as after a reconnect
	for w.Status().Events == before {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond) // let Run take the event in
	close(answer)
	w.until(t, "what was told twice is known", settling(false, 3))
	third := e.run(labels)
	e.remove(third) // while it is being inspected
	e.emit(events.ActionCreate, third)
	w.until(t, "nothing of the one that is gone", settling(false, 3))
	if len(w.current()) != 1 {
		t.Errorf("got %s", show(w.current()))
	}
}

// TestFollowChangeDuringInspect: what happens while an inspect is under way is looked at after it.
func TestFollowChangeDuringInspect(t *testing.T) {
	e := startEngine(t)
	w := watch(t, e)
	asked, release := make(chan struct{}, 100), make(chan struct{})
	id := e.run(func(c *container.InspectResponse) {
		c.State.Running, c.State.Pid, c.State.Status = false, 0, "created"
	})
	e.mu.Lock()
	e.onInspect = func(string) {
		asked <- struct{}{}
		<-release
	}
	e.mu.Unlock()
	e.emit(events.ActionCreate, id)
	<-asked
	e.emit(events.ActionStart, id)
	for w.Status().Events < 2 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond) // let Run take the event in
	release <- struct{}{}             // answers "created"
	<-asked
	e.change(id, func(c *container.InspectResponse) {
		c.State.Running, c.State.Pid, c.State.Status = true, 77, "running"
	})
	close(release)
	w.until(t, "started", up(id))
}

func TestFollowThousand(t *testing.T) {
	const n = 1000
	e := startEngine(t)
	var ids []string
	for range n {
		ids = append(ids, e.run())
	}
	w := watch(t, e)
	if len(w.current()) != n {
		t.Fatalf("got %d tasks", len(w.current()))
	}
	before := w.current()
	for _, id := range ids[:200] {
		e.change(id, func(c *container.InspectResponse) { c.State.Pid += 10000 })
		e.emit(events.ActionStart, id)
	}
	w.until(t, "all restarted", func(tasks []*task.Task) bool {
		moved := 0
		for _, tk := range tasks {
			if tk.Endpoints[0].Ifindex > 10000 {
				moved++
			}
		}
		return moved == 200
	})
	same := 0
	for i, tk := range w.current() {
		if tk == before[i] {
			same++
		}
	}
	if same != n-200 {
		t.Errorf("%d tasks have their old pointer, want %d", same, n-200)
	}
}

// TestFollowSettles: a pause container is looked at until its CNI plugin is done, and at once when
// its port is heard of.
func TestFollowSettles(t *testing.T) {
	e := startEngine(t)
	w := watch(t, e)
	var reads atomic.Int32
	ready := make(chan struct{})
	w.mu.Lock()
	w.readNS = func(c *task.Container) (*namespace, error) {
		reads.Add(1)
		select {
		case <-ready:
			return &namespace{ecs: true, endpoints: []task.Endpoint{{Ifindex: 5}},
				inode: 1}, nil
		default:
			return &namespace{inode: 1}, nil
		}
	}
	w.mu.Unlock()
	inspects, _ := e.counts()
	id := e.run(func(c *container.InspectResponse) {
		c.HostConfig.NetworkMode = "none"
		c.Config.Labels = map[string]string{task.LabelTaskARN: "arn:aws:ecs:r:1:task/c/i",
			task.LabelContainerName: task.PauseName}
	})
	e.emit(events.ActionStart, id)
	for reads.Load() < 5 {
		time.Sleep(time.Millisecond)
	}
	if after, _ := e.counts(); after != inspects+1 {
		t.Errorf("%d inspects while waiting for the CNI plugin, want 1", after-inspects)
	}
	close(ready)
	w.PortChanged(5)
	w.until(t, "provisioned", func(tasks []*task.Task) bool {
		tk, c := find(tasks, id)
		return c != nil && c.KnownStatus == task.StatusResourcesProvisioned &&
			len(tk.Endpoints) == 1
	})
}

// TestFollowPokeOfGonePort: the namespace is looked at although the Engine says nothing.
func TestFollowPokeOfGonePort(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	w := watch(t, e)
	tk, c := find(w.current(), id)
	w.mu.Lock()
	w.readNS = func(c *task.Container) (*namespace, error) { return nil, fs.ErrNotExist }
	w.mu.Unlock()
	w.PortChanged(tk.Endpoints[0].Ifindex + 1) // another's
	w.state.inode = func(int) uint64 { return 0 }
	w.PortChanged(c.PID)
	w.until(t, "no endpoint", func(tasks []*task.Task) bool {
		tk, _ := find(tasks, id)
		return len(tk.Endpoints) == 0
	})
}

// TestFollowUnreadableNamespace: what cannot be read for once is not lost.
func TestFollowUnreadableNamespace(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	w := watch(t, e)
	w.mu.Lock()
	w.readNS = func(c *task.Container) (*namespace, error) {
		return nil, errors.New("interrupted")
	}
	w.mu.Unlock()
	e.emit(events.ActionUpdate, id)
	errs := w.Status().Errors
	for w.Status().Errors < errs+2 {
		time.Sleep(time.Millisecond)
	}
	if !up(id)(w.current()) {
		t.Errorf("endpoints lost: %s", show(w.current()))
	}
}

func TestFollowHostileLabelsWarnOnce(t *testing.T) {
	e := startEngine(t)
	good := e.run()
	bad := e.run(func(c *container.InspectResponse) {
		c.Config.Labels = map[string]string{task.LabelTaskARN: "a\x00b",
			task.LabelContainerName: "x"}
	})
	core, logs := observer.New(zap.WarnLevel)
	w := watch(t, e, func(c *Config) { c.Log = zap.New(core) })
	for i := range 3 {
		name := fmt.Sprint("/r", i)
		e.change(bad, func(c *container.InspectResponse) { c.Name = name })
		e.emit(events.ActionRename, bad)
		w.until(t, "renamed", func(tasks []*task.Task) bool {
			_, c := find(tasks, bad)
			return "/"+c.DockerName == name
		})
	}
	if !up(good)(w.current()) || !up(bad)(w.current()) || len(w.current()) != 2 {
		t.Errorf("got %s", show(w.current()))
	}
	if logs.Len() != 1 {
		t.Errorf("got %d warnings, want 1: %v", logs.Len(), logs.All())
	}
}

func TestFollowEnrich(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	var cluster atomic.Value
	cluster.Store("one")
	w := watch(t, e, func(c *Config) {
		c.Enrich = func(tk *task.Task) {
			tk.Cluster = cluster.Load().(string)
			tk.Containers[0].DesiredStatus = task.Status(tk.Cluster)
		}
	})
	first, _ := find(w.current(), id)
	cluster.Store("two")
	w.Refresh("not there", first.ARN)
	w.until(t, "refreshed", func(tasks []*task.Task) bool {
		tk, _ := find(tasks, id)
		return tk.Cluster == "two"
	})
	if first.Cluster != "one" || first.Containers[0].DesiredStatus != "one" {
		t.Errorf("a published task was changed: %s", show(first))
	}
	w.mu.Lock()
	applies := w.applies
	w.mu.Unlock()
	w.Refresh()
	other := e.run()
	e.emit(events.ActionStart, other)
	w.until(t, "another", up(other))
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.applies != applies+1 {
		t.Errorf("%d Applies for a refresh that changed nothing and a start",
			w.applies-applies)
	}
}

func TestNewRejects(t *testing.T) {
	good := Config{Engine: fakeEngine{}, Log: zap.NewNop(), Apply: func([]*task.Task) {}}
	if _, err := newFollower(good); err != nil {
		t.Errorf("good: %v", err)
	}
	for _, change := range []func(*Config){
		func(c *Config) { c.Engine = nil },
		func(c *Config) { c.Apply = nil },
		func(c *Config) { c.Cluster = "a b" },
		func(c *Config) { c.Region = "a:b" },
		func(c *Config) { c.Account = "\x00" },
	} {
		bad := good
		change(&bad)
		if _, err := newFollower(bad); err == nil {
			t.Errorf("accepted %+v", bad)
		}
	}
}

// TestFollowChurn: nothing is left of containers that are gone, whatever was heard of them and
// when.
func TestFollowChurn(t *testing.T) {
	const lives = 2000
	e := startEngine(t)
	w := newWatched(t, e, func(c *Config) { c.ReconcileEvery = 200 * time.Millisecond })
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	<-w.Synced()
	labels := func(c *container.InspectResponse) {
		c.Config.Labels = map[string]string{task.LabelTaskARN: fmt.Sprintf(
			"arn:aws:ecs:us-west-2:111122223333:task/default/%s",
			c.Name[1:2+len(c.Name)%2]), task.LabelContainerName: c.Name[1:]}
	}
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for n := range lives / 8 {
				id := e.run(labels)
				e.emit(events.ActionCreate, id)
				if n%3 == 0 {
					e.emit(events.ActionStart, id)
					w.PortChanged(n)
				}
				if n%5 == worker%5 {
					time.Sleep(time.Millisecond)
				}
				if n%7 == 0 {
					e.emit(events.ActionDie, id)
				}
				e.remove(id)
				if n%11 != 0 { // else the event is lost
					e.emit(events.ActionDestroy, id)
				}
				if n%13 == 0 {
					e.emit(events.ActionDie, id) // old news
				}
			}
		})
	}
	wg.Wait()
	for w.Status().Events < e.told() {
		time.Sleep(time.Millisecond)
	}
	_, before := e.counts()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		// Two lists more: the one before the last was asked for when all were gone, and has
		// been taken in.
		if _, lists := e.counts(); lists > before+2 && w.Status().Containers == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d containers are left", w.Status().Containers)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	s := w.state
	if left := len(s.containers) + len(s.groups) + len(s.announced) + len(s.dirty) +
		len(s.tasks) + len(s.unseen); left != 0 {
		t.Errorf("left: containers %v, groups %v, announced %v, dirty %v, tasks %v, "+
			"first %v", s.containers, s.groups, s.announced, s.dirty, s.tasks, s.unseen)
	}
	for p, l := range w.looks.lines {
		if len(l.ids) > 0 || l.busy > 0 {
			t.Errorf("line %d: %d ids are left, %d looks", p, len(l.ids), l.busy)
		}
	}
	if len(w.looks.subjects) > 0 {
		t.Errorf("subjects are left: %v", w.looks.subjects)
	}
}
