//go:build root

package docker

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/go-connections/nat"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"metad/internal/testdocker"
	"metad/pkg/task"
)

func TestMain(m *testing.M) { os.Exit(testdocker.Main(m)) }

// followed is a Follower that a test watches.
type followed struct {
	*Follower
	mu    sync.Mutex
	tasks []*task.Task
	calls chan struct{} // a token after an Apply
}

func follow(t *testing.T, h *testdocker.Host, change func(*Config)) *followed {
	t.Helper()
	w := &followed{calls: make(chan struct{}, 1)}
	cfg := Config{Engine: h.Client, HostNetns: h.NSPath(), BundleDirs: []string{h.BundleDir()},
		ReconcileEvery: time.Hour, Log: zaptest.NewLogger(t),
		Apply: func(tasks []*task.Task) {
			w.mu.Lock()
			w.tasks = tasks
			w.mu.Unlock()
			select {
			case w.calls <- struct{}{}:
			default:
			}
		}}
	if change != nil {
		change(&cfg)
	}
	var err error
	if w.Follower, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	select {
	case <-w.Synced():
	case <-time.After(30 * time.Second):
		t.Fatal("no first Apply")
	}
	return w
}

func (w *followed) now() []*task.Task {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tasks
}

// until waits until ok says yes to the container with the id and its task, and returns them.
func (w *followed) until(t *testing.T, what, id string,
	ok func(*task.Task, *task.Container) bool) (*task.Task, *task.Container) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		tk, c := find(w.now(), id)
		if ok(tk, c) {
			return tk, c
		}
		select {
		case <-w.calls:
		case <-deadline:
			t.Fatalf("waited in vain for: %s; have task %+v, container %+v", what, tk,
				c)
		}
	}
}

func running(tk *task.Task, c *task.Container) bool {
	return c != nil && c.KnownStatus == task.StatusRunning && len(tk.Endpoints) > 0
}

// realEndpoint asks the container and the host's bridge, not the Follower's code, for an endpoint.
func realEndpoint(t *testing.T, h *testdocker.Host, id, device, gateway string) task.Endpoint {
	t.Helper()
	ep := task.Endpoint{Container: id}
	out := h.Exec(t, id, "sh", "-c", "cat /sys/class/net/"+device+
		"/address; ip -4 -o addr show "+device+"; cat /sys/class/net/"+device+"/ifindex")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 3 {
		t.Fatalf("unexpected output %q", out)
	}
	if _, err := fmt.Sscanf(lines[0], "%x:%x:%x:%x:%x:%x", &ep.MAC[0], &ep.MAC[1], &ep.MAC[2],
		&ep.MAC[3], &ep.MAC[4], &ep.MAC[5]); err != nil {
		t.Fatal(err)
	}
	ep.Addr = netip.MustParsePrefix(strings.Fields(lines[1])[3]).Addr()
	// Let it speak, and see which of the bridge's ports has learned its MAC.
	h.Exec(t, id, "sh", "-c", "ping -c1 -w5 "+gateway)
	handle, err := netlink.NewHandleAt(h.NS, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	neighbours, err := handle.NeighList(0, unix.AF_BRIDGE)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range neighbours {
		if slices.Equal(n.HardwareAddr, ep.MAC[:]) && n.State&netlink.NUD_PERMANENT == 0 {
			ep.Ifindex = n.LinkIndex
		}
	}
	if ep.Ifindex == 0 {
		t.Fatalf("no port has learned %x", ep.MAC)
	}
	return ep
}

func TestRootLife(t *testing.T) {
	h := testdocker.Shared(t)
	h.CreateBridge(t, "br-second", netip.MustParsePrefix("10.77.0.0/24"))
	w := follow(t, h, nil)
	ctx := context.Background()

	id := h.Create(t, testdocker.Container{Name: "life"})
	w.until(t, "created", id, func(tk *task.Task, c *task.Container) bool {
		return c != nil && c.KnownStatus == task.StatusCreated && len(tk.Endpoints) == 0
	})
	h.StartContainer(t, id)
	tk, c := w.until(t, "running, as the Engine says too", id,
		func(tk *task.Task, c *task.Container) bool { return running(tk, c) && c.PID != 0 })
	if want := []task.Endpoint{realEndpoint(t, h, id, "eth0", "172.17.0.1")}; !slices.Equal(
		tk.Endpoints, want) {
		t.Errorf("endpoints: got %v, want %v", tk.Endpoints, want)
	}
	if c.PID != h.Inspect(t, id).State.Pid || c.Name != "life" ||
		c.Image != testdocker.BusyboxImage || !strings.HasPrefix(c.ImageID, "sha256:") {
		t.Errorf("got %+v", c)
	}
	cell := c.Stats

	if err := h.Client.ContainerRename(ctx, id, "renamed"); err != nil {
		t.Fatal(err)
	}
	w.until(t, "renamed", id, func(_ *task.Task, c *task.Container) bool {
		return c.DockerName == "renamed"
	})
	if err := h.Client.ContainerPause(ctx, id); err != nil {
		t.Fatal(err)
	}
	w.until(t, "paused", id, func(tk *task.Task, c *task.Container) bool {
		return c.State == "paused" && running(tk, c)
	})
	if err := h.Client.ContainerUnpause(ctx, id); err != nil {
		t.Fatal(err)
	}
	w.until(t, "unpaused", id, func(_ *task.Task, c *task.Container) bool {
		return c.State == "running"
	})

	if err := h.Client.NetworkConnect(ctx, "br-second", id, nil); err != nil {
		t.Fatal(err)
	}
	tk, _ = w.until(t, "two networks", id, func(tk *task.Task, c *task.Container) bool {
		return len(tk.Endpoints) == 2
	})
	want := []task.Endpoint{realEndpoint(t, h, id, "eth1", "10.77.0.1"),
		realEndpoint(t, h, id, "eth0", "172.17.0.1")}
	slices.SortFunc(want, compareEndpoints)
	if !slices.Equal(tk.Endpoints, want) {
		t.Errorf("endpoints: got %v, want %v", tk.Endpoints, want)
	}
	if err := h.Client.NetworkDisconnect(ctx, "bridge", id, false); err != nil {
		t.Fatal(err)
	}
	second := realEndpoint(t, h, id, "eth1", "10.77.0.1")
	w.until(t, "one network", id, func(tk *task.Task, c *task.Container) bool {
		return slices.Equal(tk.Endpoints, []task.Endpoint{second}) &&
			len(c.DockerNetworks) == 1
	})

	before, _ := find(w.now(), id)
	timeout := 0
	if err := h.Client.ContainerRestart(ctx, id,
		container.StopOptions{Timeout: &timeout}); err != nil {
		t.Fatal(err)
	}
	tk, _ = w.until(t, "restarted", id, func(tk *task.Task, c *task.Container) bool {
		return running(tk, c) && tk.Endpoints[0].Ifindex != before.Endpoints[0].Ifindex
	})
	if want := []task.Endpoint{realEndpoint(t, h, id, "eth0", "10.77.0.1")}; !slices.Equal(
		tk.Endpoints, want) {
		t.Errorf("endpoints after restart: got %v, want %v", tk.Endpoints, want)
	}

	if err := h.Client.ContainerStop(ctx, id,
		container.StopOptions{Timeout: &timeout}); err != nil {
		t.Fatal(err)
	}
	tk, c = w.until(t, "stopped", id, func(_ *task.Task, c *task.Container) bool {
		return c.KnownStatus == task.StatusStopped
	})
	if len(tk.Endpoints) != 0 || tk.KnownStatus != task.StatusStopped || c.ExitCode == nil ||
		*c.ExitCode != 137 || c.FinishedAt.IsZero() || c.PID != 0 {
		t.Errorf("stopped: got %+v, %+v", tk, c)
	}
	if c.Stats != cell {
		t.Error("the statistics' cell has changed")
	}
	h.Remove(t, id)
	w.until(t, "removed", id, func(_ *task.Task, c *task.Container) bool { return c == nil })
}

// M12, M13, M23, M25, N03: a task in awsvpc mode, and one whose ARN is not one.
func TestRootAwsvpc(t *testing.T) {
	h := testdocker.Shared(t)
	w := follow(t, h, nil)
	arn := "arn:aws:ecs:us-west-2:111122223333:task/default/follow"
	labels := func(name string) map[string]string {
		return map[string]string{task.LabelTaskARN: arn, task.LabelContainerName: name,
			task.LabelFamily: "fam", task.LabelRevision: "7", task.LabelCluster: "default"}
	}
	pause := h.Run(t, testdocker.Container{Network: "none", Labels: labels(task.PauseName)})
	_, p := w.until(t, "pause without CNI", pause, func(_ *task.Task, c *task.Container) bool {
		return c != nil && c.Running()
	})
	if p.KnownStatus != task.StatusRunning {
		t.Errorf("pause without ecs-eth0: got %s", p.KnownStatus)
	}
	port := h.ConnectAWSVPC(t, pause, netip.MustParsePrefix("10.1.2.3/24"),
		netip.MustParsePrefix("2001:db8::3/64"))
	w.until(t, "pause connected", pause, func(_ *task.Task, c *task.Container) bool {
		return c.KnownStatus == task.StatusResourcesProvisioned
	})
	app := h.Run(t, testdocker.Container{Network: "container:" + pause, Labels: labels("app")})
	tk, c := w.until(t, "app", app, func(_ *task.Task, c *task.Container) bool {
		return c != nil && c.KnownStatus == task.StatusRunning
	})
	if want := []task.Endpoint{{Addr: port.Addr, Ifindex: port.Ifindex, MAC: [6]byte(port.MAC),
		Container: pause}}; !slices.Equal(tk.Endpoints, want) {
		t.Errorf("endpoints: got %v, want %v", tk.Endpoints, want)
	}
	if tk.ARN != arn || tk.ID != "follow" || tk.Family != "fam" || tk.Revision != "7" ||
		tk.KnownStatus != task.StatusRunning || len(tk.Containers) != 2 {
		t.Errorf("task: got %+v", tk)
	}
	for _, c := range tk.Containers {
		if len(c.Networks) != 1 || c.Networks[0].Mode != "awsvpc" ||
			!slices.Equal(c.Networks[0].IPv4Addresses, []string{"10.1.2.3"}) ||
			!slices.Equal(c.Networks[0].IPv6Addresses, []string{"2001:db8::3"}) {
			t.Errorf("%s: networks %+v", c.Name, c.Networks)
		}
	}
	if p := tk.Pause(); p == nil || p.ID != pause || p.ImageID != "" || c.Name != "app" {
		t.Errorf("pause %+v, app %+v", p, c)
	}

	// A container in another's namespace belongs to its task, whose endpoints are still those
	// of the namespace.
	guest := h.Run(t, testdocker.Container{Network: "container:" + pause})
	gt, _ := w.until(t, "guest", guest, func(_ *task.Task, c *task.Container) bool {
		return c != nil && c.Running()
	})
	if gt.ARN != arn || !slices.Equal(gt.Endpoints, tk.Endpoints) {
		t.Errorf("a guest is in %s with endpoints %v", gt.ARN, gt.Endpoints)
	}
	h.Remove(t, pause)
	w.until(t, "address gone with the pause container", app,
		func(tk *task.Task, _ *task.Container) bool { return len(tk.Endpoints) == 0 })
}

func TestRootCompose(t *testing.T) {
	h := testdocker.Shared(t)
	w := follow(t, h, nil)
	service := func(name string) string {
		return h.Run(t,
			testdocker.Container{Labels: map[string]string{labelComposeProject: "shop",
				labelComposeService: name}})
	}
	a, b := service("web"), service("db")
	tk, c := w.until(t, "both services", b, func(tk *task.Task, c *task.Container) bool {
		return running(tk, c) && len(tk.Endpoints) == 2
	})
	if tk.Container(a) == nil || c.Name != "db" || tk.Family != "shop" ||
		tk.ARN != "arn:aws:ecs:us-east-1:000000000000:task/default/shop" {
		t.Errorf("got task %+v", tk)
	}
}

// TestRootHostileNetwork has a container take its neighbour's address, and make veths whose far
// ends are in namespaces that are not the host's.
func TestRootHostileNetwork(t *testing.T) {
	h := testdocker.Shared(t)
	w := follow(t, h, nil)
	victim := h.Run(t, testdocker.Container{})
	vt, _ := w.until(t, "victim", victim, running)
	for _, network := range []string{"bridge", "none"} {
		thief := h.Run(t, testdocker.Container{Network: network,
			Configure: func(_ *container.Config, hc *container.HostConfig) {
				hc.CapAdd = []string{"NET_ADMIN"}
			}})
		tk, _ := w.until(t, "thief", thief, func(_ *task.Task, c *task.Container) bool {
			return c != nil && c.Running()
		})
		honest := tk.Endpoints
		if network == "bridge" {
			h.Exec(t, thief, "ip", "addr", "add", vt.Endpoints[0].Addr.String()+"/16",
				"dev", "eth0")
		}
		addForeignVeths(t, h, h.Inspect(t, thief).State.Pid)
		// A rename makes sure that it has been looked at since.
		name := "thief-" + network
		if err := h.Client.ContainerRename(context.Background(), thief, name); err != nil {
			t.Fatal(err)
		}
		tk, _ = w.until(t, "renamed", thief, func(_ *task.Task, c *task.Container) bool {
			return c.DockerName == name
		})
		if !slices.Equal(tk.Endpoints, honest) {
			t.Errorf("the thief in network %s has endpoints %v, honest ones are %v",
				network, tk.Endpoints, honest)
		}
	}
}

// addForeignVeths gives the namespace of pid one veth with both ends in it and one to a third
// namespace.
func addForeignVeths(t *testing.T, h *testdocker.Host, pid int) {
	t.Helper()
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	third := h.Run(t, testdocker.Container{Network: "none"})
	thirdNS, err := netns.GetFromPid(h.Inspect(t, third).State.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer thirdNS.Close()
	for i, veth := range []*netlink.Veth{
		{LinkAttrs: netlink.LinkAttrs{Name: "own0"}, PeerName: "own1"},
		{LinkAttrs: netlink.LinkAttrs{Name: "far0"}, PeerName: "far1", PeerNamespace: netlink.NsFd(thirdNS)},
	} {
		if err := handle.LinkAdd(veth); err != nil {
			t.Fatal(err)
		}
		addr, _ := netlink.ParseAddr(fmt.Sprintf("10.66.%d.1/24", i))
		if err := handle.AddrAdd(veth, addr); err != nil {
			t.Fatal(err)
		}
		if err := handle.LinkSetUp(veth); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRootDockerRestart(t *testing.T) {
	h := testdocker.Start(t)
	w := follow(t, h, nil)
	stays := h.Run(t, testdocker.Container{})
	goes := h.Run(t, testdocker.Container{Configure: func(_ *container.Config,
		hc *container.HostConfig) {
		hc.AutoRemove = false
	}})
	w.until(t, "first", stays, running)
	w.until(t, "second", goes, running)
	before, _ := find(w.now(), stays)
	for _, end := range []func(testing.TB){h.StopDocker, h.KillDocker} {
		end(t)
		if tk, _ := find(w.now(), stays); tk != before {
			t.Errorf("task while Docker is away: got %+v, want %+v", tk, before)
		}
		reconnects := w.Status().Reconnects
		h.StartDocker(t)
		for w.Status().Reconnects == reconnects {
			time.Sleep(time.Millisecond)
		}
	}
	later := h.Run(t, testdocker.Container{})
	w.until(t, "one started after", later, running)
	if tk, _ := find(w.now(), stays); tk != before {
		t.Errorf("task after Docker's restart: got %+v, want %+v", tk, before)
	}
	// What ends while Docker is away is noticed when it is back.
	pid := h.Inspect(t, goes).State.Pid
	h.KillDocker(t)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.StartDocker(t)
	w.until(t, "stopped while Docker was away", goes,
		func(tk *task.Task, c *task.Container) bool {
			return c.KnownStatus == task.StatusStopped && len(tk.Endpoints) == 0
		})
}

// M25, M26, M29, M30, M32: what only a real Engine fills in, and that health verdicts come as
// events.
func TestRootHealthPortsVolumes(t *testing.T) {
	h := testdocker.Shared(t)
	w := follow(t, h, nil)
	id := h.Run(t, testdocker.Container{Cmd: []string{"sh", "-c", "sleep 1000000"},
		Configure: func(c *container.Config, hc *container.HostConfig) {
			c.Healthcheck = &container.HealthConfig{Test: []string{"CMD-SHELL",
				"echo hello; test ! -e /sick"}, Interval: 200 * time.Millisecond, Retries: 1}
			c.ExposedPorts = nat.PortSet{"80/tcp": {}}
			hc.PortBindings = nat.PortMap{
				"80/tcp": {{HostIP: "127.0.0.1", HostPort: "8099"}}}
			hc.Mounts = []mount.Mount{{Type: mount.TypeVolume, Source: "shared-local",
				Target: "/ecs"}}
		}})
	_, c := w.until(t, "healthy", id, func(_ *task.Task, c *task.Container) bool {
		return c != nil && c.Health != nil && c.Health.Status == "HEALTHY"
	})
	if c.Health.Output != "hello\n" || c.Health.ExitCode != 0 || c.Health.Since.IsZero() {
		t.Errorf("health: got %+v", c.Health)
	}
	if want := []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 8099,
		HostIP: "127.0.0.1"}}; !slices.Equal(c.Ports, want) {
		t.Errorf("ports: got %v, want %v", c.Ports, want)
	}
	if len(c.Volumes) != 1 || c.Volumes[0].DockerName != "shared-local" ||
		c.Volumes[0].Destination != "/ecs" || c.Volumes[0].Source == "" {
		t.Errorf("volumes: got %v", c.Volumes)
	}
	h.Exec(t, id, "touch", "/sick")
	_, c = w.until(t, "unhealthy", id, func(_ *task.Task, c *task.Container) bool {
		return c.Health.Status == "UNHEALTHY"
	})
	if c.Health.ExitCode != 1 {
		t.Errorf("health: got %+v", c.Health)
	}
	tk, _ := find(w.now(), id)
	time.Sleep(500 * time.Millisecond) // some more checks with the same verdict
	if now, _ := find(w.now(), id); now != tk {
		t.Errorf("the task changes with every check: %+v", now.Containers[0].Health)
	}
}

// TestRootStartLatency prints how long after Docker's start event, and after the process's first
// instruction, a task with its endpoint is published.
func TestRootStartLatency(t *testing.T) {
	h := testdocker.Shared(t)
	type seen struct {
		id string
		at time.Time
	}
	applied := make(chan seen, 4096)
	known := map[string]bool{}
	follow(t, h, func(cfg *Config) {
		cfg.Apply = func(tasks []*task.Task) {
			now := time.Now()
			for _, tk := range tasks {
				if len(tk.Endpoints) > 0 && !known[tk.ARN] {
					known[tk.ARN] = true
					applied <- seen{tk.Containers[0].ID, now}
				}
			}
		}
	})
	started := map[string]time.Time{}
	var mu sync.Mutex
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	messages, _ := h.Client.Events(ctx, events.ListOptions{})
	go func() {
		for m := range messages {
			if m.Type == events.ContainerEventType && m.Action == events.ActionStart {
				mu.Lock()
				started[m.Actor.ID] = time.Unix(0, m.TimeNano)
				mu.Unlock()
			}
		}
	}()
	const atOnce = 20
	measure := func(what string, n int, start func(i int) string) {
		var ids sync.Map
		var wg sync.WaitGroup
		for i := range n {
			if id := start(i); id != "" {
				ids.Store(id, true)
			}
		}
		wg.Wait()
		var fromEvent, fromProcess []time.Duration
		for range n {
			s := <-applied
			for heard := false; !heard; time.Sleep(time.Millisecond) {
				mu.Lock()
				var at time.Time
				if at, heard = started[s.id]; heard {
					fromEvent = append(fromEvent, s.at.Sub(at))
				}
				mu.Unlock()
			}
			at, err := time.Parse(time.RFC3339Nano, h.Inspect(t, s.id).State.StartedAt)
			if err != nil {
				t.Fatal(err)
			}
			fromProcess = append(fromProcess, s.at.Sub(at))
		}
		for _, d := range []struct {
			from string
			list []time.Duration
		}{{"start event", fromEvent}, {"StartedAt", fromProcess}} {
			slices.Sort(d.list)
			t.Logf("%s: %s → Apply: median %v, max %v (n=%d)", what, d.from,
				d.list[n/2], d.list[n-1], n)
		}
	}
	measure("one after the other", 15, func(int) string { return h.Run(t, testdocker.Container{}) })
	created := make([]string, atOnce)
	for i := range created {
		created[i] = h.Create(t, testdocker.Container{})
	}
	var wg sync.WaitGroup
	measure("at once", len(created), func(i int) string {
		wg.Go(func() { h.StartContainer(t, created[i]) })
		return ""
	})
	wg.Wait()
}
