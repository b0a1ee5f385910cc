//go:build root

package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/container"

	"metad/internal/expect"
	"metad/internal/testdocker"
)

// A container with NET_ADMIN that gives itself a neighbour's awsvpc address, or the one that the
// next task will get, is counted and named in the log. The neighbour is answered as before, and so
// is the next task's first request.
func TestRootAwsvpcThief(t *testing.T) {
	h := testdocker.Shared(t)
	d := startMetad(t, h, "--reconcile", "500ms")
	victim := h.RunTask(t, testdocker.Task{ID: "victim",
		Containers: []testdocker.Container{{Name: "app"}}})
	thief := h.RunTask(t, testdocker.Task{ID: "thief",
		Containers: []testdocker.Container{{Name: "app",
			Configure: func(_ *container.Config, hc *container.HostConfig) {
				hc.CapAdd = []string{"NET_ADMIN"}
			}}}})
	before := ask(t, h, victim.Containers[0], "/v2/metadata")
	next := thief.Port.Addr.Next()
	for _, addr := range []netip.Addr{victim.Port.Addr, next} {
		h.Exec(t, thief.Containers[0], "ip", "addr", "add", addr.String()+"/32", "dev",
			"ecs-eth0")
	}
	expect.Until(t, "both are counted", func() bool {
		_, metrics, err := d.get("127.0.0.1:51683", "/metrics")
		return err == nil &&
			strings.Contains(metrics, "\nmetad_addresses_not_believed_total 2\n")
	})
	if got := ask(t, h, victim.Containers[0], "/v2/metadata"); got != before {
		t.Errorf("the victim was answered\n%s\nnow\n%s", before, got)
	}
	later := h.RunTask(t, testdocker.Task{ID: "later",
		Containers: []testdocker.Container{{Name: "app"}}})
	if later.Port.Addr != next {
		t.Fatalf("the next task has %s, want %s", later.Port.Addr, next)
	}
	if got := ask(t, h, later.Containers[0], "/v2/metadata"); !strings.Contains(got,
		"task/default/later") {
		t.Errorf("the first request of the task that got the address was answered\n%s", got)
	}
	if got := ask(t, h, thief.Containers[0], "/v2/metadata"); !strings.Contains(got,
		"task/default/thief") {
		t.Errorf("the thief was answered\n%s", got)
	}
	if out := d.out.String(); !strings.Contains(out, "address not believed") ||
		!strings.Contains(out, "task/default/thief") {
		t.Errorf("the log does not name the thief:\n%s", out)
	}
}
