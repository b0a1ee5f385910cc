package docker

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/pkg/task"
)

func TestFollowLostEvents(t *testing.T) {
	e := startEngine(t)
	stops, goes, renamed, restarted := e.run(), e.run(), e.run(), e.run()
	w := newWatched(t, e, func(c *Config) { c.ReconcileEvery = 10 * time.Millisecond })
	w.state.recheck = 1 << 30 // what the list shows must do
	var ended atomic.Int64
	w.state.inode = func(pid int) uint64 {
		if int64(pid) == ended.Load() {
			return 0
		}
		return uint64(pid)
	}
	w.start(t)
	<-w.Synced()
	e.change(stops, stopped)
	e.remove(goes)
	e.change(renamed, func(c *container.InspectResponse) { c.Name = "/renamed" })
	e.change(restarted, func(c *container.InspectResponse) {
		ended.Store(int64(c.State.Pid))
		c.State.Pid = 9999
	})
	starts := e.run()
	w.until(t, "reconciled", func(tasks []*task.Task) bool {
		_, s := find(tasks, stops)
		gone, _ := find(tasks, goes)
		_, r := find(tasks, renamed)
		moved, _ := find(tasks, restarted)
		return s.KnownStatus == task.StatusStopped && gone == nil &&
			r.DockerName == "renamed" && up(starts)(tasks) &&
			moved.Endpoints[0].Ifindex == 9999
	})
}

// TestFollowReconcileIsCheap: looking at the list does not inspect everybody.
func TestFollowReconcileIsCheap(t *testing.T) {
	const n = 160
	e := startEngine(t)
	for range n {
		e.run()
	}
	w := watch(t, e, func(c *Config) { c.ReconcileEvery = 20 * time.Millisecond })
	for _, lists := e.counts(); lists < 20; _, lists = e.counts() {
		time.Sleep(time.Millisecond)
	}
	inspects, lists := e.counts()
	// Each container once for the first list, perhaps twice, and then a share of them for each.
	if most := 2*n + lists*(n/recheckShare+1); inspects <= n || inspects > most {
		t.Errorf("%d inspects for %d lists of %d containers, want more than %d and at "+
			"most %d", inspects, lists, n, n, most)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.applies != 1 {
		t.Errorf("%d Applies and nothing has changed", w.applies)
	}
}

// TestFollowEngineAway: tasks stay as they are while the Engine is away or answers half, and it is
// then asked for all of them.
func TestFollowEngineAway(t *testing.T) {
	e := startEngine(t)
	id, goes := e.run(), e.run()
	core, logs := observer.New(zap.WarnLevel)
	w := watch(t, e, func(c *Config) { c.Log = zap.New(core) })
	first, _ := find(w.current(), id)

	e.down()
	for w.Status().Connected {
		time.Sleep(time.Millisecond)
	}
	e.remove(goes)
	var answers atomic.Int32
	e.mu.Lock()
	e.onList = func(rw http.ResponseWriter) bool {
		switch answers.Add(1) {
		case 1: // breaks off in the middle
			rw.Header().Set("Content-Length", "1000")
			fmt.Fprint(rw, `[{"Id":"`)
		case 2:
			rw.WriteHeader(http.StatusInternalServerError)
		case 3:
			fmt.Fprint(rw, `{"not":"a list"}`)
		default:
			return false
		}
		return true
	}
	e.mu.Unlock()
	late := e.run()
	e.up()
	w.until(t, "back", func(tasks []*task.Task) bool {
		now, _ := find(tasks, id)
		if now != first {
			t.Fatalf("task has changed: %s", show(now))
		}
		gone, _ := find(tasks, goes)
		return up(late)(tasks) && gone == nil
	})
	for !w.Status().Connected {
		time.Sleep(time.Millisecond)
	}
	if got := w.Status(); got.Reconnects != 1 || got.Errors < 4 {
		t.Errorf("status: %+v", got)
	}
	told := map[string]bool{}
	for _, l := range logs.All() {
		line := fmt.Sprint(l.Message, l.ContextMap())
		if told[line] {
			t.Errorf("told twice in one absence: %s", line)
		}
		told[line] = true
	}
	if len(told) < 2 {
		t.Errorf("got %v, want a line for the Engine that is away and one for each "+
			"answer that is no list", told)
	}
}

// TestFollowStartWithoutEngine: nothing is applied before the Engine was asked.
func TestFollowStartWithoutEngine(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	e.down()
	w := newWatched(t, e)
	w.start(t)
	for w.Status().Errors < 2 {
		time.Sleep(time.Millisecond)
	}
	w.mu.Lock()
	if w.applies != 0 {
		t.Error("applied without having seen a container")
	}
	w.mu.Unlock()
	e.up()
	w.until(t, "started", up(id))
}

// TestFollowFirstApplyIsWhole: a first Apply with a part of the containers would take the
// addresses of all others away.
func TestFollowFirstApplyIsWhole(t *testing.T) {
	e := startEngine(t)
	var ids []string
	for range 50 {
		ids = append(ids, e.run())
	}
	e.onInspect = func(id string) {
		if id == ids[7] {
			time.Sleep(100 * time.Millisecond)
		}
	}
	w := newWatched(t, e)
	w.start(t)
	w.until(t, "first", func(tasks []*task.Task) bool { return tasks != nil })
	for _, id := range ids {
		if !up(id)(w.current()) {
			t.Errorf("%s is missing", id)
		}
	}
}
