package cadvisor

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"metad/internal/expect"
	"metad/pkg/stats"
	"metad/pkg/task"
)

// host is a source of made-up containers.
type host []madeUp

type madeUp struct {
	t *task.Task
	c *task.Container
	n *stats.Counters
}

func (h host) EachKept(f func(*task.Task, *task.Container, *stats.Counters)) {
	for _, o := range h {
		f(o.t, o.c, o.n)
	}
}

// read1 is when made-up counters were read.
var read1 = time.UnixMilli(1_700_000_000_123)

// made is the nth made-up container, on a host with cgroup v1 or v2.
func made(n int, v1 bool) madeUp {
	u := uint64(n)
	c := &stats.Counters{Read: read1, Pids: stats.Pids{Current: 3, Limit: 64},
		CPU: stats.CPU{Total: 1_500_000_000 + u, User: 1_000_000_000, Kernel: 20_000_000,
			PerCPU: []uint64{1, 2}, Periods: 9, ThrottledPeriods: 4,
			ThrottledTime: 2_500_000_000},
		Memory: stats.Memory{Usage: 1000, Limit: 4096, Failcnt: 5, OOMKills: 3,
			HasKills: true},
		Networks: []stats.Network{{Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3,
			RxDropped: 4,
			TxBytes:   5, TxPackets: 6, TxErrors: 7, TxDropped: 8}},
		Blkio: stats.Blkio{ServiceBytes: []stats.BlkioEntry{{Major: 8, Op: "Read",
			Value: 100}, {Major: 8, Op: "Write", Value: 200},
			{Major: 8, Op: "Total", Value: 300}, {Major: 8, Minor: 16, Op: "Read", Value: 7}}},
	}
	if v1 {
		c.Memory.MaxUsage = 2000
		c.Memory.Stats = []stats.Stat{{Key: "inactive_file", Value: 1},
			{Key: "pgfault", Value: 1}, {Key: "pgmajfault", Value: 1}, {Key: "rss", Value: 1},
			{Key: "total_cache", Value: 30}, {Key: "total_inactive_file", Value: 400}, {Key: "total_mapped_file", Value: 31}, {Key: "total_pgfault", Value: 32},
			{Key: "total_pgmajfault", Value: 33}, {Key: "total_rss", Value: 34}, {Key: "total_swap", Value: 35}}
		c.Blkio.Serviced = []stats.BlkioEntry{{Major: 8, Op: "Read", Value: 11},
			{Major: 8, Op: "Write", Value: 12}}
	} else {
		c.Memory.Stats = []stats.Stat{{Key: "anon", Value: 34}, {Key: "file", Value: 30},
			{Key: "file_mapped", Value: 31}, {Key: "inactive_file", Value: 400},
			{Key: "pgfault", Value: 32}, {Key: "pgmajfault", Value: 33}}
	}
	return madeUp{&task.Task{ID: fmt.Sprintf("%032x", n), Family: "web"},
		&task.Container{ID: fmt.Sprintf("%064x", n), Name: "app",
			DockerName: fmt.Sprintf("web-app-%d", n), Image: "nginx:1",
			Stats:     new(task.StatsCell),
			StartedAt: time.Unix(1_600_000_000, 5),
			Limits:    task.ContainerLimits{CPU: 512, Memory: 1}}, c}
}

// get asks h once.
func get(h *Handler) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics/containers", nil))
	return w
}

// values are a page's numbers by name and labels, without those that each container has.
func values(t *testing.T, page string) map[string]float64 {
	t.Helper()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			key := name
			for _, l := range m.Label {
				switch l.GetName() {
				case "container", "family", "id", "image", "name", "task":
				default:
					key += "," + l.GetName() + "=" + l.GetValue()
				}
			}
			all[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			if m.GetTimestampMs() != read1.UnixMilli() {
				t.Errorf("%s: got time %d, want that of the reading", key,
					m.GetTimestampMs())
			}
		}
	}
	return all
}

// Every number has cAdvisor's name and unit; those that a version of cgroups does not have are left
// out.
func TestNumbers(t *testing.T) {
	both := map[string]float64{
		"container_cpu_usage_seconds_total,cpu=total": 1.500000001, "container_cpu_user_seconds_total": 1, "container_cpu_system_seconds_total": 0.02,
		"container_cpu_cfs_periods_total": 9, "container_cpu_cfs_throttled_periods_total": 4, "container_cpu_cfs_throttled_seconds_total": 2.5,
		"container_memory_usage_bytes": 1000, "container_memory_working_set_bytes": 600, "container_memory_cache": 30, "container_memory_rss": 34,
		"container_oom_events_total":                                              3,
		"container_memory_mapped_file":                                            31,
		"container_memory_failures_total,failure_type=pgfault,scope=hierarchy":    32,
		"container_memory_failures_total,failure_type=pgmajfault,scope=hierarchy": 33,
		"container_network_receive_bytes_total,interface=eth0":                    1,
		"container_network_receive_packets_total,interface=eth0":                  2,
		"container_network_receive_errors_total,interface=eth0":                   3,
		"container_network_receive_packets_dropped_total,interface=eth0":          4,
		"container_network_transmit_bytes_total,interface=eth0":                   5,
		"container_network_transmit_packets_total,interface=eth0":                 6,
		"container_network_transmit_errors_total,interface=eth0":                  7,
		"container_network_transmit_packets_dropped_total,interface=eth0":         8,
		"container_fs_reads_bytes_total,device=/dev/sda":                          100,
		"container_fs_writes_bytes_total,device=/dev/sda":                         200,
		"container_fs_reads_bytes_total,device=8:16":                              7,
		"container_fs_writes_bytes_total,device=8:16":                             0,
		"container_threads": 3, "container_threads_max": 64, "container_spec_memory_limit_bytes": 4096, "container_spec_cpu_shares": 512,
		"container_start_time_seconds": 1_600_000_000, "container_last_seen": 1_700_000_000,
	}
	only := map[bool]map[string]float64{
		true: {"container_memory_swap": 35, "container_memory_max_usage_bytes": 2000,
			"container_memory_failcnt":                  5,
			"container_fs_reads_total,device=/dev/sda":  11,
			"container_fs_writes_total,device=/dev/sda": 12,
			"container_fs_reads_total,device=8:16":      0,
			"container_fs_writes_total,device=8:16":     0},
		false: {},
	}
	block := t.TempDir()
	if err := os.Symlink("../../devices/pci/sda", filepath.Join(block, "8:0")); err != nil {
		t.Fatal(err)
	}
	for v1, more := range only {
		h := New(host{made(1, v1)})
		for range atOnce {
			p := <-h.pages
			p.block = block
			h.pages <- p
		}
		got := values(t, get(h).Body.String())
		for name, want := range both {
			more[name] = want
		}
		for name, want := range more {
			if v, ok := got[name]; !ok || v != want {
				t.Errorf("v1 %v: %s: got %v, %v, want %v", v1, name, v, ok, want)
			}
			delete(got, name)
		}
		if len(got) > 0 {
			t.Errorf("v1 %v: nobody asked for %v", v1, got)
		}
	}
}

// A container without limits has none, as cAdvisor shows it.
func TestWithoutLimits(t *testing.T) {
	o := made(1, false)
	o.c.Limits, o.n.Pids.Limit, o.n.CPU.Periods = task.ContainerLimits{}, 1<<64-1, 0
	got := values(t, get(New(host{o})).Body.String())
	for _, name := range []string{"container_spec_memory_limit_bytes",
		"container_threads_max"} {
		if v, ok := got[name]; !ok || v != 0 {
			t.Errorf("%s: got %v, %v, want 0", name, v, ok)
		}
	}
	if _, ok := got["container_cpu_cfs_periods_total"]; ok {
		t.Error("CFS periods without a quota")
	}
}

// Names come from labels that anybody may set: whatever is in them, the page has one series for
// each container, and the name in it.
func TestHostileNames(t *testing.T) {
	evil := "a\"} 1\ncontainer_evil{x=\"\\\xff"
	o := made(1, true)
	o.c.Name, o.t.Family, o.c.Image, o.c.DockerName, o.t.ID = evil, evil, evil, evil, evil
	o.n.Networks[0].Name = evil
	page := get(New(host{o})).Body.String()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	if families["container_evil"] != nil || len(families["container_last_seen"].Metric) != 1 {
		t.Errorf("got %.3000s", page)
	}
	for _, l := range families["container_last_seen"].Metric[0].Label {
		if want := strings.ToValidUTF8(evil, "\ufffd"); l.GetName() != "id" &&
			l.GetValue() != want {
			t.Errorf("%s: got %q, want %q", l.GetName(), l.GetValue(), want)
		}
	}
}

// promtool has nothing to say about the page, but for the names that cAdvisor chose.
func TestPageIsLinted(t *testing.T) {
	page := get(New(host{made(1, true), made(2, true), made(3, false)})).Body
	problems, err := promlint.New(page).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Metric != "container_memory_failcnt" || !strings.Contains(p.Text, "_total") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// Reading the page asks for the statistics of every container.
func TestKeepsHot(t *testing.T) {
	h := host{made(1, true), made(2, true)}
	before := time.Now().UnixNano()
	get(New(h))
	for _, o := range h {
		if o.c.Stats.Asked() < before {
			t.Errorf("%s was not asked for", o.c.DockerName)
		}
	}
}

// slow is a client that does not read until it is let go.
type slow struct {
	http.ResponseWriter
	writing chan struct{}
	letGo   chan struct{}
}

func (s *slow) Write(b []byte) (int, error) {
	select {
	case s.writing <- struct{}{}:
		<-s.letGo
	case <-s.letGo:
	}
	return len(b), nil
}

// Clients that do not read take a bounded number of pages: one more is told so, and gets its page
// when they have gone.
func TestSlowClients(t *testing.T) {
	h := New(host{made(1, true)})
	s := &slow{httptest.NewRecorder(), make(chan struct{}), make(chan struct{})}
	done := make(chan struct{})
	for range atOnce {
		go func() {
			h.ServeHTTP(s, httptest.NewRequest(http.MethodGet, "/", nil))
			done <- struct{}{}
		}()
		<-s.writing
	}
	if w := get(h); w.Code != http.StatusServiceUnavailable {
		t.Errorf("one too many: got %d, want 503", w.Code)
	}
	close(s.letGo)
	for range atOnce {
		<-done
	}
	if w := get(h); w.Code != http.StatusOK {
		t.Errorf("afterwards: got %d, want 200", w.Code)
	}
}

// telling says when it is read.
type telling struct {
	host
	begun chan struct{}
}

func (s telling) EachKept(f func(*task.Task, *task.Container, *stats.Counters)) {
	s.begun <- struct{}{}
	s.host.EachKept(f)
}

// A client that asks and does not read is cut off when its time is over. Until then it keeps no
// sample from being taken and no other client from its page.
func TestSlowReaderIsEnded(t *testing.T) {
	var many host
	for n := range 2000 { // far more than the kernel takes in advance
		many = append(many, made(n, true))
	}
	begun := make(chan struct{}, 2)
	h := New(telling{many, begun})
	h.writeTime = 500 * time.Millisecond
	srv := httptest.NewServer(h)
	defer srv.Close()
	slow, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	if _, err := io.WriteString(slow, "GET / HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-begun
	if code := get(h).Code; code != http.StatusOK {
		t.Errorf("beside a slow client: got %d", code)
	}
	expect.Until(t, "the slow client's page is free again", func() bool {
		return len(h.pages) == atOnce
	})
	rest, err := io.ReadAll(slow)
	if err == nil && strings.HasSuffix(string(rest), "\r\n0\r\n\r\n") {
		t.Errorf("the slow client got a whole page of %d bytes", len(rest))
	}
}

// A page of many containers after a page of one shows each as it is, and the other way around.
func TestPagesShareMemory(t *testing.T) {
	h := New(nil)
	p := <-h.pages
	var three, one host
	for n := range 3 {
		three = append(three, made(n, true))
	}
	bare := made(9, false)
	bare.n.Networks, bare.n.Blkio = nil, stats.Blkio{}
	one = host{bare}
	text := func(src Source) string {
		var b strings.Builder
		p.read(src, read1)
		if err := p.writeTo(&b); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	many, alone := text(three), text(one)
	if strings.Contains(alone, "interface=") || strings.Contains(alone, "device=") {
		t.Errorf("of an earlier page: %s", alone)
	}
	if again := text(three); again != many {
		t.Error("the same containers, another page")
	}
}

// BenchmarkPage: a page of 3,000 containers, about 110,000 series.
func BenchmarkPage(b *testing.B) {
	var h host
	for n := range 3000 {
		h = append(h, made(n, true))
	}
	p := <-New(h).pages
	var size countingWriter
	b.ReportAllocs()
	before := cpuTime(b)
	for b.Loop() {
		size = 0
		p.read(h, read1)
		if err := p.writeTo(&size); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(size)/1e6, "MB")
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/1e3/float64(b.N), "cpu-ms/op")
}

// cpuTime is what this process has used, the collector's share included.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

type countingWriter int

func (w *countingWriter) Write(b []byte) (int, error) {
	*w += countingWriter(len(b))
	return len(b), nil
}
