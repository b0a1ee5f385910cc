//go:build root

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"metad/internal/testdocker"
	"metad/pkg/admin"
)

// Each container of a task is told itself, whatever they share: by the kernel's word on the cgroup
// that the socket was made in. So are the containers of an awsvpc task, a guest of another
// container's network and one of the host's, commands that are executed in one, and a container
// after a restart.
func TestRootSelf(t *testing.T) {
	h := testdocker.Shared(t)
	vpc := h.RunTask(t, testdocker.Task{ID: "before",
		ENI:        []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24")},
		Containers: []testdocker.Container{{Name: "app"}, {Name: "log"}, {Name: "proxy"}}})
	d := startMetad(t, h)
	after := h.RunTask(t, testdocker.Task{ID: "after",
		ENI:        []netip.Prefix{netip.MustParsePrefix("10.0.0.8/24")},
		Containers: []testdocker.Container{{Name: "app"}, {Name: "log"}, {Name: "proxy"}}})
	plain := h.Run(t, testdocker.Container{})
	guest := h.Run(t, testdocker.Container{Network: "container:" + plain})
	host, hostToo := h.Run(t, testdocker.Container{Network: "host"}),
		h.Run(t, testdocker.Container{Network: "host"})

	all := append(append([]string{plain, guest, host, hostToo}, vpc.Containers...),
		after.Containers...)
	check := func() {
		t.Helper()
		for _, id := range all {
			for _, path := range []string{"/v4", "/v4/self", "/v3/self",
				"/v2/metadata/self"} {
				if got := containerOf(t, ask(t, h, id, path)); got != id {
					t.Errorf("%.12s asks %s: got %.12s, want itself", id, path,
						got)
				}
			}
			stats := ""
			waitFor(t, "the first sample", func() bool {
				stats = strings.TrimSpace(ask(t, h, id, "/v4/self/stats"))
				return stats != "{}"
			})
			if !strings.Contains(stats, id) {
				t.Errorf("%.12s: got statistics %.200s", id, stats)
			}
		}
	}
	check()
	for _, id := range []string{host, hostToo} {
		if got := taskOf(t, ask(t, h, id, "/v2/metadata")); len(got.Containers) != 1 ||
			got.Containers[0].DockerId != id {
			t.Errorf("host-network container: got %+v, want a task of its own", got)
		}
	}
	d.stop()
	d.start()
	d.waitReady()
	check()

	// then the test fails, and dockerd's log is printed
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := h.Client.ContainerRestart(ctx, vpc.Containers[1],
		container.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	check()
}

// A container that asks who it is by its first instruction is told itself, where all of a task's
// containers share a network and metad knows its cgroup at best a moment before. It is never told
// another one; that nobody knows is counted.
func TestRootSelfFirstInstruction(t *testing.T) {
	const atOnce = 4
	starts := 40
	if n, err := strconv.Atoi(os.Getenv("METAD_SELF_STARTS")); err == nil {
		starts = n
	}
	h := testdocker.Shared(t)
	startMetad(t, h)
	task := h.RunTask(t,
		testdocker.Task{ID: "busy", Containers: []testdocker.Container{{Name: "app"}}})
	labels := map[string]string{
		"com.amazonaws.ecs.task-arn": task.ARN, "com.amazonaws.ecs.container-name": "first"}
	var right, unnamed atomic.Int64
	var wg sync.WaitGroup
	for worker := range atOnce {
		wg.Go(func() {
			for i := worker; i < starts; i += atOnce {
				id := h.Run(t, testdocker.Container{
					Name:    fmt.Sprintf("first-%d", i),
					Network: "container:" + task.Pause, Labels: labels,
					Cmd: []string{"wget", "-qO-",
						"http://169.254.170.2/v4/self"}})
				got := h.Output(t, id)
				switch {
				case strings.HasSuffix(got, "404 Not Found\n"):
					unnamed.Add(1)
				case strings.Contains(got, `"DockerId":"`+id+`"`):
					right.Add(1)
				default:
					t.Errorf("%.12s: got %.200s", id, got)
				}
				h.Remove(t, id)
			}
		})
	}
	wg.Wait()
	t.Logf("%d right, %d not named, of %d", right.Load(), unnamed.Load(), starts)
	// A machine on which a start takes seconds names fewer.
	if n := int(right.Load()); n < starts*9/10 {
		t.Errorf("got %d of %d right", n, starts)
	}
}

// A container with NET_RAW, NET_ADMIN and SYS_PTRACE of its own is told itself, whatever mark it
// puts on its packets. It cannot get into the other container's cgroup nor at its processes.
func TestRootSelfPoser(t *testing.T) {
	h := testdocker.Shared(t)
	importProbe(t, h)
	d := startMetad(t, h)
	withCaps := func(config *container.Config, host *container.HostConfig) {
		config.Entrypoint = []string{"sleep", "3600"}
		host.CapAdd = []string{"NET_RAW", "NET_ADMIN", "SYS_PTRACE"}
	}
	task := h.RunTask(t, testdocker.Task{ID: "posed", Containers: []testdocker.Container{
		{Name: "app"}, {Name: "poser", Image: probeImage, Configure: withCaps}}})
	app, poser := task.Containers[0], task.Containers[1]
	tag := 0
	waitFor(t, "every container to have a number", func() bool {
		known, err := fetchTasks(t.Context(), d.runDir(), false)
		if err != nil {
			return false
		}
		for _, tk := range known.Tasks {
			numbered := !slices.ContainsFunc(tk.Containers,
				func(c admin.Container) bool { return c.Number == 0 })
			if tk.ID == "posed" && len(tk.Containers) == 3 && numbered {
				tag = int(tk.Tag)
			}
		}
		return tag != 0
	})
	pid := h.Inspect(t, app).State.Pid
	told := map[string]int{}
	for line := range strings.Lines(h.Exec(t, poser, "/app", "pose", strconv.Itoa(tag),
		strconv.Itoa(pid))) {
		if code, body, _ := strings.Cut(line, " "); code == "200" {
			line = containerOf(t, body)
		}
		told[line]++
	}
	if len(told) != 1 || told[poser] < 128 {
		t.Errorf("tag %d: got %.2000v, want %.12s alone", tag, told, poser)
	}
	if got := containerOf(t, ask(t, h, app, "/v4/self")); got != app {
		t.Errorf("the other one is told %.12s", got)
	}
}
