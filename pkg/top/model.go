package top

import (
	"context"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"
)

// model is the state of the screen. Bubble Tea calls its methods one at a time.
type model struct {
	ctx           context.Context
	cfg           Config
	width, height int

	history *history
	err     error // of the last question; the numbers are older then

	view    view
	byTask  bool
	typing  bool // a filter
	rows    []*entry
	chosen  string // the key of the row that the bar is on
	at      int    // its place
	first   int    // the first row on the screen
	paused  bool
	pending bool // a question is under way, or a time is waited for

	open    string // the container that is looked at; "": none
	look    *Look  // of it; nil: not there yet
	lookErr error
	looking bool
	scroll  int
}

func newModel(ctx context.Context, cfg Config) *model {
	return &model{ctx: ctx, cfg: cfg, history: newHistory(), pending: true}
}

// What the model is told beside keys and sizes.
type (
	snapshotMsg struct {
		*Snapshot
		err error
	}
	lookMsg struct {
		id   string
		look *Look
		err  error
	}
	tickMsg struct{}
)

// Init implements tea.Model.
func (m *model) Init() tea.Cmd { return m.ask }

// ask asks the source for a snapshot.
func (m *model) ask() tea.Msg {
	ctx, cancel := context.WithTimeout(m.ctx, patience)
	defer cancel()
	s, err := m.cfg.Source.Snapshot(ctx)
	return snapshotMsg{s, err}
}

// lookAt asks for what there is to say about the open container, if that question is not under
// way.
func (m *model) lookAt() tea.Cmd {
	if m.open == "" || m.looking {
		return nil
	}
	m.looking = true
	id := m.open
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.ctx, patience)
		defer cancel()
		l, err := m.cfg.Source.Look(ctx, id)
		return lookMsg{id, l, err}
	}
}

// Update implements tea.Model.
func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	var cmd tea.Cmd
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case snapshotMsg:
		if m.err = msg.err; m.err == nil {
			m.history.add(msg.Snapshot)
		}
		cmd = tea.Batch(m.lookAt(), tea.Tick(m.cfg.Every, func(time.Time) tea.Msg {
			return tickMsg{}
		}))
	case tickMsg:
		m.pending = !m.paused
		if m.pending {
			cmd = m.ask
		}
	case lookMsg:
		m.looking = false
		if msg.id == m.open {
			m.look, m.lookErr = msg.look, msg.err
		} else {
			cmd = m.lookAt()
		}
	case tea.KeyPressMsg:
		cmd = m.press(msg)
	}
	m.arrange()
	return m, cmd
}

// press takes a key.
func (m *model) press(k tea.KeyPressMsg) tea.Cmd {
	switch key := k.String(); {
	case key == "ctrl+c":
		return tea.Quit
	case m.typing:
		m.typed(key, k.Text)
		return nil
	case key == "q":
		return tea.Quit
	case key == "space":
		return m.pause()
	case m.open != "":
		m.pressOpen(key)
		return nil
	default:
		return m.pressList(key)
	}
}

// longest is how many bytes a filter may have.
const longest = 64

// typed takes a key while a filter is typed.
func (m *model) typed(key, text string) {
	switch key {
	case "enter":
		m.typing = false
	case "esc":
		m.typing, m.view.filter = false, ""
	case "backspace":
		_, size := utf8.DecodeLastRuneInString(m.view.filter)
		m.view.filter = m.view.filter[:len(m.view.filter)-size]
	default:
		if len(m.view.filter)+len(text) <= longest {
			m.view.filter += text
		}
	}
}

// pause stops asking, or begins again.
func (m *model) pause() tea.Cmd {
	m.paused = !m.paused
	if m.paused || m.pending {
		return nil
	}
	m.pending = true
	return m.ask
}

// pressOpen takes a key while a container is looked at.
func (m *model) pressOpen(key string) {
	switch key {
	case "esc", "left", "h", "backspace":
		m.open, m.look, m.lookErr = "", nil, nil
	default:
		m.scroll, _ = moved(m.scroll, key, m.height)
	}
}

// pressList takes a key while the list is shown.
func (m *model) pressList(key string) tea.Cmd {
	if at, ok := moved(m.at, key, m.height); ok {
		m.at = max(0, min(at, len(m.rows)-1))
		m.chosen = ""
		if len(m.rows) > 0 {
			m.chosen = m.rows[m.at].key()
		}
		return nil
	}
	switch key {
	case "/":
		m.typing = true
	case "esc":
		m.view.filter, m.view.onlyTask = "", ""
	case "t":
		m.byTask, m.view.onlyTask = !m.byTask, ""
	case "enter", "right", "l":
		return m.enter()
	case "a":
		m.sort(byName)
	default:
		if i := slices.IndexFunc(metrics,
			func(o metric) bool { return o.key == key }); i >= 0 {
			m.sort(i)
		}
	}
	return nil
}

// sort sorts by order; the same one again turns it around.
func (m *model) sort(order int) {
	m.view.reverse = m.view.order == order && !m.view.reverse
	m.view.order = order
}

// moved returns where a key leads from at, and whether it leads anywhere. The caller knows the end.
func moved(at int, key string, page int) (int, bool) {
	const far = 1 << 30
	switch key {
	case "up", "k":
		return max(0, at-1), true
	case "down", "j":
		return at + 1, true
	case "pgup":
		return max(0, at-max(1, page-frame)), true
	case "pgdown":
		return at + max(1, page-frame), true
	case "home", "g":
		return 0, true
	case "end", "G":
		return far, true
	}
	return at, false
}

// enter shows the containers of the chosen task, or looks at the chosen container.
func (m *model) enter() tea.Cmd {
	if len(m.rows) == 0 {
		return nil
	}
	e := m.rows[m.at]
	if e.container == nil {
		m.byTask, m.view.onlyTask, m.view.filter = false, e.task.ID, ""
		return nil
	}
	m.open, m.look, m.lookErr, m.scroll = e.container.ID, nil, nil, 0
	return m.lookAt()
}

// arrange brings what is shown up to date. The bar stays on its row wherever that goes.
func (m *model) arrange() {
	all := m.history.containers
	if m.byTask {
		all = m.history.tasks
	}
	m.rows = arrange(all, m.view)
	if i := slices.IndexFunc(m.rows,
		func(e *entry) bool { return e.key() == m.chosen }); i >= 0 {
		m.at = i
	}
	m.at = max(0, min(m.at, len(m.rows)-1))
	visible := max(1, m.height-m.overhead())
	m.first = max(0, min(m.first, m.at, len(m.rows)-visible))
	m.first = max(m.first, m.at-visible+1)
}

// title says which rows there are.
func (m *model) title() string {
	var parts []string
	if m.view.onlyTask != "" {
		parts = append(parts, "task "+m.view.onlyTask)
	}
	if m.typing || m.view.filter != "" {
		parts = append(parts, "filter: "+m.view.filter)
	}
	return strings.Join(parts, "  ")
}
