package docker

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/client"
	"go.uber.org/zap"

	"metad/pkg/task"
)

// direct is an engine without a socket, for tests with a clock of their own.
type direct struct {
	*engine
	inspecting func(ctx context.Context, id string) error // before an inspect is answered
	listing    func(context.Context) error                // before a list is answered
	dropped    chan error                                 // ends the event stream
	setUp      func(*Follower)                            // before it runs; may be nil
}

func newDirect(t testing.TB) *direct {
	return &direct{
		engine: &engine{t: t, containers: map[string]*container.InspectResponse{},
			streams: map[chan events.Message]bool{}},
		inspecting: func(context.Context, string) error { return nil },
		listing:    func(context.Context) error { return nil },
		dropped:    make(chan error),
	}
}

func (d *direct) ContainerList(ctx context.Context, _ container.ListOptions) ([]container.Summary,
	error) {
	d.mu.Lock()
	d.lists++
	d.mu.Unlock()
	if err := d.listing(ctx); err != nil {
		return nil, err
	}
	return d.list(), nil
}

func (d *direct) ContainerInspect(ctx context.Context, id string) (container.InspectResponse,
	error) {
	d.mu.Lock()
	d.inspects++
	d.mu.Unlock()
	if err := d.inspecting(ctx, id); err != nil {
		return container.InspectResponse{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.containers[id]
	if c == nil {
		return container.InspectResponse{}, errdefs.ErrNotFound
	}
	return copyOf(d.t, c), nil
}

func (d *direct) Events(ctx context.Context, _ events.ListOptions) (<-chan events.Message,
	<-chan error) {
	ch, errs := make(chan events.Message, 10000), make(chan error, 1)
	d.mu.Lock()
	d.streams[ch] = true
	d.mu.Unlock()
	go func() {
		var err error
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case err = <-d.dropped:
		}
		d.mu.Lock()
		delete(d.streams, ch)
		d.mu.Unlock()
		errs <- err
	}()
	return ch, errs
}

func (d *direct) ImageInspect(context.Context, string,
	...client.ImageInspectOption) (image.InspectResponse, error) {
	return image.InspectResponse{}, errdefs.ErrNotFound
}

func (d *direct) NetworkInspect(context.Context, string, network.InspectOptions) (network.Inspect,
	error) {
	return network.Inspect{}, errdefs.ErrNotFound
}

func (d *direct) NetworkList(context.Context, network.ListOptions) ([]network.Summary, error) {
	return nil, nil
}

// after answers when d has passed, unless the request ends before.
func after(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// hangs never answers.
func hangs(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// observed is a Follower of a direct engine, in a bubble with its own clock.
type observed struct {
	*Follower
	mu    sync.Mutex
	sets  [][]*task.Task // as applied
	stop  context.CancelFunc
	ended chan error
}

func observe(t testing.TB, d *direct, restored []*task.Task, change ...func(*Config)) *observed {
	t.Helper()
	o := &observed{ended: make(chan error, 1)}
	cfg := Config{Engine: d, Log: zap.NewNop(), Apply: func(tasks []*task.Task) {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.sets = append(o.sets, tasks)
	}}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	if o.Follower, err = newFollower(cfg); err != nil {
		t.Fatal(err)
	}
	o.state.inode = func(pid int) uint64 { return uint64(pid) }
	o.read = fakeNamespace
	if d.setUp != nil {
		d.setUp(o.Follower)
	}
	o.Restore(restored)
	ctx, cancel := context.WithCancel(context.Background())
	o.stop = cancel
	go func() { o.ended <- o.Run(ctx) }()
	return o
}

func (o *observed) end(t testing.TB) {
	t.Helper()
	o.stop()
	if err := <-o.ended; err != nil {
		t.Error(err)
	}
}

// last returns the last set that was applied, nil if none was.
func (o *observed) last() []*task.Task {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.sets) == 0 {
		return nil
	}
	return o.sets[len(o.sets)-1]
}

// all returns every set that was applied.
func (o *observed) all() [][]*task.Task {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sets
}

// served returns how many tasks of a set have an address.
func served(tasks []*task.Task) (n int) {
	for _, t := range tasks {
		if len(t.Endpoints) > 0 {
			n++
		}
	}
	return n
}

// known returns what a follower that knows all of d's containers says of them.
func known(t testing.TB, d *direct) []*task.Task {
	t.Helper()
	o := observe(t, d, nil)
	<-o.Synced()
	o.end(t)
	return o.last()
}

// TestRestoredStay: what an earlier process knew is not taken away because the Engine is slow to
// confirm it, or does not answer for some of it at all; and a confirmed task is the task it was.
func TestRestoredStay(t *testing.T) {
	const n = 160
	for name, inspect := range map[string]func(ctx context.Context, number int) error{
		"slow": func(ctx context.Context, _ int) error { return after(ctx, 9*time.Second) },
		"eight hang": func(ctx context.Context, number int) error {
			if number < 8 {
				return hangs(ctx)
			}
			return nil
		},
		"all hang":     func(ctx context.Context, _ int) error { return hangs(ctx) },
		"none answers": func(context.Context, int) error { return errors.New("500") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDirect(t)
				number := map[string]int{}
				for i := range n {
					number[d.run()] = i
				}
				gone := d.run()
				before := known(t, d)
				d.remove(gone)
				d.inspecting = func(ctx context.Context, id string) error {
					return inspect(ctx, number[id])
				}
				o := observe(t, d, before)
				time.Sleep(5 * time.Minute)
				synctest.Wait()
				for i, set := range o.all() {
					if served(set) != n || len(set) != n {
						t.Fatalf("set %d of %d has %d tasks, %d of them "+
							"with an address, want %d", i, len(o.all()),
							len(set), served(set), n)
					}
				}
				if len(o.all()) != 1 {
					t.Errorf("%d sets, although nothing has changed",
						len(o.all()))
				}
				same := 0
				for _, tk := range before {
					for _, now := range o.last() {
						if now == tk {
							same++
						}
					}
				}
				if s := o.Status(); same != n || !s.Complete || s.Missing != 0 {
					t.Errorf("%d of %d tasks have the pointer they had; "+
						"status %+v", same, n, s)
				}
				o.end(t)
			})
		})
	}
}

// TestRestoredChanges: a restored container that the list shows stopped has no address any more,
// and what has changed while nothing was running is found.
func TestRestoredChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(t)
		stops, restarts, stays := d.run(), d.run(), d.run()
		before := known(t, d)
		cell := func(tasks []*task.Task, id string) *task.StatsCell {
			_, c := find(tasks, id)
			return c.Stats
		}
		d.change(stops, stopped)
		d.change(restarts, func(c *container.InspectResponse) {
			c.State.Pid, c.State.StartedAt = 4711,
				time.Now().Add(time.Second).UTC().Format(time.RFC3339Nano)
		})
		d.inspecting = func(ctx context.Context, id string) error {
			if id == stops {
				return hangs(ctx)
			}
			return nil
		}
		o := observe(t, d, before)
		<-o.Synced()
		set := o.last()
		if tk, _ := find(set, stops); len(tk.Endpoints) != 0 {
			t.Errorf("one that the list shows stopped has the address %v", tk.Endpoints)
		}
		if tk, _ := find(set, restarts); tk.Endpoints[0].Ifindex != 4711 ||
			cell(set, restarts) == cell(before, restarts) {
			t.Errorf("one that was started again has %v, and its old statistics: %v",
				tk.Endpoints, cell(set, restarts) == cell(before, restarts))
		}
		if cell(set, stays) != cell(before, stays) {
			t.Error("one that runs on has lost its statistics")
		}
		o.end(t)
	})
}

// TestFirstSetIsComplete: where nothing is known from before, the first set has every container
// that the Engine answers for, however slowly; one that it does not answer for holds it up once,
// and is counted.
func TestFirstSetIsComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 300
		d := newDirect(t)
		var hung string
		for range n {
			hung = d.run()
		}
		d.inspecting = func(ctx context.Context, id string) error {
			if id == hung {
				return hangs(ctx)
			}
			return after(ctx, 3*time.Second)
		}
		began := time.Now()
		o := observe(t, d, nil)
		time.Sleep(9 * time.Second)
		if s := o.Status(); s.Complete || len(o.all()) != 0 {
			t.Errorf("after 9 s of an Engine that takes longer: %d sets, status %+v",
				len(o.all()), s)
		}
		<-o.Synced()
		if got := served(o.last()); got != n-1 {
			t.Errorf("the first set has %d containers, want %d", got, n-1)
		}
		if d := time.Since(began); d > 2*time.Minute {
			t.Errorf("the first set comes after %v", d)
		}
		if s := o.Status(); !s.Complete || s.Missing != 1 {
			t.Errorf("status %+v, want complete with one missing", s)
		}
		if o.Ready() == nil {
			t.Error("ready without one of the containers")
		}
		d.mu.Lock()
		d.inspecting = func(context.Context, string) error { return nil }
		d.mu.Unlock()
		time.Sleep(time.Minute)
		if s := o.Status(); s.Missing != 0 || served(o.last()) != n || o.Ready() != nil {
			t.Errorf("after the Engine has answered: %d containers, status %+v",
				served(o.last()), s)
		}
		o.end(t)
	})
}

// TestHungInspectsStarveNobody: containers that the Engine does not answer for do not hold up
// another's start, neither when they hang for the first time nor ever after.
func TestHungInspectsStarveNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(t)
		hung := map[string]bool{}
		for range 2 * places[priorityEvent] {
			hung[d.run()] = true
		}
		o := observe(t, d, nil)
		<-o.Synced()
		d.inspecting = func(ctx context.Context, id string) error {
			if hung[id] {
				return hangs(ctx)
			}
			return nil
		}
		for range 30 {
			for id := range hung {
				d.emit(events.ActionHealthStatus, id)
			}
			time.Sleep(time.Millisecond)
			id := d.run()
			d.emit(events.ActionStart, id)
			time.Sleep(2 * slowAfter)
			if synctest.Wait(); !up(id)(o.last()) {
				t.Fatalf("%v after its start a container is not known", 2*slowAfter)
			}
		}
		o.end(t)
	})
}

// TestSlowList: a list may take minutes. While one does, and when one fails, the event stream goes
// on, and nothing is inspected because of it.
func TestSlowList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(t)
		id := d.run()
		d.listing = func(ctx context.Context) error { return after(ctx, 90*time.Second) }
		o := observe(t, d, nil)
		<-o.Synced()
		if !up(id)(o.last()) {
			t.Error("the list was not taken in")
		}
		inspects, _ := d.counts()
		failing := errors.New("no space left on device")
		d.listing = func(ctx context.Context) error {
			_ = after(ctx, 90*time.Second)
			return failing
		}
		time.Sleep(10 * time.Minute)
		late := d.run()
		d.emit(events.ActionStart, late)
		time.Sleep(time.Second)
		if synctest.Wait(); !up(late)(o.last()) {
			t.Error("an event was not heard while a list fails")
		}
		after, lists := d.counts()
		if s := o.Status(); s.Reconnects != 0 || after != inspects+1 || lists < 5 {
			t.Errorf("%d inspects for one event, %d lists, status %+v", after-inspects,
				lists, s)
		}
		o.end(t)
	})
}

// TestLeftAlone: the address of a container that the Engine lists and does not answer for is told,
// before the set that lacks it; also soon that of one that comes later. It is told no more when the
// container has ended, or when the Engine has answered.
func TestLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirect(t)
		known := d.run()
		for range 2 {
			d.run()
		}
		answers := make(chan struct{})
		d.inspecting = func(ctx context.Context, id string) error {
			select {
			case <-answers:
			default:
				if id != known {
					return hangs(ctx)
				}
			}
			return nil
		}
		var told [][]netip.Addr
		var sets []int // that were applied before each of told
		o := observe(t, d, nil, func(c *Config) {
			c.ReconcileEvery = time.Hour
			apply, n := c.Apply, 0
			c.Apply = func(tasks []*task.Task) { n++; apply(tasks) }
			c.LeftAlone = func(addrs []netip.Addr) {
				told, sets = append(told, addrs), append(sets, n)
			}
		})
		f := func(what string, want ...string) {
			t.Helper()
			synctest.Wait()
			var got []string
			if len(told) > 0 {
				for _, a := range told[len(told)-1] {
					got = append(got, a.String())
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: got %q, want %q", what, got, want)
			}
		}
		time.Sleep(inspectTimeout + time.Second)
		f("two that hang", "172.17.0.2", "172.17.0.3")
		if len(sets) == 0 || sets[0] != 0 {
			t.Errorf("told after so many sets: %v, want before the first", sets)
		}
		late := d.run()
		d.emit(events.ActionStart, late)
		time.Sleep(inspectTimeout + time.Second)
		f("one that comes later", "172.17.0.2", "172.17.0.3", "172.17.0.4")
		d.change(late, stopped)
		d.emit(events.ActionDie, late)
		f("it has ended", "172.17.0.2", "172.17.0.3")
		close(answers)
		time.Sleep(time.Minute)
		f("the Engine answers")
		o.end(t)
	})
}
