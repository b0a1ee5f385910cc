package top

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"metad/pkg/admin"
)

// The numbers of a usage.
const (
	cpu         = iota // percent of one core
	memory             // bytes
	received           // bytes per second, as the next three
	sent               //
	read               //
	written            //
	connections        // to the endpoint, per second
	kinds
)

// usage is what a container or a task uses.
type usage [kinds]float64

// point is a usage that is kept.
type point [kinds]float32

// kept is how many points are kept of each container.
const kept = 120

// entry is a container, or a task, and what it used of late.
type entry struct {
	task      *admin.Task
	container *admin.Container // nil: the entry is the task's
	name      string
	inTask    int // how many containers, for a task

	sampled bool // there is a sample
	now     usage
	limit   float64 // of memory, in bytes; 0 for a task
	points  []point // the newest last

	last     counters
	conns    uint64
	hasConns bool // an address is the entry's own
	seen     int  // the snapshot that had it last
}

// counters are a sample's.
type counters struct {
	at                            time.Time
	received, sent, read, written uint64
}

// history is what is known of every container and task. It is not safe for concurrent use.
type history struct {
	containers, tasks map[string]*entry // by id
	snapshots         int
	at                time.Time // of the last one
	requests, refused rate
	version           string
}

func newHistory() *history {
	return &history{containers: map[string]*entry{}, tasks: map[string]*entry{}}
}

// rate is how fast a counter grows.
type rate struct {
	last      uint64
	known     bool
	perSecond float64
}

func (r *rate) add(v uint64, seconds float64) {
	r.perSecond = 0
	if r.known {
		r.perSecond = perSecond(r.last, v, seconds)
	}
	r.last, r.known = v, true
}

// perSecond is 0 for a counter that began anew.
func perSecond(before, now uint64, seconds float64) float64 {
	if now < before || seconds <= 0 {
		return 0
	}
	return float64(now-before) / seconds
}

// add takes note of s. What s does not have is forgotten.
func (h *history) add(s *Snapshot) {
	seconds := s.At.Sub(h.at).Seconds()
	h.snapshots++
	h.at, h.version = s.At, s.Tasks.Version
	h.requests.add(s.Requests, seconds)
	h.refused.add(s.Refused, seconds)
	for i := range s.Tasks.Tasks {
		t := &s.Tasks.Tasks[i]
		whole := h.entry(h.tasks, t.ID)
		whole.task, whole.name, whole.inTask = t, t.Family, len(t.Containers)
		whole.sampled, whole.now = false, usage{}
		for j := range t.Containers {
			c := &t.Containers[j]
			if c.ID == "" {
				continue // it is being created
			}
			e := h.entry(h.containers, c.ID)
			e.task, e.container, e.name = t, c, c.Name
			e.sample(c.Stats)
			e.connected(t, c.ID, seconds)
			e.keep()
			whole.include(e, len(t.Endpoints) == 1)
		}
		whole.connected(t, "", seconds)
		whole.keep()
	}
	for _, all := range []map[string]*entry{h.containers, h.tasks} {
		for id, e := range all {
			if e.seen != h.snapshots {
				delete(all, id)
			}
		}
	}
}

func (h *history) entry(all map[string]*entry, id string) *entry {
	e := all[id]
	if e == nil {
		e = &entry{}
		all[id] = e
	}
	e.seen = h.snapshots
	return e
}

// sample is what is read of a container's sample.
type sample struct {
	Read   time.Time `json:"read"`
	CPU    cpuStats  `json:"cpu_stats"`
	PreCPU cpuStats  `json:"precpu_stats"`
	Memory struct {
		Usage uint64 `json:"usage"`
		Limit uint64 `json:"limit"`
		Stats struct {
			V1 uint64 `json:"total_inactive_file"`
			V2 uint64 `json:"inactive_file"`
		} `json:"stats"`
	} `json:"memory_stats"`
	Networks map[string]struct {
		RxBytes uint64 `json:"rx_bytes"`
		TxBytes uint64 `json:"tx_bytes"`
	} `json:"networks"`
	Blkio struct {
		Bytes []struct {
			Op    string `json:"op"`
			Value uint64 `json:"value"`
		} `json:"io_service_bytes_recursive"`
	} `json:"blkio_stats"`
}

type cpuStats struct {
	Usage struct {
		Total uint64 `json:"total_usage"`
	} `json:"cpu_usage"`
	System uint64 `json:"system_cpu_usage"`
	Online uint64 `json:"online_cpus"`
}

// cpuPercent is the share of one core between the two samples, as `docker stats` shows it.
func (s *sample) cpuPercent() float64 {
	used := float64(s.CPU.Usage.Total) - float64(s.PreCPU.Usage.Total)
	system := float64(s.CPU.System) - float64(s.PreCPU.System)
	if used <= 0 || system <= 0 {
		return 0
	}
	return used / system * float64(s.CPU.Online) * 100
}

// memoryInUse is usage without inactive page cache, as `docker stats` shows it.
func (s *sample) memoryInUse() uint64 {
	inactive := s.Memory.Stats.V1 // cgroup v1 has the other one too, of the group alone
	if inactive == 0 {
		inactive = s.Memory.Stats.V2
	}
	return s.Memory.Usage - min(s.Memory.Usage, inactive)
}

func (s *sample) counters() counters {
	c := counters{at: s.Read}
	for _, n := range s.Networks {
		c.received += n.RxBytes
		c.sent += n.TxBytes
	}
	for _, b := range s.Blkio.Bytes {
		switch b.Op {
		case "Read", "read":
			c.read += b.Value
		case "Write", "write":
			c.written += b.Value
		}
	}
	return c
}

// sample takes a container's newest sample. A container without one (it does not run, or was not
// sampled yet) uses nothing.
func (e *entry) sample(b json.RawMessage) {
	var s *sample
	if json.Unmarshal(b, &s) != nil || s == nil {
		e.sampled, e.now, e.limit, e.last = false, usage{}, 0, counters{}
		return
	}
	is, was := s.counters(), e.last
	e.now[cpu], e.now[memory] = s.cpuPercent(), float64(s.memoryInUse())
	e.limit = float64(s.Memory.Limit)
	if !e.sampled || !is.at.Equal(was.at) { // else the rates are still those
		seconds := is.at.Sub(was.at).Seconds()
		if !e.sampled {
			seconds = 0 // nothing to compare with
		}
		e.now[received] = perSecond(was.received, is.received, seconds)
		e.now[sent] = perSecond(was.sent, is.sent, seconds)
		e.now[read] = perSecond(was.read, is.read, seconds)
		e.now[written] = perSecond(was.written, is.written, seconds)
	}
	e.sampled, e.last = true, is
}

// connected takes the connections from the addresses of a container, or of the whole task if id is
// "".
func (e *entry) connected(t *admin.Task, id string, seconds float64) {
	sum, has := uint64(0), false
	for _, ep := range t.Endpoints {
		if id == "" || ep.Container == id {
			sum, has = sum+ep.Connections, true
		}
	}
	e.now[connections] = 0
	if e.hasConns {
		e.now[connections] = perSecond(e.conns, sum, seconds)
	}
	e.conns, e.hasConns = sum, has
}

// include adds a container's usage to its task's. Containers that share a network namespace have
// the same network counters.
func (e *entry) include(c *entry, sharedNetwork bool) {
	if !c.sampled {
		return
	}
	e.sampled = true
	for k := range connections { // those are counted by address
		if sharedNetwork && (k == received || k == sent) {
			e.now[k] = max(e.now[k], c.now[k])
		} else {
			e.now[k] += c.now[k]
		}
	}
}

func (e *entry) keep() {
	var p point
	for k := range p {
		p[k] = float32(e.now[k])
	}
	if len(e.points) == kept {
		e.points = append(e.points[:0], e.points[1:]...)
	}
	e.points = append(e.points, p)
}

// metric is what entries can be sorted by, and what their sparklines show.
type metric struct {
	key, name string
	of        []int   // their sum
	floor     float32 // the least that a sparkline's full height is
}

var metrics = []metric{
	{"c", "CPU", []int{cpu}, 5},
	{"m", "memory", []int{memory}, 1 << 20},
	{"n", "network", []int{received, sent}, 1 << 10},
	{"d", "disk", []int{read, written}, 1 << 10},
	{"r", "requests", []int{connections}, 1},
}

func (m *metric) value(e *entry) (sum float64) {
	for _, k := range m.of {
		sum += e.now[k]
	}
	return sum
}

// byName is the order by name, beside those by metrics.
var byName = len(metrics)

// view says which entries are shown, and in which order.
type view struct {
	order    int // of metrics, or byName
	reverse  bool
	filter   string // part of a name, an id or a family
	onlyTask string // id; "": all
}

// arrange returns the entries that v shows in their order.
func arrange(all map[string]*entry, v view) []*entry {
	rows := make([]*entry, 0, len(all))
	want := strings.ToLower(v.filter)
	for _, e := range all {
		if (v.onlyTask == "" || e.task.ID == v.onlyTask) && e.matches(want) {
			rows = append(rows, e)
		}
	}
	slices.SortFunc(rows, func(a, b *entry) int {
		order := 0
		if v.order < len(metrics) {
			m := &metrics[v.order]
			order = cmp.Compare(m.value(b), m.value(a))
			if v.order == 0 {
				order = cmp.Or(order, cmp.Compare(b.now[memory], a.now[memory]))
			}
		}
		order = cmp.Or(order, strings.Compare(a.name, b.name),
			strings.Compare(a.key(), b.key()))
		if v.reverse {
			return -order
		}
		return order
	})
	return rows
}

// key is the entry's id.
func (e *entry) key() string {
	if e.container != nil {
		return e.container.ID
	}
	return e.task.ID
}

func (e *entry) matches(want string) bool {
	if want == "" {
		return true
	}
	texts := []string{e.name, e.task.Family, e.task.ID}
	if e.container != nil {
		texts = append(texts, e.container.ID)
	}
	for _, ep := range e.task.Endpoints {
		texts = append(texts, ep.Address)
	}
	return slices.ContainsFunc(texts, func(s string) bool {
		return strings.Contains(strings.ToLower(s), want)
	})
}
