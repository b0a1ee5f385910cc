//go:build root

package docker

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/internal/testdocker"
	"metad/pkg/task"
)

// TestRootSwarm: a container on an overlay network of a swarm of one node has the address by which
// its packets reach the host, that of docker_gwbridge, and that bridge is among those that the
// Engine tells of.
func TestRootSwarm(t *testing.T) {
	h := testdocker.StartSwarm(t)
	bridges := make(chan []string, 100)
	w := follow(t, h, func(c *Config) { c.Bridges = func(names []string) { bridges <- names } })
	if _, err := h.Client.NetworkCreate(context.Background(), "ov",
		network.CreateOptions{Driver: "overlay", Attachable: true}); err != nil {
		t.Fatal(err)
	}
	id := h.Run(t, testdocker.Container{Network: "ov"})
	tk, c := w.until(t, "an endpoint", id, func(tk *task.Task, c *task.Container) bool {
		return running(tk, c) && c.PID != 0
	})
	gateway := realEndpoint(t, h, id, "eth1",
		strings.Fields(h.Exec(t, id, "ip", "route", "show", "default"))[2])
	if !slices.Equal(tk.Endpoints, []task.Endpoint{gateway}) {
		t.Errorf("endpoints %v of networks %v, want %v", tk.Endpoints, c.DockerNetworks,
			gateway)
	}
	for known := false; !known; known = slices.Contains(<-bridges, gatewayNetwork) {
	}
	// What the container gives itself beside it is not believed.
	thief := h.Run(t, testdocker.Container{Network: "ov", Configure: func(_ *container.Config,
		hc *container.HostConfig) {
		hc.CapAdd = []string{"NET_ADMIN"}
	}})
	tt, _ := w.until(t, "the thief", thief, func(tk *task.Task, c *task.Container) bool {
		return running(tk, c) && c.PID != 0
	})
	h.Exec(t, thief, "ip", "addr", "add", gateway.Addr.String()+"/32", "dev", "eth1")
	if err := h.Client.ContainerPause(context.Background(), thief); err != nil {
		t.Fatal(err)
	}
	now, _ := w.until(t, "paused, and so looked at", thief,
		func(_ *task.Task, c *task.Container) bool { return c.State == "paused" })
	if !slices.Equal(now.Endpoints, tt.Endpoints) {
		t.Errorf("the thief has %v, had %v", now.Endpoints, tt.Endpoints)
	}
}

// TestRootBridgeNames: the Engine tells of a network's bridge, whatever its name, and of its end.
func TestRootBridgeNames(t *testing.T) {
	h := testdocker.Shared(t)
	bridges := make(chan []string, 100)
	follow(t, h, func(c *Config) { c.Bridges = func(names []string) { bridges <- names } })
	until := func(name string, want bool) {
		for slices.Contains(<-bridges, name) != want {
		}
	}
	until("docker0", true)
	ctx := context.Background()
	if _, err := h.Client.NetworkCreate(ctx, "shop", network.CreateOptions{Driver: "bridge",
		Options: map[string]string{
			"com.docker.network.bridge.name": "shopnet"}}); err != nil {
		t.Fatal(err)
	}
	until("shopnet", true)
	if err := h.Client.NetworkRemove(ctx, "shop"); err != nil {
		t.Fatal(err)
	}
	until("shopnet", false)
	made, err := h.Client.NetworkCreate(ctx, "unnamed", network.CreateOptions{Driver: "bridge"})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Client.NetworkRemove(ctx, made.ID)
	until("br-"+made.ID[:12], true)
}

// TestRootImageLabels: a container of an image whose labels name another's task is a task of its
// own; if the agent or Compose runs that image, it is in theirs.
func TestRootImageLabels(t *testing.T) {
	h := testdocker.Shared(t)
	w := follow(t, h, nil)
	victim := h.RunTask(t, testdocker.Task{ID: "image-labels",
		Containers: []testdocker.Container{{Name: "app"}}})
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"),
		[]byte("FROM "+testdocker.BusyboxImage+"\nLABEL com.amazonaws.ecs.task-arn="+
			victim.ARN+
			" com.amazonaws.ecs.container-name=evil com.docker.compose.project=shop "+
			"com.docker.compose.service=evil\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.CLI(t, "build", "-t", "evil:latest", dir)
	evil := h.Run(t, testdocker.Container{Image: "evil:latest"})
	tk, c := w.until(t, "the container of the image", evil, running)
	if !strings.HasPrefix(evil, tk.ID) || len(tk.Containers) != 1 ||
		c.Labels[task.LabelTaskARN] != victim.ARN {
		t.Errorf("it is in %s, of %d containers", tk.ARN, len(tk.Containers))
	}
	compose := h.Run(t, testdocker.Container{Image: "evil:latest",
		Labels: map[string]string{labelComposeProject: "blog", labelComposeService: "web",
			"com.docker.compose.oneoff": "False"}})
	if tk, c = w.until(t, "Compose's", compose, running); tk.ID != "blog" || c.Name != "web" {
		t.Errorf("Compose's is %s in %s", c.Name, tk.ARN)
	}
	other := h.RunTask(t, testdocker.Task{ID: "image-labels-2",
		Containers: []testdocker.Container{{Name: "app", Image: "evil:latest"}}})
	if tk, c = w.until(t, "the agent's", other.Containers[0],
		func(_ *task.Task, c *task.Container) bool {
			return c != nil &&
				c.Running()
		}); tk.ARN != other.ARN || c.Name != "app" {
		t.Errorf("the agent's is %s in %s", c.Name, tk.ARN)
	}
}

// TestRootShortLived: healthy containers that live for a moment are neither errors nor warnings,
// and the log says nothing of each.
func TestRootShortLived(t *testing.T) {
	h := testdocker.Shared(t)
	core, logs := observer.New(zap.InfoLevel)
	w := follow(t, h, func(c *Config) { c.Log = zap.New(core) })
	const n = 50
	next := make(chan bool)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for range next {
				id := h.Create(t, testdocker.Container{Cmd: []string{"true"}})
				if err := h.Client.ContainerStart(context.Background(), id,
					container.StartOptions{}); err != nil {
					t.Error(err)
				}
				_ = h.Client.ContainerRemove(context.Background(), id,
					container.RemoveOptions{Force: true})
			}
		})
	}
	for range n {
		next <- true
	}
	close(next)
	wg.Wait()
	marker := h.Run(t, testdocker.Container{})
	w.until(t, "one that stays", marker, running)
	if s := w.Status(); s.Errors != 0 || logs.Len() > 1 {
		t.Errorf("%d errors; %d lines in the log, want one at the start: %v", s.Errors,
			logs.Len(), logs.All())
	}
}

// TestRootRestored: what is known of a real container before a restart of the follower is what is
// known after it, and one that ended in between is not.
func TestRootRestored(t *testing.T) {
	h := testdocker.Shared(t)
	stays, ends := h.Run(t, testdocker.Container{}), h.Run(t, testdocker.Container{})
	first := follow(t, h, nil)
	kept, _ := first.until(t, "running", stays, running)
	first.until(t, "running", ends, running)
	before := first.now()
	h.Remove(t, ends)
	sets := make(chan []*task.Task, 100)
	cfg := Config{Engine: h.Client, HostNetns: h.NSPath(), BundleDirs: []string{h.BundleDir()},
		Log: zap.NewNop(), Apply: func(tasks []*task.Task) { sets <- tasks }}
	second, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	second.Restore(before)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- second.Run(ctx) }()
	set := <-sets
	if tk, _ := find(set, stays); tk != kept {
		t.Errorf("it was %+v, and is %+v", kept, tk)
	}
	if tk, _ := find(set, ends); tk != nil {
		t.Errorf("one that is gone is in the set: %+v", tk)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
