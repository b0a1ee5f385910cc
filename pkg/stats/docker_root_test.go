//go:build root

package stats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/blkiodev"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"

	"metad/internal/expect"
	"metad/internal/testdocker"
	"metad/pkg/task"
)

// follow describes containers of h as the follower of the Engine would.
func follow(t testing.TB, h *testdocker.Host, ids ...string) *task.Task {
	t.Helper()
	tk := &task.Task{ID: "test"}
	for _, id := range ids {
		in := h.Inspect(t, id)
		started, _ := time.Parse(time.RFC3339Nano, in.State.StartedAt)
		c := &task.Container{
			ID: in.ID, DockerName: strings.TrimPrefix(in.Name, "/"), PID: in.State.Pid,
			StartedAt:   started,
			NetworkMode: string(in.HostConfig.NetworkMode), Type: task.TypeNormal,
			Stats: new(task.StatsCell),
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
			ask = func(ctx context.Context, id string) (container.StatsResponseReader,
				error) {
				return h.Client.ContainerStats(ctx, id, true)
			}
		}
		r, err := ask(ctx, id)
		return r.Body, err
	}
}

// TestRootCgroupMatchesEngine compares each field of the cgroup source with the Engine's answer
// for containers that use CPU, memory, disk and network, with limits and without.
func TestRootCgroupMatchesEngine(t *testing.T) {
	h := testdocker.Start(t)
	h.CreateBridge(t, "other", netip.MustParsePrefix("172.30.1.0/24"))
	peer := h.Run(t, testdocker.Container{Name: "peer",
		Cmd: []string{"sh", "-c", "while :; do nc -l -p 9 >/dev/null; done"}})
	peerIP := h.Inspect(t, peer).NetworkSettings.Networks["bridge"].IPAddress
	disk := testdocker.BlockDevice(t, filepath.Join(h.Dir, "data"))
	limited := func(_ *container.Config, host *container.HostConfig) {
		pids := int64(64)
		host.Resources = container.Resources{Memory: 96 << 20, MemorySwap: 96 << 20,
			NanoCPUs: 1e8, PidsLimit: &pids,
			// Newer kernels count a device's bytes only once it has a limit.
			BlkioDeviceWriteBps: []*blkiodev.ThrottleDevice{{Path: disk,
				Rate: 1 << 30}}}
	}
	busy := h.Run(t, testdocker.Container{Name: "busy", Configure: limited,
		Cmd: []string{"sh", "-c",
			`awk 'BEGIN { s = sprintf("%20000000s", "x"); system("sleep 1000000"); print s }' &
		while :; do :; done &
		while :; do dd if=/dev/zero of=/tmp/f bs=64k count=64 oflag=direct 2>/dev/null; sleep 0.2; done &
		while :; do dd if=/dev/zero bs=1k count=100 2>/dev/null | nc -w 1 ` + peerIP +
				` 9; sleep 0.1; done`}})
	if err := h.Client.NetworkConnect(t.Context(), "other", busy,
		&network.EndpointSettings{}); err != nil {
		t.Fatal(err)
	}
	// Docker does not show what a container makes for itself.
	tunnel := h.Run(t, testdocker.Container{Name: "tunnel",
		Cmd: []string{"sh", "-c", "ip link add br9 type bridge; exec sleep 1000"},
		Configure: func(_ *container.Config, host *container.HostConfig) {
			host.CapAdd = []string{"NET_ADMIN"}
		}})
	ids := []string{
		busy, peer, tunnel,
		h.Run(t, testdocker.Container{Name: "none", Network: "none"}),
		h.Run(t, testdocker.Container{Name: "host", Network: "host"}),
		h.Run(t, testdocker.Container{Name: "joined", Network: "container:" + busy}),
		h.Run(t, testdocker.Container{Name: "parent", Configure: func(_ *container.Config,
			host *container.HostConfig) {
			host.CgroupParent = "/" + "metad-test-" +
				strconv.FormatInt(time.Now().UnixNano(), 36) + "/ecs"
		}}),
	}
	src := newCgroupSource(t)
	tk := follow(t, h, ids...)
	waitUntilCounted(t, src, tk, "busy")
	for i, c := range tk.Containers {
		// Each is a task of its own: nothing but an awsvpc task is more.
		feed, err := src.Open(&task.Task{Containers: tk.Containers[i : i+1]}, c, nil)
		if err != nil {
			t.Fatal(c.DockerName, err)
		}
		defer feed.Close()
		// What lives for a moment only, a process with its memory, may be in the Engine's
		// answer and in neither of ours. It does not stay away from five answers.
		var wrong []string
		var ar *txtar.Archive
		for range 5 {
			ar = new(txtar.Archive)
			record(t, ar, "before", c)
			before := render(t, feed, c)
			answer := ask(t, h, c.ID)
			after := render(t, feed, c)
			record(t, ar, "after", c)
			add(t, ar, "engine.json", answer)
			add(t, ar, "container.json", c)
			if wrong = compare(t, before, answer, after); len(wrong) == 0 {
				t.Logf("%s: all %d fields equal", c.DockerName,
					len(flatten(t, answer)))
				break
			}
		}
		for _, w := range wrong {
			t.Errorf("%s: %s", c.DockerName, w)
		}
		if dir := os.Getenv("RECORD"); dir != "" {
			if err := errors.Join(os.MkdirAll(dir, 0o755),
				os.WriteFile(filepath.Join(dir, c.DockerName+".txtar"),
					txtar.Format(ar), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// waitUntilCounted returns when the container has used some of everything. On a busy machine that
// takes a while: it is throttled only if it gets more CPU than it may have.
func waitUntilCounted(t *testing.T, src Source, tk *task.Task, name string) {
	t.Helper()
	i := slices.IndexFunc(tk.Containers, func(c *task.Container) bool {
		return c.DockerName == name
	})
	c := tk.Containers[i]
	feed, err := src.Open(&task.Task{Containers: tk.Containers[i : i+1]}, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	for _, path := range []string{".networks.eth0.tx_bytes", ".networks.eth1.rx_bytes",
		".cpu_stats.throttling_data.throttled_time",
		".cpu_stats.cpu_usage.total_usage", ".memory_stats.usage", ".blkio_stats.io_service_bytes_recursive.1.value"} {
		expect.Until(t, name+": "+path+" to be counted", func() bool {
			v := flatten(t, render(t, feed, c))[path]
			return v != "" && v != "0"
		})
	}
}

// sampling runs a sampler on a real host until the test ends.
func sampling(t testing.TB, src Source) *Sampler {
	t.Helper()
	s := New(Config{}, src)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return s
}

// next returns a container's next sample.
func next(t testing.TB, sub *Subscription) document {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	sample, err := sub.Next(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, sample)
}

func newCgroupSource(t testing.TB) *CgroupSource {
	t.Helper()
	src, err := NewCgroupSource(CgroupConfig{})
	if err != nil {
		t.Fatal(err)
	}
	src.net.start = func(f func()) { f() } // a reading finds the interfaces listed
	return src
}

// A container's life: started, sampled, killed while it is sampled, started again. S05, S07, S18.
func TestRootContainerLife(t *testing.T) {
	h := testdocker.Start(t)
	id := h.Run(t, testdocker.Container{Cmd: []string{"sh", "-c", "while :; do :; done"}})
	s := sampling(t, newCgroupSource(t))
	tk := follow(t, h, id)
	c := tk.Containers[0]
	s.Apply([]*task.Task{tk})
	sub := s.Subscribe(id)
	first := next(t, sub)
	if first.PreCPU.Usage.Total == 0 || !first.PreRead.Before(first.Read) {
		t.Errorf("first sample: got %+v, want one with a past", first)
	}
	last := first
	for range 3 {
		d := next(t, sub)
		if d.CPU.Usage.Total <= last.CPU.Usage.Total ||
			d.PreCPU.Usage.Total != last.CPU.Usage.Total ||
			!d.PreRead.Equal(last.Read) {
			t.Errorf("got %+v after %+v", d, last)
		}
		last = d
	}

	// metad starts anew: the counters go on from where they were.
	other := sampling(t, newCgroupSource(t))
	again := follow(t, h, id)
	other.Apply([]*task.Task{again})
	otherSub := other.Subscribe(id)
	if d := next(t, otherSub); d.CPU.Usage.Total < last.CPU.Usage.Total {
		t.Errorf("after a restart of metad: got %d, want at least %d", d.CPU.Usage.Total,
			last.CPU.Usage.Total)
	}
	otherSub.Close()

	// Killed, and nobody has told the sampler: no numbers, and no damage either.
	if err := h.Client.ContainerKill(t.Context(), id, "KILL"); err != nil {
		t.Fatal(err)
	}
	expect.Until(t, "the killed container to have no sample", func() bool {
		return c.Stats.Load() == nil
	})
	if n := s.Metrics().Damaged.Load(); n != 0 {
		t.Errorf("got %d damaged samples of a container that ended", n)
	}
	s.Apply(nil)
	if _, err := sub.Next(t.Context()); !errors.Is(err, io.EOF) {
		t.Errorf("subscription of a stopped container: got %v, want EOF", err)
	}

	h.StartContainer(t, id)
	tk = follow(t, h, id)
	s.Apply([]*task.Task{tk})
	sub = s.Subscribe(id)
	defer sub.Close()
	if d := next(t, sub); d.CPU.Usage.Total >= last.CPU.Usage.Total &&
		d.PreRead.Before(last.Read) {
		t.Errorf("restarted: got %+v, want counters that began anew", d)
	}
}

// S15, S16: an awsvpc task's containers, pause included, have the same networks: the task's eth0.
func TestRootNetworksOfAnAWSVPCTask(t *testing.T) {
	h := testdocker.Start(t)
	r := h.RunTask(t, testdocker.Task{
		ENI:        []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24")},
		Containers: []testdocker.Container{{Name: "a"}, {Name: "b"}},
	})
	// Something has to go through ecs-eth0, to see that it is not shown.
	_, _, _ = h.TryExec(r.Containers[0], "ping", "-c", "1", "-W", "1", "169.254.172.1")
	src, fromDocker := newCgroupSource(t), NewDockerSource(engine(h), CgroupConfig{})
	fromDocker.net.start = src.net.start
	tk := follow(t, h, append([]string{r.Pause}, r.Containers...)...)
	if tk.Pause() == nil {
		t.Fatal("the task has no pause container")
	}
	for _, c := range tk.Containers {
		for name, source := range map[string]Source{"cgroup": src, "docker": fromDocker} {
			delivered := make(chan *Counters, 1)
			feed, err := source.Open(tk, c, func(c *Counters) { delivered <- c })
			if err != nil {
				t.Fatal(err)
			}
			counters, err := feed.Sample(false)
			if err != nil {
				t.Fatal(err)
			}
			if counters == nil {
				expect.Until(t, c.DockerName+", "+name+" source: a sample",
					func() bool { return len(delivered) > 0 })
				counters = <-delivered
			}
			if len(counters.Networks) != 1 || counters.Networks[0].Name != "eth0" {
				t.Errorf("%s, %s source: got networks %+v, want eth0", c.DockerName,
					name, counters.Networks)
			}
			feed.Close()
		}
	}
}

// net/dev of a namespace with more interfaces than the kernel lists in one piece.
func TestRootManyInterfaces(t *testing.T) {
	h := testdocker.Start(t)
	id := h.Run(t, testdocker.Container{Network: "none"})
	tk := follow(t, h, id)
	ns, err := netns.GetFromPid(tk.Containers[0].PID)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	const pairs = 50
	for i := range pairs {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("left%d", i)},
			PeerName: fmt.Sprintf("right%d", i)}
		if err := handle.LinkAdd(veth); err != nil {
			t.Fatal(err)
		}
	}
	feed, err := newCgroupSource(t).Open(tk, tk.Containers[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	s, err := feed.Sample(false)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Networks) != 2*pairs {
		t.Errorf("got %d interfaces, want %d", len(s.Networks), 2*pairs)
	}
}

// The docker source passes on what the Engine says: both sources' documents have the same fields
// and, in the same second, the same numbers.
func TestRootDockerSource(t *testing.T) {
	h := testdocker.Start(t)
	id := h.Run(t, testdocker.Container{Cmd: []string{"sh", "-c", "while :; do :; done"}})
	dsrc := NewDockerSource(engine(h), CgroupConfig{})
	t.Cleanup(dsrc.Close)
	ours, theirs := sampling(t, newCgroupSource(t)), sampling(t, dsrc)
	var docs [2][]byte
	for i, s := range []*Sampler{ours, theirs} {
		tk := follow(t, h, id)
		s.Apply([]*task.Task{tk})
		sub := s.Subscribe(id)
		defer sub.Close()
		next(t, sub)
		next(t, sub)
		docs[i] = tk.Containers[0].Stats.Load().JSON
	}
	a, b := flatten(t, docs[0]), flatten(t, docs[1])
	for path := range a {
		if _, ok := b[path]; !ok {
			t.Errorf("%s: only the cgroup source has it", path)
		}
	}
	for path := range b {
		if _, ok := a[path]; !ok {
			t.Errorf("%s: only the docker source has it", path)
		}
	}
	for _, path := range []string{".name", ".id", ".memory_stats.limit",
		".cpu_stats.online_cpus"} {
		if a[path] != b[path] {
			t.Errorf("%s: got %s and %s", path, a[path], b[path])
		}
	}
}

// ask returns the Engine's answer to a single question.
func ask(t testing.TB, h *testdocker.Host, id string) []byte {
	t.Helper()
	body, err := engine(h)(context.Background(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	doc, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// record adds the files that the cgroup source reads of c to ar, as a tree below dir.
func record(t testing.TB, ar *txtar.Archive, dir string, c *task.Container) {
	t.Helper()
	proc := filepath.Join("/proc", strconv.Itoa(c.PID))
	ns, err := os.Open(filepath.Join(proc, "ns/net"))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	links, err := ListLinks(int(ns.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	add(t, ar, dir+proc+"/ns/net", links)
	membership, err := os.ReadFile(filepath.Join(proc, "cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	files := []string{"/proc/stat", "/proc/meminfo", proc + "/cgroup", proc + "/net/dev",
		"/sys/fs/cgroup/cgroup.controllers"}
	for _, controller := range append(controllersV1[:], "") {
		path, err := cgroupPath(membership, controller, c.ID)
		if err != nil {
			continue
		}
		for _, name := range []string{"memory.stat", "memory.events", "memory.current",
			"memory.max", "memory.usage_in_bytes",
			"memory.max_usage_in_bytes", "memory.failcnt", "memory.oom_control", "memory.limit_in_bytes", "cpu.stat", "cpuacct.stat", "cpuacct.usage_percpu",
			"io.stat", "pids.current", "pids.max", "cgroup.procs", "cgroup.controllers", "blkio.throttle.io_service_bytes",
			"blkio.throttle.io_serviced"} {
			files = append(files, filepath.Join("/sys/fs/cgroup", controller,
				string(path), name))
		}
	}
	for _, f := range files {
		// What is not there is of the other cgroup version.
		if b, err := os.ReadFile(f); err == nil {
			add(t, ar, dir+f, b)
		}
	}
}

// add adds bytes as they are and anything else as JSON.
func add(t testing.TB, ar *txtar.Archive, name string, v any) {
	t.Helper()
	b, ok := v.([]byte)
	if !ok {
		var err error
		if b, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	ar.Files = append(ar.Files, txtar.File{Name: name, Data: b})
}
