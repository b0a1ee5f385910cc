package docker

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/network"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"metad/pkg/task"
)

// TestEngineUpgraded: an Engine that comes back and refuses the API version spoken so far is
// followed again.
func TestEngineUpgraded(t *testing.T) {
	e := startEngine(t)
	id := e.run()
	engine, err := NewClient("unix://" + e.socket)
	if err != nil {
		t.Fatal(err)
	}
	w := watch(t, e, func(c *Config) { c.Engine = engine })
	if !up(id)(w.current()) {
		t.Fatalf("got %s", show(w.current()))
	}
	e.down()
	e.mu.Lock()
	e.version = "1.44"
	e.mu.Unlock()
	late := e.run()
	e.up()
	w.until(t, "a container of the new Engine", up(late))
	if err := engine.Close(); err != nil {
		t.Error(err)
	}
}

// TestNewbornConnectedLater: Docker since version 28 connects a container's network after its
// process exists. The namespace is looked into until it is connected, though the Engine says
// nothing and no port is heard of.
func TestNewbornConnectedLater(t *testing.T) {
	e := startEngine(t)
	dir := t.TempDir()
	w := newWatched(t, e)
	var reads atomic.Int32
	w.readNS = func(c *task.Container) (*namespace, error) {
		if reads.Add(1) < 5 {
			return &namespace{inode: uint64(c.PID)}, nil // only lo
		}
		return fakeNamespace(c)
	}
	w.startWithBirths(t, dir)
	id := e.run(func(c *container.InspectResponse) {
		*c.State = container.State{Status: "created"}
	})
	e.emit(events.ActionCreate, id)
	w.until(t, "created", func(tasks []*task.Task) bool {
		_, c := find(tasks, id)
		return c != nil
	})
	never := make(chan struct{})
	defer close(never)
	e.mu.Lock()
	e.onInspect = func(string) { <-never }
	e.mu.Unlock()
	writeBundle(t, dir, id, 4321)
	w.until(t, "an endpoint before it runs", func(tasks []*task.Task) bool {
		tk, _ := find(tasks, id)
		return len(tk.Endpoints) == 1
	})
	n := reads.Load()
	time.Sleep(20 * time.Millisecond)
	if reads.Load() > n {
		t.Errorf("its namespace is read on and on")
	}
}

// TestRestartIsSeen: a container that is started again has its address before the Engine says that
// it runs, or even that it has ended; and another address if it gets one.
func TestRestartIsSeen(t *testing.T) {
	e := startEngine(t)
	dir := t.TempDir()
	id := e.run()
	w := newWatched(t, e)
	w.readNS = func(c *task.Container) (*namespace, error) {
		if c.PID == 4321 && slices.ContainsFunc(c.DockerNetworks,
			func(n task.DockerNetwork) bool { return n.IPAddress != "" }) {
			return nil, errors.New("asked to believe the address of the life before")
		}
		return &namespace{inode: uint64(c.PID),
			endpoints: []task.Endpoint{{Ifindex: c.PID}}}, nil
	}
	w.startWithBirths(t, dir)
	release := make(chan struct{})
	e.mu.Lock()
	// dockerd holds the container's lock while it starts it
	e.onInspect = func(string) { <-release }
	e.mu.Unlock()
	e.emit(events.ActionDie, id)
	w.until(t, "ended", func(tasks []*task.Task) bool {
		tk, c := find(tasks, id)
		return len(tk.Endpoints) == 0 && c.KnownStatus == task.StatusStopped &&
			!c.Running() && !c.FinishedAt.IsZero()
	})
	writeBundle(t, dir, id, 4321)
	w.until(t, "started again", func(tasks []*task.Task) bool {
		tk, c := find(tasks, id)
		return len(tk.Endpoints) == 1 && tk.Endpoints[0].Ifindex == 4321 &&
			c.KnownStatus == task.StatusRunning
	})
	e.change(id, func(c *container.InspectResponse) {
		c.State.Pid, c.State.StartedAt = 4321, time.Now().UTC().Format(time.RFC3339Nano)
	})
	close(release)
	w.until(t, "running, as the Engine says too", func(tasks []*task.Task) bool {
		_, c := find(tasks, id)
		return c.PID == 4321
	})
}

// TestSharedNamespace: a container without labels that shares another's network namespace is a
// container of that one's task, whichever is known first and as long as the other is there.
func TestSharedNamespace(t *testing.T) {
	e := startEngine(t)
	guest := func(of string, change ...func(*container.InspectResponse)) string {
		return e.run(append(change, func(c *container.InspectResponse) {
			c.HostConfig.NetworkMode = container.NetworkMode("container:" + of)
			c.NetworkSettings.Networks = nil
		})...)
	}
	host := e.run()
	g := guest(host)
	gg := guest(g)
	byName := guest("c1")
	labelled := guest(host, func(c *container.InspectResponse) {
		c.Config.Labels = map[string]string{labelComposeProject: "shop",
			labelComposeService: "web"}
	})
	w := watch(t, e)
	tk, _ := find(w.current(), host)
	for _, id := range []string{g, gg, byName} {
		if tk.Container(id) == nil {
			t.Errorf("%.6s is not in its host's task", id)
		}
	}
	if other, _ := find(w.current(), labelled); other == tk || len(w.current()) != 2 ||
		len(tk.Endpoints) != 1 || tk.Family != "c1" {
		t.Errorf("got %s", show(w.current()))
	}
	e.remove(host)
	e.emit(events.ActionDestroy, host)
	w.until(t, "a task of its own", func(tasks []*task.Task) bool {
		own, _ := find(tasks, g)
		h, _ := find(tasks, host)
		return h == nil && own != nil && strings.HasPrefix(g, own.ID) &&
			own.Container(gg) != nil && own.Container(byName) == nil
	})
}

// TestImageLabels: labels that an image carries put nobody into a task. Those of the ECS agent and
// of Compose do, also if the image has the same ones: each sets some that no image can have. An
// image is asked for once.
func TestImageLabels(t *testing.T) {
	const victim = "arn:aws:ecs:us-west-2:111122223333:task/default/victim"
	ecs := map[string]string{task.LabelTaskARN: victim, task.LabelContainerName: "app",
		task.LabelFamily: "f"}
	compose := map[string]string{labelComposeProject: "shop", labelComposeService: "web",
		"com.docker.compose.version": "2.26.1"}
	with := func(labels map[string]string, kv ...string) map[string]string {
		all := map[string]string{}
		for k, v := range labels {
			all[k] = v
		}
		for i := 0; i < len(kv); i += 2 {
			all[kv[i]] = kv[i+1]
		}
		return all
	}
	for _, tt := range []struct {
		name         string
		image, inner map[string]string // the image's labels, the container's
		want         string            // its task's id; "": its own
	}{
		{"docker run of an image with the agent's labels", ecs, ecs, ""},
		{"docker run of an image with Compose's labels", compose, compose, ""},
		{"docker run of an image with both", with(ecs, labelComposeProject, "shop", labelComposeService, "web"), with(ecs, labelComposeProject, "shop", labelComposeService, "web"), ""},
		{"Compose runs what Compose has built for the same service", compose, with(compose, "com.docker.compose.config-hash", "1"), "shop"},
		{"Compose runs an image with another project's labels", with(compose, labelComposeProject, "blog"), with(compose, "com.docker.compose.oneoff", "False"), "shop"},
		{"Compose runs an image with the agent's labels", ecs, with(ecs, labelComposeProject, "shop", labelComposeService, "web"), "shop"},
		{"the agent runs an image with another task's labels", with(ecs, task.LabelTaskARN, victim+"2"), ecs, "victim"},
		{"the agent runs an image with Compose's labels", compose, with(ecs, labelComposeProject, "shop", labelComposeService, "web"), "victim"},
		{"the agent runs an image without labels", nil, ecs, "victim"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := startEngine(t)
			e.images = map[string]map[string]string{"sha256:1": tt.image}
			run := func() string {
				return e.run(func(c *container.InspectResponse) {
					c.Image, c.Config.Labels = "sha256:1", tt.inner
				})
			}
			id, plain := run(), e.run(func(c *container.InspectResponse) {
				c.Image = "sha256:2"
			})
			w := watch(t, e)
			again := run()
			e.emit(events.ActionStart, again)
			w.until(t, "another of the image", up2(again))
			tk, c := find(w.current(), id)
			if want := tt.want; want != tk.ID &&
				(want != "" || !strings.HasPrefix(id, tk.ID)) {
				t.Errorf("task %s, want %q", tk.ID, want)
			}
			if len(c.Labels) != len(tt.inner) {
				t.Errorf("labels shown: %v", c.Labels)
			}
			if !up(plain)(w.current()) {
				t.Error("one without labels is not there")
			}
			e.mu.Lock()
			defer e.mu.Unlock()
			asked := slices.DeleteFunc(slices.Clone(e.asked), func(p string) bool {
				return !strings.Contains(p, "/images/")
			})
			if len(asked) > 2 || slices.ContainsFunc(asked, func(p string) bool {
				return strings.Contains(p, "sha256:2")
			}) {
				t.Errorf("asked for %v, want the one image whose labels count",
					asked)
			}
		})
	}
}

// TestImageGivesNoRight: a label metad.host-tasks that a container has from its image is not the
// container's; one that its creation has set to another value is, and all other labels are shown.
func TestImageGivesNoRight(t *testing.T) {
	const right = "metad.host-tasks"
	for _, tt := range []struct {
		name         string
		image, inner map[string]string
		want         map[string]string
	}{
		{"from the image", map[string]string{right: "true", "team": "a"}, map[string]string{right: "true", "team": "a"}, map[string]string{"team": "a"}},
		{"from the image, of a Compose service", map[string]string{right: "true"},
			map[string]string{right: "true", labelComposeProject: "shop",
				labelComposeService: "web"},
			map[string]string{labelComposeProject: "shop", labelComposeService: "web"}},
		{"from the creation", map[string]string{"team": "a"}, map[string]string{right: "true", "team": "a"}, map[string]string{right: "true", "team": "a"}},
		{"from the creation, against the image", map[string]string{right: "false"}, map[string]string{right: "true"}, map[string]string{right: "true"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := startEngine(t)
			e.images = map[string]map[string]string{"sha256:1": tt.image}
			id := e.run(func(c *container.InspectResponse) {
				c.Image, c.Config.Labels = "sha256:1", tt.inner
			})
			w := watch(t, e)
			w.until(t, "the container", up2(id))
			if _, c := find(w.current(), id); !maps.Equal(c.Labels, tt.want) {
				t.Errorf("got %v, want %v", c.Labels, tt.want)
			}
		})
	}
}

// up2 reports that id runs, in a task of any number of endpoints.
func up2(id string) func([]*task.Task) bool {
	return func(tasks []*task.Task) bool {
		_, c := find(tasks, id)
		return c != nil && c.Running()
	}
}

// TestGatewayAddress: a container on an overlay network is reached at the address that the gateway
// network has given it, which only the Engine can say; another address in its namespace is still
// not its own.
func TestGatewayAddress(t *testing.T) {
	e := startEngine(t)
	id := e.run(func(c *container.InspectResponse) {
		c.NetworkSettings.Networks = map[string]*network.EndpointSettings{
			"ov": {IPAddress: "10.0.1.5"}}
	})
	e.networks = []network.Inspect{{Name: gatewayNetwork, Driver: "bridge",
		Containers: map[string]network.EndpointResource{
			id: {IPv4Address: "172.18.0.3/16"}}}}
	w := newWatched(t, e)
	w.readNS = func(c *task.Container) (*namespace, error) {
		return &namespace{unclaimed: []task.Endpoint{{Addr: addr("172.18.0.3"), Ifindex: 7},
			{Addr: addr("172.18.0.4"), Ifindex: 7}}}, nil
	}
	w.start(t)
	<-w.Synced()
	if tk, _ := find(w.current(), id); len(tk.Endpoints) != 1 ||
		tk.Endpoints[0].Addr != addr("172.18.0.3") {
		t.Errorf("got %v", tk.Endpoints)
	}
}

// TestBridges: the devices of the Engine's bridge networks are told, and told again when a network
// is made or removed.
func TestBridges(t *testing.T) {
	e := startEngine(t)
	e.networks = []network.Inspect{
		{Name: "bridge", Driver: "bridge", ID: strings.Repeat("a", 64), Options: map[string]string{"com.docker.network.bridge.name": "docker0"}},
		{Name: "own", Driver: "bridge", ID: strings.Repeat("b", 64)},
	}
	told := make(chan []string, 10)
	watch(t, e, func(c *Config) { c.Bridges = func(names []string) { told <- names } })
	want := func(names ...string) {
		t.Helper()
		select {
		case got := <-told:
			if !slices.Equal(got, names) {
				t.Errorf("got %v, want %v", got, names)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of %v", names)
		}
	}
	want("br-bbbbbbbbbbbb", "docker0")
	tell := func(action events.Action) {
		e.mu.Lock()
		defer e.mu.Unlock()
		for ch := range e.streams {
			ch <- events.Message{Type: events.NetworkEventType, Action: action,
				Actor: events.Actor{ID: "c"}}
		}
	}
	e.mu.Lock()
	e.networks = append(e.networks, network.Inspect{Name: "shop", Driver: "bridge",
		Options: map[string]string{"com.docker.network.bridge.name": "shopnet"}})
	e.mu.Unlock()
	tell(events.ActionCreate)
	want("br-bbbbbbbbbbbb", "docker0", "shopnet")
	e.mu.Lock()
	e.networks = e.networks[:1]
	e.mu.Unlock()
	tell(events.ActionDestroy)
	want("docker0")
	tell(events.ActionDestroy) // nothing has changed
	select {
	case got := <-told:
		t.Errorf("told of %v once more", got)
	case <-time.After(50 * time.Millisecond):
	}
}

// TestEndedIsNoError: containers that end while they are looked at are neither errors nor warnings.
func TestEndedIsNoError(t *testing.T) {
	e := startEngine(t)
	core, logs := observer.New(zap.WarnLevel)
	w := newWatched(t, e, func(c *Config) { c.Log = zap.New(core) })
	w.state.inode = func(int) uint64 { return 0 } // no process is there any more
	w.readNS = func(*task.Container) (*namespace, error) { return nil, fs.ErrNotExist }
	w.start(t)
	<-w.Synced()
	var wg sync.WaitGroup
	for worker := range 6 {
		wg.Go(func() {
			for n := range 25 {
				id := e.run()
				e.emit(events.ActionCreate, id)
				e.emit(events.ActionStart, id)
				time.Sleep(time.Duration((n*7+worker*3)%5) * time.Millisecond)
				e.emit(events.ActionDie, id)
				e.remove(id)
				e.emit(events.ActionDestroy, id)
			}
		})
	}
	wg.Wait()
	for w.Status().Containers > 0 {
		time.Sleep(time.Millisecond)
	}
	if s := w.Status(); s.Errors != 0 || logs.Len() != 0 {
		t.Errorf("150 containers that lived and ended: %d errors, warnings %v", s.Errors,
			logs.All())
	}
}

// TestPortEventsCost: a port that comes or goes has those containers looked at that it could belong
// to. Many that have no port at all are looked at once a second, however many ports come.
func TestPortEventsCost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 100
		d := newDirect(t)
		var ids []string
		for i := range n {
			ids = append(ids, d.run(func(c *container.InspectResponse) {
				if i > 0 {
					c.HostConfig.NetworkMode,
						c.NetworkSettings.Networks = "none", nil
				}
			}))
		}
		o := observe(t, d, nil)
		<-o.Synced()
		var reads atomic.Int32
		o.read = func(c *task.Container) (*namespace, error) {
			reads.Add(1)
			return fakeNamespace(c)
		}
		for range 100 {
			o.PortChanged(99999)
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		if got := reads.Load(); got != 0 {
			t.Errorf("%d looks at once for ports of others", got)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := reads.Load(); got != n-1 {
			t.Errorf("%d looks at containers without a port, want one at each of %d",
				got, n-1)
		}
		_, c := find(o.last(), ids[0])
		o.PortChanged(c.PID)
		synctest.Wait()
		if got := reads.Load(); got != n {
			t.Errorf("%d looks at the container of the port, want 1", got-n+1)
		}
		o.end(t)
	})
}

// TestNoInotifyLeft: metad goes on without the bundles, and says so, where the user's inotify
// instances are used up.
func TestNoInotifyLeft(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	e := startEngine(t)
	id := e.run()
	w := newWatched(t, e, func(c *Config) { c.Log = zap.New(core) })
	w.useBirths(nil, unix.EMFILE)
	w.start(t)
	w.until(t, "a container", up(id))
	if logs.Len() != 1 {
		t.Errorf("got %d warnings, want 1", logs.Len())
	}
}

// TestTrouble: an error is told once in a row of failures, and not without end if each is another.
func TestTrouble(t *testing.T) {
	var tr trouble
	told := 0
	for i := range 100 {
		for range 2 {
			if tr.isNew(fmt.Errorf("error %d", i)) {
				told++
			}
		}
	}
	if told != 16 {
		t.Errorf("told %d times", told)
	}
}
