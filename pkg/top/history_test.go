package top

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"metad/pkg/admin"
)

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// used is what a made-up container has used so far.
type used struct {
	at                            int // seconds after start
	cpu                           int // hundredths of a second
	memory, inactive              int
	received, sent, read, written int
}

// stats is the sample of a container that used nothing else in the second before.
func (u used) stats() json.RawMessage {
	return fmt.Appendf(nil, `{"read":%q,"cpu_stats":{"cpu_usage":{"total_usage":%d},`+
		`"system_cpu_usage":800,"online_cpus":4},"precpu_stats":{"cpu_usage":`+
		`{"total_usage":0},"system_cpu_usage":400},"memory_stats":{"usage":%d,"limit":%d,`+
		`"stats":{"inactive_file":%d}},"networks":{"eth0":{"rx_bytes":%d,"tx_bytes":0},`+
		`"eth1":{"rx_bytes":0,"tx_bytes":%d}},"blkio_stats":{"io_service_bytes_recursive":[`+
		`{"op":"Read","value":%d},{"op":"write","value":%d},{"op":"Total","value":9}]}}`,
		start.Add(time.Duration(u.at)*time.Second).Format(time.RFC3339Nano), u.cpu,
		u.memory,
		1<<30, u.inactive, u.received, u.sent, u.read, u.written)
}

// snapshot is what a metad knows after so many seconds.
func snapshot(at int, tasks ...admin.Task) *Snapshot {
	return &Snapshot{At: start.Add(time.Duration(at) * time.Second),
		Tasks: &admin.Tasks{Version: "v1", Tasks: tasks}}
}

// single is a task of one container with an address of its own.
func single(name string, connections uint64, u used) admin.Task {
	return admin.Task{ID: "task-" + name, ARN: "arn:" + name, Family: name, Revision: "1",
		Status: "RUNNING", Endpoints: []admin.Endpoint{{Address: "172.17.0.2",
			MAC: "02:42:ac:11:00:02", Ifindex: 7, Container: "id-" + name,
			Connections: connections}},
		Containers: []admin.Container{{ID: "id-" + name, Name: name, Status: "RUNNING",
			Type: "NORMAL", Stats: u.stats()}}}
}

// CPU is a share of one core, as docker stats has it; a cgroup made anew uses nothing.
func TestCPUPercent(t *testing.T) {
	f := func(total, preTotal, system, preSystem, online int, want float64) {
		t.Helper()
		var s sample
		b := fmt.Sprintf(
			`{"cpu_stats":{"cpu_usage":{"total_usage":%d},"system_cpu_usage":%d,`+
				`"online_cpus":%d},"precpu_stats":{"cpu_usage":{"total_usage":%d},`+
				`"system_cpu_usage":%d}}`, total, system, online, preTotal,
			preSystem)
		if err := json.Unmarshal([]byte(b), &s); err != nil {
			t.Fatal(err)
		}
		if got := s.cpuPercent(); got != want {
			t.Errorf("%s: got %v, want %v", b, got, want)
		}
	}
	f(150, 100, 2000, 1000, 4, 20) // 50 of 1000, of four CPUs
	f(100, 100, 2000, 1000, 4, 0)
	f(50, 100, 2000, 1000, 4, 0)
	f(150, 100, 1000, 1000, 4, 0)
	f(150, 100, 500, 1000, 4, 0)
	f(0, 0, 0, 0, 0, 0)
}

// Rates are over the time between two samples, and of connections between two snapshots. A counter
// that began anew is no traffic, and a sample that is still the last one leaves the rates alone.
func TestRates(t *testing.T) {
	h := newHistory()
	f := func(what string, s *Snapshot, want usage) {
		t.Helper()
		h.add(s)
		for kind, all := range map[string]map[string]*entry{"container": h.containers,
			"task": h.tasks} {
			e := all[map[string]string{"container": "id-web", "task": "task-web"}[kind]]
			if e.now != want {
				t.Errorf("%s, %s: got %v, want %v", what, kind, e.now, want)
			}
		}
	}
	f("first sample", snapshot(10, single("web", 5, used{at: 9, cpu: 100, memory: 900,
		inactive: 100, received: 50, sent: 60, read: 70, written: 80})),
		usage{100, 800, 0, 0, 0, 0, 0})
	second := used{at: 11, received: 150, sent: 260, read: 370, written: 480}
	f("two seconds later", snapshot(12, single("web", 9, second)),
		usage{0, 0, 50, 100, 150, 200, 2})
	f("the same sample", snapshot(14, single("web", 9, second)),
		usage{0, 0, 50, 100, 150, 200, 0})
	f("restarted", snapshot(16, single("web", 1, used{at: 15, received: 1})), usage{})
	stopped := single("web", 1, used{})
	stopped.Containers[0].Stats = nil
	f("stopped", snapshot(18, stopped), usage{})
	f("started", snapshot(20, single("web", 1, used{at: 19, received: 1 << 30})), usage{})
	if got := len(h.containers["id-web"].points); got != 6 {
		t.Errorf("got %d points, want one for each snapshot", got)
	}
	h.add(snapshot(22))
	if len(h.containers)+len(h.tasks) != 0 {
		t.Error("a container that is gone is not forgotten")
	}
}

// Containers that share an address have the same network counters: their task uses them once.
func TestTaskIsTheSum(t *testing.T) {
	h := newHistory()
	for _, at := range []int{0, 1} {
		tk := single("web", uint64(at), used{at: at, memory: 10, received: at * 100,
			read: at * 5})
		tk.Containers = append(tk.Containers, admin.Container{ID: "sidecar",
			Name:  "sidecar",
			Stats: used{at: at, memory: 7, received: at * 100, read: at * 6}.stats()},
			admin.Container{Name: "being created"})
		h.add(snapshot(at, tk))
	}
	if got, want := h.tasks["task-web"].now, (usage{0, 17, 100, 0, 11, 0, 1}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	if e := h.containers["sidecar"]; e.hasConns {
		t.Error("a container without an address of its own has connections")
	}
	if len(h.containers) != 2 {
		t.Errorf("got %d containers, want the two that have an id", len(h.containers))
	}
}

// As many points are kept as fit, the newest.
func TestPointsAreBounded(t *testing.T) {
	h := newHistory()
	for at := range 3 * kept {
		h.add(snapshot(at, single("web", 0, used{at: at, memory: at})))
	}
	all := h.containers["id-web"].points
	if len(all) != kept || all[kept-1][memory] != 3*kept-1 || all[0][memory] != 2*kept {
		t.Errorf("got %d points from %v to %v", len(all), all[0], all[len(all)-1])
	}
}

// A sparkline has a character for each point, and is no higher for noise.
func TestSparkline(t *testing.T) {
	f := func(want string, width int, floor float32, values ...float32) {
		t.Helper()
		points := make([]point, len(values))
		for i, v := range values {
			points[i][cpu] = v
		}
		m := metric{of: []int{cpu}, floor: floor}
		if got := m.sparkline(points, width); got != want {
			t.Errorf("%v: got %q, want %q", values, got, want)
		}
	}
	f("  ▁▅█", 5, 1, 0, 50, 100)
	f("▅█", 2, 1, 0, 50, 100)
	f("▁▁", 2, 100, 1, 2)
	f("▁", 1, 1, -5)
	f("", 0, 1, 1)
	f("   ", 3, 1)
}

// Numbers of every size fit into a column.
func TestSize(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 999: "999", 1000: "1.0K", 1 << 20: "1.0M",
		999 << 20: "999.0M", 1000 << 20: "1.0G", 1 << 62: "4.0E"} {
		if got := size(v); got != want || len(got) >= cell {
			t.Errorf("%v: got %s, want %s", v, got, want)
		}
	}
}

// source is a made-up metad.
type source struct {
	snapshots []*Snapshot // the last one again and again
	asked     int
	look      *Look
	err       error
	hang      bool // answers are never given
}

func (s *source) Snapshot(ctx context.Context) (*Snapshot, error) {
	if s.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if s.err != nil {
		return nil, s.err
	}
	s.asked++
	return s.snapshots[min(s.asked, len(s.snapshots))-1], nil
}

func (s *source) Look(ctx context.Context, id string) (*Look, error) {
	return s.look, s.err
}

// The text has the running containers, the busiest first, with what they used between two
// snapshots.
func TestOnce(t *testing.T) {
	busy := func(at int) admin.Task {
		return single("busy", 0, used{at: at, cpu: 40, memory: 1 << 20, sent: at << 10})
	}
	idle := single("idle\x1b[2J", 0, used{memory: 2 << 20})
	stopped := single("stopped", 0, used{})
	stopped.Containers[0].Stats = json.RawMessage("null")
	s := &source{snapshots: []*Snapshot{snapshot(0, idle, busy(0), stopped),
		snapshot(2, idle, busy(2), stopped)}}
	rows, err := Once(t.Context(), Config{Source: s, Every: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := Print(&b, rows, clean); err != nil {
		t.Fatal(err)
	}
	var got []string
	for l := range strings.Lines(b.String()) {
		got = append(got, strings.Join(strings.Fields(l), " "))
	}
	if want := []string{"CPU % MEMORY LIMIT RX/S TX/S READ/S WRITE/S CONN/S CONTAINER",
		"40.0 1.0M 1.0G 0 1.0K 0 0 0 task-busy/busy",
		"0.0 2.0M 1.0G 0 0 0 0 0 task-idle^[2J/idle^[2J"}; !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	s.err = errors.New("no metad")
	if _, err := Once(t.Context(), Config{Source: s}); !errors.Is(err, s.err) {
		t.Errorf("got %v, want the source's error", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.err = nil
	if _, err := Once(ctx, Config{Source: s, Every: time.Hour}); !errors.Is(err, ctx.Err()) {
		t.Errorf("got %v, want the context's end", err)
	}
}

// clean stands in for what makes text printable.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\x1b':
			return '^'
		case r < ' ' || 0x7f <= r && r < 0xa0:
			return '?'
		}
		return r
	}, s)
}
