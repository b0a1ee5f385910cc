//go:build root

package main

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/docker/docker/api/types/container"

	"metad/internal/testdocker"
)

// Each container of a task is told itself, whatever they share: by the kernel's word on the cgroup
// that the socket was made in. So are the containers of an awsvpc task, a guest of another
// container's network and one of the host's, commands that are executed in one, and a container
// after a restart.
func TestRootSelf(t *testing.T) {
	h := testdocker.Shared(t)
	vpc := h.RunTask(t, testdocker.Task{ID: "before", ENI: []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24")},
		Containers: []testdocker.Container{{Name: "app"}, {Name: "log"}, {Name: "proxy"}}})
	d := startMetad(t, h)
	after := h.RunTask(t, testdocker.Task{ID: "after", ENI: []netip.Prefix{netip.MustParsePrefix("10.0.0.8/24")},
		Containers: []testdocker.Container{{Name: "app"}, {Name: "log"}, {Name: "proxy"}}})
	plain := h.Run(t, testdocker.Container{})
	guest := h.Run(t, testdocker.Container{Network: "container:" + plain})
	host, hostToo := h.Run(t, testdocker.Container{Network: "host"}), h.Run(t, testdocker.Container{Network: "host"})

	all := append(append([]string{plain, guest, host, hostToo}, vpc.Containers...), after.Containers...)
	check := func() {
		t.Helper()
		for _, id := range all {
			for _, path := range []string{"/v4", "/v4/self", "/v3/self", "/v2/metadata/self"} {
				if got := containerOf(t, ask(t, h, id, path)); got != id {
					t.Errorf("%.12s asks %s: got %.12s, want itself", id, path, got)
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
		if got := taskOf(t, ask(t, h, id, "/v2/metadata")); len(got.Containers) != 1 || got.Containers[0].DockerId != id {
			t.Errorf("host-network container: got %+v, want a task of its own", got)
		}
	}
	d.stop()
	d.start()
	d.waitReady()
	check()

	if err := h.Client.ContainerRestart(t.Context(), vpc.Containers[1], container.StopOptions{}); err != nil {
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
	task := h.RunTask(t, testdocker.Task{ID: "busy", ENI: []netip.Prefix{netip.MustParsePrefix("10.0.0.9/24")},
		Containers: []testdocker.Container{{Name: "app"}}})
	var right, unnamed atomic.Int64
	var wg sync.WaitGroup
	for worker := range atOnce {
		wg.Go(func() {
			for i := worker; i < starts; i += atOnce {
				id := h.Run(t, testdocker.Container{
					Name: fmt.Sprintf("first-%d", i), Network: "container:" + task.Pause,
					Labels: map[string]string{"com.amazonaws.ecs.task-arn": task.ARN, "com.amazonaws.ecs.container-name": "first"},
					Cmd:    []string{"wget", "-qO-", "http://169.254.170.2/v4/self"}})
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
	if n := int(right.Load()); n < starts*9/10 { // a machine on which a start takes seconds names fewer
		t.Errorf("got %d of %d right", n, starts)
	}
}
