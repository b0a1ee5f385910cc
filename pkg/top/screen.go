package top

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"metad/pkg/doctor"
)

// frame is how many lines of the screen are not rows, if there is room for all of them: what the
// host does, what is shown, the columns' heads, the keys.
const frame = 4

// overhead is frame on a screen as high as this one.
func (m *model) overhead() int {
	switch {
	case m.height >= 8:
		return frame
	case m.height >= 3:
		return 1 // the heads
	}
	return 0
}

var (
	bold   = ansi.Style{}.Bold()
	faint  = ansi.Style{}.Faint()
	barred = ansi.Style{}.Reverse(true)
	blue   = ansi.Style{}.ForegroundColor(ansi.Cyan)
	green  = ansi.Style{}.ForegroundColor(ansi.Green)
	yellow = ansi.Style{}.ForegroundColor(ansi.Yellow)
	red    = ansi.Style{}.ForegroundColor(ansi.Red)
)

// View implements tea.Model.
func (m *model) View() tea.View {
	v := tea.NewView(strings.Join(m.screen(), "\n"))
	v.AltScreen = true
	v.WindowTitle = "metad top"
	return v
}

// screen returns the screen's lines: as many as it is high at most, none wider than it.
func (m *model) screen() []string {
	var all []string
	if m.open == "" {
		all = m.list()
	} else {
		all = m.detail()
	}
	all = all[:max(0, min(len(all), m.height))]
	for i := range all {
		all[i] = ansi.Truncate(all[i], max(0, m.width), "")
	}
	return all
}

// list is the screen with the rows.
func (m *model) list() []string {
	over := m.overhead()
	var all []string
	if over == frame {
		all = append(all, m.host(), m.status())
	}
	if over > 0 {
		all = append(all, bold.Styled(m.heads()))
	}
	visible := max(1, m.height-over)
	for i := m.first; i < min(len(m.rows), m.first+visible); i++ {
		all = append(all, m.row(m.rows[i], i == m.at))
	}
	if len(m.rows) == 0 && m.history.snapshots > 0 {
		all = append(all, faint.Styled("no container"))
	}
	return m.withKeys(all, "↑↓ choose  enter look  / filter  c m n d r a sort  t tasks  "+
		"space pause  q quit")
}

// withKeys puts the keys into the last line, if there is a frame.
func (m *model) withKeys(all []string, keys string) []string {
	if m.overhead() < frame {
		return all
	}
	all = all[:min(len(all), m.height-1)]
	for len(all) < m.height-1 {
		all = append(all, "")
	}
	return append(all, faint.Styled(keys))
}

// host says what the whole host does.
func (m *model) host() string {
	h := m.history
	var sum usage
	running := 0
	for _, e := range h.containers {
		if e.sampled {
			running++
			sum[cpu] += e.now[cpu]
			sum[memory] += e.now[memory]
		}
	}
	return fmt.Sprintf("%s  %d tasks  %d containers  CPU %.1f %%  memory %s  requests %s/s  "+
		"refused packets %s/s", bold.Styled("metad "+m.cfg.Printable(h.version)),
		len(h.tasks),
		running, sum[cpu], size(sum[memory]), count(h.requests.perSecond),
		count(h.refused.perSecond))
}

// status says what is wrong, or what is shown.
func (m *model) status() string {
	switch {
	case m.err != nil && m.history.snapshots == 0:
		return red.Styled(m.cfg.Printable(m.err.Error()))
	case m.err != nil:
		return red.Styled(fmt.Sprintf("numbers of %s: %s",
			m.history.at.Format(time.TimeOnly), m.cfg.Printable(m.err.Error())))
	case m.history.snapshots == 0:
		return faint.Styled("asking metad")
	}
	text := m.cfg.Printable(m.title())
	if m.typing {
		text += "▏"
	}
	if m.paused {
		text += yellow.Styled("  paused at " + m.history.at.Format(time.TimeOnly))
	}
	return text
}

// column is one of the list's, all to the right of the name.
type column struct {
	head   string
	metric int // that sorts by it
	text   func(e *entry) string
}

const (
	cell   = 8  // width of a column
	sparks = 16 // width of the sparkline
	least  = 12 // width that the name has at least
	most   = 48
)

var columns = []column{
	{"CPU %", 0, func(e *entry) string { return fmt.Sprintf("%.1f", e.now[cpu]) }},
	{"MEMORY", 1, func(e *entry) string { return size(e.now[memory]) }},
	{"MEM %", 1, func(e *entry) string {
		if e.limit == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f", 100*e.now[memory]/e.limit)
	}},
	{"RX/S", 2, func(e *entry) string { return size(e.now[received]) }},
	{"TX/S", 2, func(e *entry) string { return size(e.now[sent]) }},
	{"READ/S", 3, func(e *entry) string { return size(e.now[read]) }},
	{"WRITE/S", 3, func(e *entry) string { return size(e.now[written]) }},
	{"CONN/S", 4, func(e *entry) string {
		if !e.hasConns {
			return "-" // it has no address of its own
		}
		return count(e.now[connections])
	}},
}

// layout returns the width of the name, and how many columns there is room for. The sparkline takes
// the place of the last columns, if some are left.
func (m *model) layout() (name, n int, spark bool) {
	room := m.width - least
	if spark = room > sparks+4*(cell+1); spark {
		room -= sparks + 1
	}
	n = max(0, min(len(columns), room/(cell+1)))
	room -= n * (cell + 1)
	return min(most, least+max(0, room)), n, spark
}

// shown is the metric that the sparklines show.
func (m *model) shown() *metric {
	if m.view.order < len(metrics) {
		return &metrics[m.view.order]
	}
	return &metrics[0]
}

func (m *model) heads() string {
	width, n, spark := m.layout()
	name := "CONTAINER"
	if m.byTask {
		name = "TASK"
	}
	if m.view.order == byName {
		name += m.arrow()
	}
	b := new(strings.Builder)
	b.WriteString(fit(name, width))
	for _, c := range columns[:n] {
		head := c.head
		if c.metric == m.view.order {
			head += m.arrow()
		}
		fmt.Fprintf(b, " %s", fitRight(head, cell))
	}
	if spark {
		b.WriteString(" " + fit(m.shown().name, sparks))
	}
	return b.String()
}

func (m *model) arrow() string {
	if m.view.reverse != (m.view.order == byName) {
		return "▲"
	}
	return "▼"
}

// label is the name that a row has: a container's with its task's.
func (m *model) label(e *entry) string {
	if e.container == nil {
		return fmt.Sprintf("%s %.8s (%d)", e.name, e.task.ID, e.inTask)
	}
	if e.task.Family == e.name || e.task.Family == "" {
		return e.name
	}
	return fmt.Sprintf("%s  %s %.8s", e.name, e.task.Family, e.task.ID)
}

// row is one line of the list.
func (m *model) row(e *entry, chosen bool) string {
	width, n, spark := m.layout()
	b := new(strings.Builder)
	b.WriteString(fit(m.cfg.Printable(m.label(e)), width))
	for _, c := range columns[:n] {
		text := "-"
		if e.sampled || c.metric == 4 {
			text = c.text(e)
		}
		b.WriteString(" " + fitRight(text, cell))
	}
	line := b.String()
	if spark {
		chart := m.shown().sparkline(e.points, sparks)
		if !chosen {
			chart = blue.Styled(chart)
		}
		line += " " + chart
	}
	switch {
	case chosen:
		return barred.Styled(line)
	case !e.sampled:
		return faint.Styled(line)
	case e.limit > 0 && e.now[memory] > 0.9*e.limit:
		return red.Styled(line)
	}
	return line
}

// detail is the screen with one container.
func (m *model) detail() []string {
	all := m.page()
	visible := max(1, m.height-1)
	m.scroll = max(0, min(m.scroll, len(all)-visible))
	all = all[m.scroll:]
	return m.withKeys(all, "↑↓ scroll  esc back  space pause  q quit")
}

// page is all lines about the open container.
func (m *model) page() (all []string) {
	show := m.cfg.Printable
	e := m.history.containers[m.open]
	if e == nil {
		return []string{bold.Styled(fmt.Sprintf("container %.12s is gone", show(m.open)))}
	}
	if m.err != nil {
		all = append(all, m.status())
	}
	t, c := e.task, e.container
	all = append(all, bold.Styled(show(e.name))+"  "+show(c.Status)+"  "+show(c.Type),
		"container  "+show(c.ID), "task       "+show(t.ID)+"  "+show(t.Family)+":"+
			show(t.Revision)+"  "+show(t.Status), "           "+show(t.ARN))
	for _, ep := range t.Endpoints {
		if ep.Container == "" || ep.Container == c.ID || len(t.Endpoints) == 1 {
			all = append(all, fmt.Sprintf("address    %s  MAC %s  device %d",
				show(ep.Address),
				show(ep.MAC), ep.Ifindex))
		}
	}
	all = append(append(all, ""), m.charts(e)...)
	all = append(all, "", bold.Styled("from the container to its answer"))
	if m.lookErr != nil {
		all = append(all, red.Styled(show(m.lookErr.Error())))
	}
	if m.look == nil {
		return all
	}
	for _, s := range m.look.Steps {
		all = append(all, step(s, show)...)
	}
	return append(all, document(m.look.Document, show)...)
}

// charts has a line for each number.
func (m *model) charts(e *entry) (all []string) {
	memoryText := size(e.now[memory])
	if e.limit > 0 {
		memoryText += " of " + size(e.limit)
	}
	for k, c := range [kinds]struct{ name, text string }{
		{"CPU", fmt.Sprintf("%.1f %%", e.now[cpu])},
		{"memory", memoryText},
		{"received", size(e.now[received]) + "/s"},
		{"sent", size(e.now[sent]) + "/s"},
		{"read", size(e.now[read]) + "/s"},
		{"written", size(e.now[written]) + "/s"},
		{"connections", count(e.now[connections]) + "/s"},
	} {
		one := metric{of: []int{k}, floor: 1}
		const before = 32
		all = append(all, fit(c.name, 12)+fit(c.text, before-12)+
			blue.Styled(one.sparkline(e.points, max(1, min(kept, m.width-before)))))
	}
	return all
}

// step is a finding and, under it, what to do.
func step(s doctor.Check, show func(string) string) []string {
	status := max(doctor.OK, min(s.Status, doctor.Fail))
	style := [...]ansi.Style{green, yellow, red}[status]
	lines := []string{style.Styled(fit(status.String(), 5)) + fit(show(s.Name), 12) +
		show(s.Found)}
	if s.Do != "" {
		lines = append(lines, fit("", 17)+"→ "+show(s.Do))
	}
	return lines
}

func document(doc json.RawMessage, show func(string) string) []string {
	var b bytes.Buffer
	if doc == nil || json.Indent(&b, doc, "", "  ") != nil {
		return nil
	}
	all := []string{"", bold.Styled("its document, /v4")}
	for line := range strings.Lines(b.String()) {
		all = append(all, show(strings.TrimSuffix(line, "\n")))
	}
	return all
}
