// Package cadvisor shows the containers' newest counters to Prometheus under cAdvisor's names and
// units, so that what was made for cAdvisor (dashboards, alerts) works.
//
// A page is written straight from the counters into the connection. There is no object for a
// series: 3,000 containers are about 100,000 of them.
package cadvisor

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"metad/pkg/stats"
	"metad/pkg/task"
)

// Source has the counters; *stats.Sampler does.
type Source interface {
	EachKept(func(*task.Task, *task.Container, *stats.Counters))
}

const (
	// atOnce is how many pages are written at a time; each takes memory of its own.
	atOnce    = 2
	writeTime = 10 * time.Second
	// writeSize is how many bytes are collected for one write.
	writeSize = 64 << 10
)

// Handler answers GET with the page. Each page asks for the statistics of every container, which
// keeps them fresh.
type Handler struct {
	source    Source
	pages     chan *page
	writeTime time.Duration // how long a client may take for a page
}

// New returns a handler that shows what source has.
func New(source Source) *Handler {
	h := &Handler{source: source, pages: make(chan *page, atOnce), writeTime: writeTime}
	for range atOnce {
		h.pages <- &page{devices: map[device]string{}, block: "/sys/dev/block"}
	}
	return h
}

// ServeHTTP implements http.Handler. A client that finds too many others is told 503.
func (h *Handler) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	select {
	case p := <-h.pages:
		defer func() { h.pages <- p }()
		// or it has none
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(h.writeTime))
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		p.read(h.source, time.Now())
		_ = p.writeTo(w) // the client is gone, or too slow
	default:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "others are reading this page", http.StatusServiceUnavailable)
	}
}

// page is the counters of one moment. Its memory is used again for the next page.
type page struct {
	rows    []row
	text    []byte // of all rows' labels and times
	out     []byte
	devices map[device]string
	block   string // /sys/dev/block
}

// row is one container's part of a page.
type row struct {
	labels, stamp span // of the page's text
	numbers
	networks []stats.Network
	disks    []disk
}

// span is a part of the page's text, which moves when it grows.
type span struct{ start, end int }

// numbers are what the families with one series a container show.
type numbers struct {
	read, started time.Time
	cpu           stats.CPU
	threads       stats.Pids

	usage, maxUsage, failcnt    uint64
	oomKills                    uint64
	hasKills                    bool
	limit, shares               uint64
	cache, rss, mapped, swap    uint64
	inactive, faults, bigFaults uint64
	v1                          bool // cgroup v1's numbers
}

// device is a block device.
type device struct{ major, minor uint64 }

// disk is what a container did to one device. The operations are known for cgroup v1 alone.
type disk struct {
	device
	bytes, ops [2]uint64 // read, written
}

// read takes the counters of every container, and asks for their next ones.
func (p *page) read(source Source, now time.Time) {
	p.rows, p.text = p.rows[:0], p.text[:0]
	source.EachKept(func(t *task.Task, c *task.Container, n *stats.Counters) {
		c.Stats.Ask(now.UnixNano())
		if len(p.rows) < cap(p.rows) {
			p.rows = p.rows[:len(p.rows)+1] // with the memory of an earlier page's row
		} else {
			p.rows = append(p.rows, row{})
		}
		r := &p.rows[len(p.rows)-1]
		r.labels = p.label(t, c)
		start := len(p.text)
		p.text = append(strconv.AppendInt(append(p.text, ' '), n.Read.UnixMilli(), 10),
			'\n')
		r.stamp = span{start, len(p.text)}
		r.take(c, n)
	})
}

// label writes the labels that all series of c have.
func (p *page) label(t *task.Task, c *task.Container) span {
	start := len(p.text)
	for _, l := range [...]struct{ name, value string }{
		{`container="`, c.Name},
		{`",family="`, t.Family},
		{`",id="`, c.ID},
		{`",image="`, c.Image},
		{`",name="`, c.DockerName},
		{`",task="`, t.ID},
	} {
		p.text = append(p.text, l.name...)
		p.text = appendEscaped(p.text, l.value)
	}
	p.text = append(p.text, '"')
	return span{start, len(p.text)}
}

// appendEscaped appends a label's value.
func appendEscaped(dst []byte, value string) []byte {
	if !utf8.ValidString(value) {
		value = strings.ToValidUTF8(value, "\ufffd")
	}
	for i := range len(value) {
		switch ch := value[i]; ch {
		case '\\', '"':
			dst = append(dst, '\\', ch)
		case '\n':
			dst = append(dst, `\n`...)
		default:
			dst = append(dst, ch)
		}
	}
	return dst
}

// take takes what is shown of n.
func (r *row) take(c *task.Container, n *stats.Counters) {
	r.numbers = numbers{read: n.Read, started: c.StartedAt, cpu: n.CPU, threads: n.Pids,
		usage: n.Memory.Usage, maxUsage: n.Memory.MaxUsage, failcnt: n.Memory.Failcnt,
		oomKills: n.Memory.OOMKills, hasKills: n.Memory.HasKills,
		shares: uint64(max(0, c.Limits.CPU))}
	r.cpu.PerCPU = nil
	if c.Limits.Memory > 0 { // else it is the host's memory
		r.limit = n.Memory.Limit
	}
	for i := range n.Memory.Stats {
		r.memory(&n.Memory.Stats[i])
	}
	r.networks = append(r.networks[:0], n.Networks...)
	r.disks = r.disks[:0]
	for i := range n.Blkio.ServiceBytes {
		e := &n.Blkio.ServiceBytes[i]
		add(&r.disk(e).bytes, e)
	}
	for i := range n.Blkio.Serviced {
		e := &n.Blkio.Serviced[i]
		add(&r.disk(e).ops, e)
	}
}

// memory takes one number of memory.stat. cgroup v1 has each with and without the groups below, the
// latter as total_…, which come later. cAdvisor shows those.
func (r *row) memory(s *stats.Stat) {
	switch s.Key {
	case "total_rss":
		r.rss, r.v1 = s.Value, true
	case "anon":
		r.rss = s.Value
	case "file", "total_cache":
		r.cache = s.Value
	case "file_mapped", "total_mapped_file":
		r.mapped = s.Value
	case "total_swap":
		r.swap = s.Value
	case "inactive_file", "total_inactive_file":
		r.inactive = s.Value
	case "pgfault", "total_pgfault":
		r.faults = s.Value
	case "pgmajfault", "total_pgmajfault":
		r.bigFaults = s.Value
	}
}

// disk returns the row's part for e's device.
func (r *row) disk(e *stats.BlkioEntry) *disk {
	d := device{e.Major, e.Minor}
	for i := range r.disks {
		if r.disks[i].device == d {
			return &r.disks[i]
		}
	}
	r.disks = append(r.disks, disk{device: d})
	return &r.disks[len(r.disks)-1]
}

// add adds a read or a write; v1 has sums and parts too, which are neither.
func add(to *[2]uint64, e *stats.BlkioEntry) {
	switch e.Op {
	case "Read", "read":
		to[0] += e.Value
	case "Write", "write":
		to[1] += e.Value
	}
}

// deviceName returns the device's place, as "/dev/sda", or its numbers.
func (p *page) deviceName(d device) string {
	name, ok := p.devices[d]
	if !ok {
		name = fmt.Sprintf("%d:%d", d.major, d.minor)
		if link, err := os.Readlink(filepath.Join(p.block, name)); err == nil {
			name = "/dev/" + filepath.Base(link)
		}
		if len(p.devices) > 1024 { // devices come and go
			clear(p.devices)
		}
		p.devices[d] = name
	}
	return name
}

// writeTo writes the page: the families one after the other, as the format wants.
func (p *page) writeTo(w io.Writer) error {
	out := p.out[:0]
	for i := range families {
		f := &families[i]
		out = fmt.Appendf(out, "# HELP %s %s\n# TYPE %s %s\n", f.name, f.help, f.name,
			f.kind)
		for j := range p.rows {
			out = f.lines(out, p, f, &p.rows[j])
			if len(out) >= writeSize {
				if _, err := w.Write(out); err != nil {
					return err
				}
				out = out[:0]
			}
		}
	}
	p.out = out
	_, err := w.Write(out)
	return err
}
