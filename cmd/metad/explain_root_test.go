//go:build root

package main

import (
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/vishvananda/netlink"

	"metad/internal/testdocker"
)

// Five faults, each found by what `metad explain` prints of it: a line with the fault, and its exit
// code.
func TestRootExplain(t *testing.T) {
	h := testdocker.Start(t) // its Engine is stopped: not the shared one
	d := startMetad(t, h)
	const copied = "ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/0123456789abcdef0123456789abcdef"
	well := h.Run(t, testdocker.Container{Name: "well", Env: []string{"ZQ7=zq7-environment"},
		Labels: map[string]string{"secret": "zq7-label",
			"com.amazonaws.ecs.task-definition-family": "zq7-family"}})
	h.Run(t, testdocker.Container{Name: "first", Env: []string{copied}})
	h.Run(t, testdocker.Container{Name: "second", Env: []string{copied}})
	moved := h.Run(t, testdocker.Container{Name: "moved"})
	thief := h.Run(t, testdocker.Container{Name: "thief",
		Configure: func(_ *container.Config, hc *container.HostConfig) {
			hc.CapAdd = []string{"NET_ADMIN"}
		}})
	f := func(what string, code int, want ...string) {
		t.Helper()
		var out string
		waitFor(t, "metad explain "+what+": "+strings.Join(want, ", "), func() bool {
			var got int
			out, got = d.run("explain", what, "--run-dir", d.runDir())
			for _, w := range want {
				if !strings.Contains(out, w) {
					return false
				}
			}
			return got == code
		})
		t.Logf("metad explain %s\n%s", what, out)
	}
	address := h.Inspect(t, well).NetworkSettings.Networks["bridge"].IPAddress
	f("well", 0, "ok    port", "ok    map", "ok    dropped", "ok    statistics")
	f(address, 0, "well", "ok    answer")
	f("nobody", 2, `fail  container`, `metad knows no container "nobody"`)

	f("second", 2, "fail  endpoint id", "is copied: first has it too", "create one of them anew")

	moveTo(t, h, moved, "lab0")
	f("moved", 2, "fail  port", `of bridge "lab0", which metad does not watch`, `add "lab0" to --bridges`)

	gateway := h.Inspect(t, well).NetworkSettings.Networks["bridge"].Gateway
	h.Exec(t, thief, "sh", "-c",
		"ip addr add "+address+"/32 dev eth0 && ip route add 169.254.170.2/32 via "+gateway+
			" dev eth0 src "+address)
	// nobody answers
	_, _, _ = h.TryExec(thief, "timeout", "2", "wget", "-qO-", "http://169.254.170.2/v4")
	f("thief", 1, "warn  dropped", "from "+address, "a container sent from an address that is another's")
	f(address, 1, "warn  dropped", "of task "+thief[:32])
	if out, code := d.run("events", "--run-dir", d.runDir()); code != 0 ||
		!strings.Contains(out, "port_wrong_port from "+address) {
		t.Errorf("events: got %d %s", code, out)
	}
	if out, code := d.run("verdicts", "--run-dir", d.runDir()); code != 0 ||
		!strings.Contains(out, "port_wrong_port") {
		t.Errorf("verdicts: got %d %s", code, out)
	}
	if out, code := d.run("map", "--run-dir", d.runDir()); code != 0 ||
		!strings.Contains(out, address) {
		t.Errorf("map: got %d %s", code, out)
	}

	// A report of all that has nothing of labels and environments.
	archive := filepath.Join(t.TempDir(), "report.tar.gz")
	out, code := d.run("bugreport", "--file", archive, "--run-dir", d.runDir())
	if code != 0 {
		t.Fatalf("bugreport: got %d %s", code, out)
	}
	parts := archived(t, archive)
	for part, want := range map[string]string{"doctor.txt": "ok    metad",
		"verdicts.txt": "port_wrong_port", "metrics.txt": "metad_tasks", "ready.txt": "ok"} {
		if !strings.Contains(parts[part], want) {
			t.Errorf("bugreport: want %q in %s: %s", want, part, parts[part])
		}
	}
	for part, text := range parts {
		if strings.Contains(text, "zq7") {
			t.Errorf("bugreport: %s tells a secret: %s", part, text)
		}
	}

	startAgent(t, h, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	f("first", 2, "warn  agent", "it takes connections and does not answer")

	h.StopDocker(t)
	f("well", 1, "warn  docker", "the Engine is away")
	f("newcomer", 2, "warn  docker", "it is known when the Docker Engine answers again")
}

// moveTo makes the host's end of a container's eth0 a port of a new bridge that is not the
// Engine's.
func moveTo(t *testing.T, h *testdocker.Host, id, bridge string) {
	t.Helper()
	ifindex, err := strconv.Atoi(strings.TrimSpace(h.Exec(t, id, "cat",
		"/sys/class/net/eth0/iflink")))
	if err == nil {
		err = h.Do(func() error {
			b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
			if err := netlink.LinkAdd(b); err != nil {
				return err
			}
			port, err := netlink.LinkByIndex(ifindex)
			if err != nil {
				return err
			}
			return netlink.LinkSetMaster(port, b)
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}
