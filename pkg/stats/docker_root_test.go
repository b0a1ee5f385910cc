//go:build root

package stats

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"metad/internal/testdocker"
	"metad/pkg/task"

	"github.com/docker/docker/api/types/blkiodev"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"golang.org/x/sys/unix"
)

// follow describes containers of h as the follower of the Engine would.
func follow(t testing.TB, h *testdocker.Host, ids ...string) *task.Task {
	t.Helper()
	tk := &task.Task{ID: "test"}
	for _, id := range ids {
		in := h.Inspect(t, id)
		started, _ := time.Parse(time.RFC3339Nano, in.State.StartedAt)
		c := &task.Container{
			ID: in.ID, DockerName: strings.TrimPrefix(in.Name, "/"), PID: in.State.Pid, StartedAt: started,
			NetworkMode: string(in.HostConfig.NetworkMode), Type: task.TypeNormal, Stats: new(task.StatsCell),
		}
		if in.Config.Labels[task.LabelContainerName] == task.PauseName {
			c.Type = task.TypeCNIPause
		}
		tk.Containers = append(tk.Containers, c)
	}
	return tk
}

// engine asks h's Engine.
func engine(h *testdocker.Host) Engine {
	return func(ctx context.Context, id string, stream bool) (io.ReadCloser, error) {
		ask := h.Client.ContainerStatsOneShot
		if stream {
			ask = func(ctx context.Context, id string) (container.StatsResponseReader, error) {
				return h.Client.ContainerStats(ctx, id, true)
			}
		}
		r, err := ask(ctx, id)
		return r.Body, err
	}
}

// flatten returns a JSON document's leaves by path. An empty object, list or null is a leaf.
func flatten(t testing.TB, doc []byte) map[string]string {
	t.Helper()
	var v any
	dec := json.NewDecoder(strings.NewReader(string(doc)))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, doc)
	}
	leaves := map[string]string{}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, x := range v {
				walk(path+"."+k, x)
			}
			if len(v) > 0 {
				return
			}
		case []any:
			for i, x := range v {
				walk(path+"."+strconv.Itoa(i), x)
			}
			if len(v) > 0 {
				return
			}
		}
		leaves[path] = fmt.Sprint(v)
	}
	walk("", v)
	return leaves
}

// exact lists the fields that must be equal to the byte. All other numbers must lie between our
// readings directly before and after the Engine's, or be within 2 % of the nearer.
func exact(path string) bool {
	switch path {
	case ".id", ".name", ".num_procs", ".pids_stats.limit", ".memory_stats.limit", ".cpu_stats.online_cpus",
		".memory_stats.stats.hierarchical_memory_limit", ".memory_stats.stats.hierarchical_memsw_limit":
		return true
	}
	return strings.HasSuffix(path, ".major") || strings.HasSuffix(path, ".minor") || strings.HasSuffix(path, ".op")
}

// blockDevice returns the device that the file system holding path is on.
func blockDevice(t testing.TB, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		t.Fatalf("Docker's data is on no block device: %v", err)
	}
	return "/dev/" + filepath.Base(link)
}

// compare checks every field of the Engine's document against ours from before and after it.
func compare(t testing.TB, name string, before, engine, after []byte) (moving int) {
	t.Helper()
	b, e, a := flatten(t, before), flatten(t, engine), flatten(t, after)
	for _, m := range []map[string]string{b, e, a} {
		maps.DeleteFunc(m, func(path, _ string) bool {
			return path == ".read" || path == ".preread" || strings.HasPrefix(path, ".precpu_stats")
		})
	}
	for path := range e {
		if _, ok := a[path]; !ok {
			t.Errorf("%s: %s: missing", name, path)
		}
	}
	for path := range a {
		if _, ok := e[path]; !ok {
			t.Errorf("%s: %s: the Engine has no such field", name, path)
		}
	}
	for path, want := range e {
		if exact(path) {
			if b[path] != want {
				t.Errorf("%s: %s: got %s, want exactly %s", name, path, b[path], want)
			}
			continue
		}
		w, err := strconv.ParseFloat(want, 64)
		if err != nil { // [], null, {}
			if b[path] != want {
				t.Errorf("%s: %s: got %s, want %s", name, path, b[path], want)
			}
			continue
		}
		lo, _ := strconv.ParseFloat(b[path], 64)
		hi, _ := strconv.ParseFloat(a[path], 64)
		if lo != hi {
			moving++
		}
		near := math.Min(math.Abs(lo-w), math.Abs(hi-w))
		if (w < math.Min(lo, hi) || w > math.Max(lo, hi)) && near > 0.02*w {
			t.Errorf("%s: %s: got %s and %s, want %s in between", name, path, b[path], a[path], want)
		}
	}
	return moving
}

// TestRootCgroupMatchesEngine compares each field of the cgroup source with the Engine's answer
// for containers that use CPU, memory, disk and network, with limits and without.
func TestRootCgroupMatchesEngine(t *testing.T) {
	h := testdocker.Start(t)
	h.CreateBridge(t, "other", netip.MustParsePrefix("172.30.1.0/24"))
	peer := h.Run(t, testdocker.Container{Name: "peer", Cmd: []string{"sh", "-c", "while :; do nc -l -p 9 >/dev/null; done"}})
	peerIP := h.Inspect(t, peer).NetworkSettings.Networks["bridge"].IPAddress
	disk := blockDevice(t, filepath.Join(h.Dir, "data"))
	limited := func(_ *container.Config, host *container.HostConfig) {
		pids := int64(64)
		host.Resources = container.Resources{Memory: 96 << 20, MemorySwap: 96 << 20, NanoCPUs: 3e8, PidsLimit: &pids,
			// Newer kernels count a device's bytes only once it has a limit.
			BlkioDeviceWriteBps: []*blkiodev.ThrottleDevice{{Path: disk, Rate: 1 << 30}}}
	}
	busy := h.Run(t, testdocker.Container{Name: "busy", Configure: limited, Cmd: []string{"sh", "-c",
		`while :; do :; done &
		while :; do dd if=/dev/zero of=/tmp/f bs=64k count=64 oflag=direct 2>/dev/null; sleep 0.2; done &
		while :; do dd if=/dev/zero bs=1k count=100 2>/dev/null | nc -w 1 ` + peerIP + ` 9; sleep 0.1; done`}})
	if err := h.Client.NetworkConnect(t.Context(), "other", busy, &network.EndpointSettings{}); err != nil {
		t.Fatal(err)
	}
	// Docker does not show what a container makes for itself.
	tunnel := h.Run(t, testdocker.Container{Name: "tunnel", Cmd: []string{"sh", "-c", "ip link add br9 type bridge; exec sleep 1000"},
		Configure: func(_ *container.Config, host *container.HostConfig) { host.CapAdd = []string{"NET_ADMIN"} }})
	ids := []string{
		busy, peer, tunnel,
		h.Run(t, testdocker.Container{Name: "none", Network: "none"}),
		h.Run(t, testdocker.Container{Name: "host", Network: "host"}),
		h.Run(t, testdocker.Container{Name: "joined", Network: "container:" + busy}),
		h.Run(t, testdocker.Container{Name: "parent", Configure: func(_ *container.Config, host *container.HostConfig) {
			host.CgroupParent = "/" + "metad-test-" + strconv.FormatInt(time.Now().UnixNano(), 36) + "/ecs"
		}}),
	}
	src, err := NewCgroupSource(CgroupConfig{})
	if err != nil {
		t.Fatal(err)
	}
	tk := follow(t, h, ids...)
	time.Sleep(3 * time.Second) // let there be something to count
	ask := engine(h)
	for i, c := range tk.Containers {
		// Each is a task of its own: two with one cgroup parent would not make it an awsvpc task.
		feed, err := src.Open(&task.Task{Containers: tk.Containers[i : i+1]}, c, nil)
		if err != nil {
			t.Fatal(c.DockerName, err)
		}
		defer feed.Close()
		render := func() []byte {
			s, err := feed.Sample(false)
			if err != nil {
				t.Fatal(c.DockerName, err)
			}
			doc, _, _ := appendSample(nil, c.ID, "/"+c.DockerName, s, previous{})
			return doc
		}
		before := render()
		body, err := ask(t.Context(), c.ID, false)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := io.ReadAll(body)
		body.Close()
		if err != nil {
			t.Fatal(err)
		}
		after := render()
		moving := compare(t, c.DockerName, before, doc, after)
		t.Logf("%s: %d fields, %d moved during the comparison", c.DockerName, len(flatten(t, doc)), moving)
		if c.DockerName == "busy" {
			leaves := flatten(t, before)
			for _, path := range []string{".networks.eth0.tx_bytes", ".networks.eth1.rx_bytes", ".cpu_stats.throttling_data.throttled_time",
				".cpu_stats.cpu_usage.total_usage", ".memory_stats.usage", ".blkio_stats.io_service_bytes_recursive.1.value"} {
				if v := leaves[path]; v == "" || v == "0" {
					t.Errorf("busy: %s: got %q, want a busy container's", path, v)
				}
			}
		}
	}
}
