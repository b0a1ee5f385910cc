package top

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"metad/pkg/admin"
	"metad/pkg/doctor"
)

// key is what the terminal sends for a key.
func key(name string) tea.KeyPressMsg {
	switch code, ok := map[string]rune{"enter": tea.KeyEnter, "esc": tea.KeyEscape,
		"up": tea.KeyUp, "down": tea.KeyDown, "home": tea.KeyHome, "end": tea.KeyEnd,
		"pgup": tea.KeyPgUp, "pgdown": tea.KeyPgDown, "backspace": tea.KeyBackspace,
		"left": tea.KeyLeft}[name]; {
	case ok:
		return tea.KeyPressMsg{Code: code}
	case name == "ctrl+c":
		return tea.KeyPressMsg{Code: 'c', Mod: tea.ModCtrl}
	case name == "space":
		return tea.KeyPressMsg{Code: tea.KeySpace, Text: " "}
	}
	return tea.KeyPressMsg{Code: []rune(name)[0], Text: name}
}

// driver drives a model without a terminal.
type driver struct {
	*model
	t   *testing.T
	cmd tea.Cmd // of the last message
}

func drive(t *testing.T, s Source, snapshots ...*Snapshot) *driver {
	d := &driver{model: newModel(t.Context(), Config{Source: s, Every: time.Hour,
		Printable: clean}), t: t}
	d.send(tea.WindowSizeMsg{Width: 120, Height: 24})
	for _, s := range snapshots {
		d.send(snapshotMsg{Snapshot: s})
	}
	return d
}

func (d *driver) send(msgs ...tea.Msg) {
	for _, msg := range msgs {
		_, d.cmd = d.Update(msg)
	}
}

func (d *driver) press(names ...string) {
	for _, n := range names {
		d.send(key(n))
	}
}

// text is what is on the screen, without colours.
func (d *driver) text() string { return ansi.Strip(d.View().Content) }

// shows fails the test if the screen lacks something.
func (d *driver) shows(when string, want ...string) {
	d.t.Helper()
	for _, w := range want {
		if !strings.Contains(d.text(), w) {
			d.t.Errorf("%s: %q is not on the screen:\n%s", when, w, d.text())
		}
	}
}

func (d *driver) hides(when, unwanted string) {
	d.t.Helper()
	if strings.Contains(d.text(), unwanted) {
		d.t.Errorf("%s: %q is on the screen:\n%s", when, unwanted, d.text())
	}
}

// names are the rows' in their order.
func (d *driver) names() string {
	var all []string
	for _, e := range d.rows {
		all = append(all, e.name)
	}
	return strings.Join(all, " ")
}

// three are made-up tasks, each of which uses most of something.
func three(at int) []admin.Task {
	return []admin.Task{
		single("alpha", uint64(at), used{at: at, cpu: 50, memory: 100, received: at}),
		single("beta", uint64(3*at), used{at: at, cpu: 10, memory: 300, sent: 2 * at}),
		single("gamma", uint64(2*at), used{at: at, cpu: 90, memory: 200, written: at}),
	}
}

// Each key sorts by its column, the same key again turns the order around, and the head shows it.
func TestSort(t *testing.T) {
	d := drive(t, nil, snapshot(0, three(0)...), snapshot(1, three(1)...))
	f := func(key, want, head string) {
		t.Helper()
		d.press(key)
		if got := d.names(); got != want {
			t.Errorf("%s: got %s, want %s", key, got, want)
		}
		d.shows(key, head)
	}
	if got, want := d.names(), "gamma alpha beta"; got != want {
		t.Errorf("at the start: got %s, want %s", got, want)
	}
	f("m", "beta gamma alpha", "MEMORY▼")
	f("m", "alpha gamma beta", "MEMORY▲")
	f("n", "beta alpha gamma", "RX/S▼")
	f("d", "gamma alpha beta", "WRITE/S▼")
	f("r", "beta gamma alpha", "CONN/S▼")
	f("c", "gamma alpha beta", "CPU %▼")
	f("a", "alpha beta gamma", "CONTAINER▲")
	f("a", "gamma beta alpha", "CONTAINER▼")
}

// The filter takes part of a name, an id or an address, letters of either case, and can be taken
// back; no other key works while it is typed.
func TestFilter(t *testing.T) {
	d := drive(t, nil, snapshot(0, three(0)...))
	f := func(want string, keys ...string) {
		t.Helper()
		d.press(keys...)
		if got := d.names(); got != want {
			t.Errorf("%v: got %q, want %q", keys, got, want)
		}
	}
	f("gamma", "/", "M", "m")
	d.shows("typing", "filter: Mm")
	f("alpha", "backspace", "backspace", "p")
	f("alpha", "enter", "m") // which sorts now
	f("beta gamma alpha", "esc")
	f("beta gamma alpha", "/", "1", "7", "2", ".")
	f("gamma", "esc", "/", "id-G")
	f("", "esc", "/", "q", "space")
	if d.cmd != nil {
		t.Error("a letter of the filter is a key")
	}
	d.press("backspace", "backspace", "backspace")
	f("", strings.Split(strings.Repeat("a", 200), "")...)
	if got := len(d.view.filter); got != longest {
		t.Errorf("got a filter of %d bytes, want %d at most", got, longest)
	}
}

// The bar follows its row, wherever the order leads it, and stays near when the row is gone.
func TestBarFollowsItsRow(t *testing.T) {
	d := drive(t, nil, snapshot(0, three(0)...))
	f := func(want string) {
		t.Helper()
		if got := d.rows[d.at].name; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	d.press("down")
	f("alpha")
	d.press("m")
	f("alpha")
	d.send(snapshotMsg{Snapshot: snapshot(1, three(1)[1:]...)}) // it was the last one
	f("gamma")
	d.send(snapshotMsg{Snapshot: snapshot(2)})
	d.press("down", "up", "end", "enter", "pgup")
	d.shows("without containers", "no container")
	d.send(snapshotMsg{Snapshot: snapshot(3, three(3)...)})
	d.press("end", "down")
	f("alpha")
	d.press("home", "up")
	f("beta")
}

// A list that is longer than the screen is scrolled so that the bar is on it.
func TestScroll(t *testing.T) {
	var tasks []admin.Task
	for i := range 100 {
		tasks = append(tasks, single(fmt.Sprintf("c%02d", i), 0, used{}))
	}
	d := drive(t, nil, snapshot(0, tasks...))
	d.press("a")
	d.shows("at the start", "c00", "c19")
	d.hides("at the start", "c20")
	d.press("pgdown")
	d.shows("a page further", "c20")
	d.press("end")
	d.shows("at the end", "c99", "c80")
	d.send(tea.WindowSizeMsg{Width: 40, Height: 5})
	d.shows("after a resize", "c99")
	d.hides("after a resize", "c95")
	d.press("/", "c", "0", "1", "enter")
	if got := d.names(); got != "c01" || d.first != 0 {
		t.Errorf("got %q from row %d", got, d.first)
	}
	d.shows("filtered", "c01")
}

// Tasks are the sum of their containers; enter leads to those, and esc to all.
func TestTasks(t *testing.T) {
	tasks := three(0)
	tasks[0].Containers = append(tasks[0].Containers, admin.Container{ID: "s", Name: "sidecar",
		Stats: used{cpu: 100}.stats()})
	d := drive(t, nil, snapshot(0, tasks...))
	d.press("t")
	d.shows("tasks", "TASK", "alpha task-alp (2)", "150.0")
	if got, want := d.names(), "alpha gamma beta"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	d.press("home", "enter")
	if got, want := d.names(), "sidecar alpha"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	d.shows("one task", "task task-alpha")
	d.press("esc")
	if got := len(d.rows); got != 4 {
		t.Errorf("got %d rows, want all", got)
	}
}

// A container that is looked at is shown with its addresses, its way and its document. An answer
// that comes late, for another one, is not shown for it.
func TestLook(t *testing.T) {
	s := &source{look: &Look{Steps: doctor.Report{{Name: "port", Found: "hooked"}, {Name: "map",
		Status: doctor.Fail, Found: "no entry", Do: "see the log"}},
		Document: json.RawMessage(`{"DockerId":"id-gamma"}`)}}
	d := drive(t, s, snapshot(0, three(0)...))
	d.press("enter")
	late := d.cmd
	d.shows("at once", "id-gamma", "172.17.0.2", "connections",
		"from the container to its answer")
	d.press("esc", "down", "enter")
	if d.cmd != nil {
		t.Error("a second question while the first is under way")
	}
	d.send(late())
	d.hides("late", "hooked")
	if d.cmd == nil {
		t.Fatal("the container that is open is not asked about")
	}
	d.send(tea.WindowSizeMsg{Width: 100, Height: 40}, d.cmdMsg())
	d.shows("answered", "id-alpha", "ok   port        hooked", "fail map         no entry",
		"→ see the log", `"DockerId": "id-gamma"`)
	d.send(tea.WindowSizeMsg{Width: 100, Height: 10})
	d.hides("short", "DockerId")
	d.press("end")
	d.shows("the end of it", `"DockerId": "id-gamma"`)
	d.press("up", "home")
	d.shows("the start again", "container  id-alpha")
	s.err = errors.New("no metad")
	d.send(snapshotMsg{err: s.err})
	d.shows("away", "numbers of 03:04:05: no metad")
	d.send(snapshotMsg{Snapshot: snapshot(1)})
	d.shows("gone", "container id-alpha is gone")
	d.press("esc")
	d.shows("back", "no container")
}

// cmdMsg is the message of the last command.
func (d *driver) cmdMsg() tea.Msg { return d.cmd() }

// A source that goes away leaves the last numbers, with their time and the reason, and the keys
// work; when it is back, so are its numbers.
func TestSourceGoesAway(t *testing.T) {
	s := &source{err: errors.New("is metad running? dial \x1b[2J")}
	d := drive(t, s)
	d.shows("before the first answer", "asking metad")
	d.send(d.Init()())
	d.shows("no metad", "is metad running? dial ^[2J")
	if d.cmd == nil {
		t.Error("it does not ask again")
	}
	d.send(snapshotMsg{Snapshot: snapshot(0, three(0)...)})
	d.hides("there", "is metad running?")
	d.send(tickMsg{}, d.ask())
	d.shows("away", "numbers of 03:04:05: is metad running?", "alpha", "gamma")
	d.press("a", "down")
	if got := d.rows[d.at].name; got != "beta" {
		t.Errorf("got the bar on %s, want beta", got)
	}
	s.err, s.snapshots = nil, []*Snapshot{snapshot(9, three(9)[1:]...)}
	d.send(tickMsg{}, d.ask())
	d.hides("back", "is metad running?")
	d.hides("back", "alpha")
}

// While a source hangs, keys work and it is not asked again; the question ends with the program.
func TestSourceHangs(t *testing.T) {
	s := &source{hang: true}
	ctx, cancel := context.WithCancel(t.Context())
	d := &driver{model: newModel(ctx, Config{Source: s, Printable: clean}), t: t}
	answer := make(chan tea.Msg)
	go func() { answer <- d.Init()() }()
	for _, k := range []string{"a", "down", "/", "x", "esc", "t", "enter", "space", "space"} {
		if d.press(k); d.cmd != nil {
			t.Errorf("%s: asks again", k)
		}
	}
	if d.press("q"); d.cmd == nil {
		t.Error("q does not end it")
	}
	cancel()
	if m, ok := (<-answer).(snapshotMsg); !ok || m.err == nil {
		t.Errorf("got %v, want an error", m)
	}
}

// A pause keeps the numbers, and the end of it asks at once.
func TestPause(t *testing.T) {
	d := drive(t, &source{}, snapshot(0, three(0)...))
	d.press("space")
	d.shows("paused", "paused at 03:04:05")
	if d.send(tickMsg{}); d.cmd != nil {
		t.Error("it asks while it is paused")
	}
	if d.press("space"); d.cmd == nil {
		t.Error("it does not ask after the pause")
	}
	d.hides("after the pause", "paused")
	if d.press("space", "space"); d.cmd != nil {
		t.Error("it asks twice at a time")
	}
	for _, k := range []string{"q", "ctrl+c"} {
		d.press(k)
		if _, ok := d.cmd().(tea.QuitMsg); !ok {
			t.Errorf("%s does not end it", k)
		}
	}
}

// On a screen of any size each state fits, and the keys are shown where there is room.
func TestEverySize(t *testing.T) {
	s := &source{look: &Look{Steps: doctor.Report{{Name: "n", Found: strings.Repeat("字", 99)}}}}
	tasks := three(0)
	tasks[1].Containers[0].Name = strings.Repeat("名", 60)
	states := map[string][]string{"list": nil, "tasks": {"t"}, "typing": {"/", "a"},
		"container": {"enter"}, "end": {"end"}, "by name": {"a"}}
	for name, keys := range states {
		d := drive(t, s, snapshot(0, tasks...))
		d.press(keys...)
		if d.open != "" {
			d.send(d.cmd())
		}
		d.shows(name, "q quit")
		for width := range 130 {
			for _, height := range []int{0, 1, 2, 3, 4, 7, 8, 9, 30} {
				d.send(tea.WindowSizeMsg{Width: width, Height: height})
				lines := d.screen()
				if len(lines) > height {
					t.Fatalf("%s, %d×%d: got %d lines", name, width, height,
						len(lines))
				}
				for _, l := range lines {
					if w := ansi.StringWidth(l); w > width {
						t.Fatalf("%s, %d×%d: got %d columns: %q", name,
							width, height, w, l)
					}
				}
			}
		}
		d.send(tea.WindowSizeMsg{Width: 30, Height: 1})
		if len(keys) == 0 && !strings.Contains(d.text(), "gamma") {
			t.Errorf("%s, one line: got %q, want the row with the bar", name, d.text())
		}
	}
}

// sgr is the only sequence that the screen has: colours and the like.
var sgr = regexp.MustCompile(`\x1b\[[0-9;]*m`)

// Whatever containers are called, and whatever is said about them, nothing of it reaches the
// terminal but printable text.
func TestHostileText(t *testing.T) {
	const evil = "\x1b]0;owned\x07\x1b[2J\u009b31m\r\nx\x00\x7f\x1b[31m"
	task := single(evil, 0, used{})
	task.Revision, task.Status, task.Containers[0].Type = evil, evil, evil
	task.Containers[0].Status, task.Endpoints[0].MAC = evil, evil
	task.Endpoints[0].Address = evil
	doc, err := json.Marshal(map[string]string{"Name": "\x1b[2J\u009b", "\u009b": "x"})
	if err != nil {
		t.Fatal(err)
	}
	s := &source{look: &Look{Steps: doctor.Report{{Name: evil, Found: evil, Do: evil},
		{Status: 99}, {Status: -1}}, Document: doc}}
	first := snapshot(0, task)
	first.Tasks.Version = evil
	d := drive(t, s, first)
	d.send(tea.WindowSizeMsg{Width: 300, Height: 60})
	f := func(what string) {
		t.Helper()
		for _, r := range sgr.ReplaceAllString(d.View().Content, "") {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%s: got %q", what, r)
			}
		}
	}
	f("list")
	d.press("t")
	f("tasks")
	d.press("enter")
	f("one task")
	d.press("/", "\x1b", "\u009b")
	f("filter")
	d.press("esc", "esc", "enter")
	d.send(d.cmd())
	d.shows("container", "→ ", "Name")
	f("container")
	d.send(lookMsg{id: d.open, err: errors.New(evil)}, snapshotMsg{err: errors.New(evil)})
	f("errors")
}
