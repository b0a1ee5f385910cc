//go:build root

package main

import (
	"strings"
	"testing"

	"github.com/docker/docker/api/types/container"

	"metad/internal/expect"
	"metad/internal/testdocker"
)

// A container with NET_ADMIN that gives itself a neighbour's awsvpc address is counted and named in the log; the
// neighbour is answered as before.
func TestRootAwsvpcThief(t *testing.T) {
	h := testdocker.Shared(t)
	d := startMetad(t, h, "--reconcile", "500ms")
	victim := h.RunTask(t, testdocker.Task{ID: "victim", Containers: []testdocker.Container{{Name: "app"}}})
	thief := h.RunTask(t, testdocker.Task{ID: "thief", Containers: []testdocker.Container{{Name: "app",
		Configure: func(_ *container.Config, hc *container.HostConfig) { hc.CapAdd = []string{"NET_ADMIN"} }}}})
	before := ask(t, h, victim.Containers[0], "/v2/metadata")
	h.Exec(t, thief.Containers[0], "ip", "addr", "add", victim.Port.Addr.String()+"/32", "dev", "ecs-eth0")
	expect.Until(t, "the claim is counted", func() bool {
		_, metrics, err := d.get("127.0.0.1:51683", "/metrics")
		return err == nil && strings.Contains(metrics, "\nmetad_address_conflicts_total 1\n")
	})
	if got := ask(t, h, victim.Containers[0], "/v2/metadata"); got != before {
		t.Errorf("the victim was answered\n%s\nnow\n%s", before, got)
	}
	if out := d.out.String(); !strings.Contains(out, "address claimed twice") || !strings.Contains(out, "task/default/thief") {
		t.Errorf("the log does not name the thief:\n%s", out)
	}
}
