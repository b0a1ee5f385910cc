//go:build root

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/blkiodev"
	"github.com/docker/docker/api/types/container"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"metad/internal/expect"
	"metad/internal/testdocker"
)

// scraped are one container's numbers of /metrics/containers, by name and by interface if there is
// one.
func scraped(page, id string) (map[string]float64, error) {
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(strings.NewReader(page))
	if err != nil {
		return nil, err
	}
	all := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			key := name
			if i := label(m, "interface") + label(m, "failure_type"); i != "" {
				key += "," + i
			}
			if label(m, "id") == id {
				// of all devices
				all[key] += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return all, nil
}

// engineStats are the Engine's statistics of a container.
func engineStats(t *testing.T, h *testdocker.Host, id string) (s container.StatsResponse) {
	t.Helper()
	r, err := h.Client.ContainerStatsOneShot(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if err := json.NewDecoder(r.Body).Decode(&s); err != nil {
		t.Fatal(err)
	}
	return s
}

// engineNumbers are what the page should say by the Engine's word.
func engineNumbers(t *testing.T, h *testdocker.Host, id string) map[string]float64 {
	t.Helper()
	s := engineStats(t, h, id)
	const second = 1e9
	all := map[string]float64{
		"container_cpu_usage_seconds_total":         float64(s.CPUStats.CPUUsage.TotalUsage) / second,
		"container_cpu_user_seconds_total":          float64(s.CPUStats.CPUUsage.UsageInUsermode) / second,
		"container_cpu_system_seconds_total":        float64(s.CPUStats.CPUUsage.UsageInKernelmode) / second,
		"container_cpu_cfs_periods_total":           float64(s.CPUStats.ThrottlingData.Periods),
		"container_cpu_cfs_throttled_periods_total": float64(s.CPUStats.ThrottlingData.ThrottledPeriods),
		"container_cpu_cfs_throttled_seconds_total": float64(s.CPUStats.ThrottlingData.ThrottledTime) / second,
		"container_memory_failures_total,pgfault":   float64(s.MemoryStats.Stats["total_pgfault"] + v2Only(s, "pgfault")),
	}
	for name, n := range s.Networks {
		all["container_network_receive_bytes_total,"+name] = float64(n.RxBytes)
		all["container_network_receive_packets_total,"+name] = float64(n.RxPackets)
		all["container_network_transmit_bytes_total,"+name] = float64(n.TxBytes)
		all["container_network_transmit_packets_total,"+name] = float64(n.TxPackets)
	}
	return all
}

// v2Only is a number of memory.stat that cgroup v1 has under another name too.
func v2Only(s container.StatsResponse, key string) uint64 {
	if _, v1 := s.MemoryStats.Stats["total_rss"]; v1 {
		return 0
	}
	return s.MemoryStats.Stats[key]
}

// Each counter of the page lies between what the Engine says before and after; limits are the
// Engine's; and by TCP the page is there only if it was asked for.
func TestRootContainerMetrics(t *testing.T) {
	h := testdocker.Shared(t)
	d := startMetad(t, h, "--container-metrics")
	limits := func(_ *container.Config, host *container.HostConfig) {
		host.Resources = container.Resources{Memory: 64 << 20, NanoCPUs: 2e8,
			CPUShares: 512}
	}
	id := h.Run(t, testdocker.Container{Name: "busy", Configure: limits,
		Cmd: []string{"sh", "-c",
			"while :; do wget -qO /dev/null http://169.254.170.2/v2/metadata; done"}})
	const path = "/metrics/containers"
	var first, got, before map[string]float64
	read := func() map[string]float64 {
		code, page, err := d.get(defaultAdmin, path)
		if err != nil || code != 200 {
			t.Fatalf("GET %s: got %d, %v", path, code, err)
		}
		all, err := scraped(page, id)
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	waitFor(t, "throttling and traffic of the container", func() bool {
		first = read()
		return first["container_cpu_cfs_throttled_periods_total"] > 0 &&
			first["container_network_transmit_bytes_total,eth0"] > 0
	})
	before = engineNumbers(t, h, id)
	waitFor(t, "a sample after the Engine's word", func() bool {
		got = read()
		for key, was := range before {
			if got[key] < was {
				return false
			}
		}
		return true
	})
	after := engineNumbers(t, h, id)
	for key := range before {
		if got[key] > after[key] || got[key] < first[key] {
			t.Errorf("%s: got %v after %v, want between the Engine's %v and %v", key,
				got[key], first[key], before[key], after[key])
		}
	}
	for key, want := range map[string]float64{"container_spec_memory_limit_bytes": 64 << 20,
		"container_spec_cpu_shares": 512} {
		if got[key] != want {
			t.Errorf("%s: got %v, want %v", key, got[key], want)
		}
	}
	in := h.Inspect(t, id)
	if want := fmt.Sprint(in.State.StartedAt[:19]); got["container_start_time_seconds"] == 0 ||
		got["container_last_seen"] < got["container_start_time_seconds"] {
		t.Errorf("started at %v, last seen %v, want after %s",
			got["container_start_time_seconds"], got["container_last_seen"], want)
	}
	used := got["container_memory_working_set_bytes"]
	if usage := got["container_memory_usage_bytes"]; used <= 0 || used > usage ||
		usage > 64<<20 {
		t.Errorf("memory: working set %v of %v", used, usage)
	}
	h.Remove(t, id)
	waitFor(t, "the container's end on the page", func() bool { return len(read()) == 0 })
}

// engineGauges are what the page should say of a container that does nothing, by the Engine's word:
// memory, processes, and what it has read from and written to disks.
func engineGauges(t *testing.T, h *testdocker.Host, id string) map[string]float64 {
	t.Helper()
	s := engineStats(t, h, id)
	m := s.MemoryStats.Stats
	rss, isV1 := m["total_rss"]
	cache, inactive, mapped := m["total_cache"], m["total_inactive_file"],
		m["total_mapped_file"]
	if !isV1 {
		rss, cache, inactive, mapped = m["anon"], m["file"], m["inactive_file"],
			m["file_mapped"]
	}
	all := map[string]float64{
		"container_memory_usage_bytes":       float64(s.MemoryStats.Usage),
		"container_memory_working_set_bytes": float64(s.MemoryStats.Usage - inactive),
		"container_memory_rss":               float64(rss),
		"container_memory_cache":             float64(cache),
		"container_memory_mapped_file":       float64(mapped),
		"container_threads":                  float64(s.PidsStats.Current),
		"container_fs_reads_bytes_total":     operations(s.BlkioStats.IoServiceBytesRecursive, "read"),
		"container_fs_writes_bytes_total":    operations(s.BlkioStats.IoServiceBytesRecursive, "write"),
	}
	if isV1 {
		all["container_memory_max_usage_bytes"] = float64(s.MemoryStats.MaxUsage)
		all["container_fs_reads_total"] = operations(s.BlkioStats.IoServicedRecursive,
			"read")
		all["container_fs_writes_total"] = operations(s.BlkioStats.IoServicedRecursive,
			"write")
	}
	return all
}

// operations is the sum of one kind over all devices.
func operations(all []container.BlkioStatEntry, kind string) (sum float64) {
	for _, e := range all {
		if strings.EqualFold(e.Op, kind) {
			sum += float64(e.Value)
		}
	}
	return sum
}

// Memory and disk of a container that does nothing are on the page as the Engine has them, to the
// byte; and each process that was killed for want of memory is counted once.
func TestRootContainerGauges(t *testing.T) {
	h := testdocker.Shared(t)
	d := startMetad(t, h, "--container-metrics")
	limits := func(_ *container.Config, host *container.HostConfig) {
		host.Resources = container.Resources{Memory: 16 << 20, MemorySwap: 16 << 20,
			// Newer kernels count a device's bytes only once it has a limit.
			BlkioDeviceWriteBps: []*blkiodev.ThrottleDevice{{Rate: 1 << 30,
				Path: testdocker.BlockDevice(t, filepath.Join(h.Dir, "data"))}}}
	}
	const kills = 3
	id := h.Run(t, testdocker.Container{Name: "still", Configure: limits,
		Cmd: []string{"sh", "-c", fmt.Sprintf(`
			dd if=/dev/zero of=/f bs=64k count=64 oflag=direct
			for i in $(seq %d); do awk 'BEGIN { s = sprintf("%%60000000s", "x") }'; done
			exec sleep 1000000`, kills)}})
	pid := h.Inspect(t, id).State.Pid
	expect.Until(t, "the container has done its work", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		return err == nil && string(b) == "sleep\n"
	})
	var got, want map[string]float64
	expect.Until(t, "the Engine's numbers on the page", func() bool {
		before := engineGauges(t, h, id)
		code, page, err := d.get(defaultAdmin, "/metrics/containers")
		if err != nil || code != 200 {
			t.Fatalf("got %d, %v", code, err)
		}
		if got, err = scraped(page, id); err != nil {
			t.Fatal(err)
		}
		want = engineGauges(t, h, id)
		want["container_oom_events_total"] = kills
		for key, is := range want {
			if is != got[key] || key != "container_oom_events_total" &&
				is != before[key] {
				return false
			}
		}
		return want["container_fs_writes_bytes_total"] >= 64*64<<10
	}, func() any { return fmt.Sprintf("the page's %v\nthe Engine's %v", got, want) })
}
