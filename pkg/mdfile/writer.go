package mdfile

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// Config says where the files are.
type Config struct {
	// DataDir is the absolute path of the data directory as metad sees it. It is made if it
	// does not exist. "" means that of Layout.
	DataDir string
	// Layout makes the paths that the Docker Engine and the containers see. Its DataDir differs
	// from the one above if metad runs in a container. "" means /var/lib/ecs/data.
	Layout Layout
}

// withDefaults returns c with every empty field set, or an error that names the first bad field.
func (c Config) withDefaults() (Config, error) {
	l := &c.Layout
	l.DataDir = cmp.Or(l.DataDir, DefaultDataDir(l.Platform, os.Getenv("ProgramData")))
	c.DataDir = cmp.Or(c.DataDir, l.DataDir)
	switch {
	case !filepath.IsAbs(l.DataDir):
		return c, fmt.Errorf("Layout.DataDir %q: not an absolute path", l.DataDir)
	case !filepath.IsAbs(c.DataDir):
		return c, fmt.Errorf("DataDir %q: not an absolute path", c.DataDir)
	case l.Platform != Linux:
	case strings.Contains(l.DataDir, ":"):
		return c, fmt.Errorf("Layout.DataDir %q: a ':' cannot stand in a bind mount",
			l.DataDir)
	default:
		l.DataDir = path.Clean(l.DataDir) // as the Engine shows it in mounts
	}
	return c, nil
}

// grace is how long a directory may have no container before Sweep removes it. During a takeover
// the predecessor may still be creating containers.
const grace = time.Minute

// Writer keeps the files. All methods are safe for concurrent use.
type Writer struct {
	cfg Config
	log *zap.Logger
	now func() time.Time

	mu      sync.Mutex // guards what follows, and the directories on disk
	disk    tree       // of Layout.Root; open after the first method that could open it
	host    Host
	byDir   map[string]*Entry // every directory of metad's
	byID    map[string]*Entry // the directories whose container is known
	changed bool              // host facts changed since the last Apply
	applied []*task.Task      // by the last Apply
	whole   bool              // what is in applied may need another look

	unusable bool // the root could not be opened the last time
}

// Entry is the directory of one container, from Reserve until its container is gone.
type Entry struct {
	w *Writer

	// The path of the directory on the host, for the Engine; its path in the container; and the
	// path of the file in the container, which is the value of EnvVar.
	HostDir, ContainerDir, File string

	dir string // below the root, with forward slashes; never changes

	// What follows is guarded by w.mu.

	pending bool // between Reserve and what ends it
	made    time.Time
	id      string // "" until created
	alias   string // below the root; "" if there is none
	seen    bool   // the container was in a set given to Apply since metad started
	failed  bool   // the last write failed, and was logged
	task    *task.Task
	ctr     *task.Container
	last    []byte // as last written, but without the time
}

// NewWriter returns a Writer. It does not touch the data directory, which may be slow or not usable
// yet. The first method that needs the directory opens it, and the next one tries again.
func NewWriter(cfg Config, log *zap.Logger) (*Writer, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Writer{cfg: cfg, log: log, now: time.Now, disk: tree{log: log},
		byDir: map[string]*Entry{}, byID: map[string]*Entry{}}, nil
}

// Close releases the data directory. The files stay: containers outlive metad.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.disk.close()
}

// Layout returns the layout the Writer was made with.
func (w *Writer) Layout() Layout { return w.cfg.Layout }

// SetHost sets the facts about the host that the documents have from now on. The next Apply writes
// them into existing files.
func (w *Writer) SetHost(h Host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changed = w.changed || h != w.host
	w.host = h
}

// open opens the root and loads what is there, unless it is open. The log has a line when that
// begins to fail. Needs w.mu.
func (w *Writer) open() error {
	if w.disk.isOpen() {
		return nil
	}
	err := w.disk.open(filepath.Join(w.cfg.DataDir, "metadata"))
	if err != nil && !w.unusable {
		w.log.Warn("metadata directory not usable yet", zap.Error(err))
	}
	w.unusable = err != nil
	if err != nil {
		return err
	}
	dirs, links := w.disk.scan()
	for _, dir := range dirs {
		w.load(dir)
	}
	for alias, dir := range links {
		if e := w.byDir[dir]; e != nil && e.alias == "" {
			e.alias = alias
			continue
		}
		w.disk.unlink(alias)
	}
	return nil
}

// load makes an entry of a directory that is there. Needs w.mu.
func (w *Writer) load(dir string) *Entry {
	e := &Entry{w: w, dir: dir, HostDir: w.cfg.Layout.HostDir(dir), made: w.now()}
	if made := w.disk.modTime(dir); !made.IsZero() {
		e.made = made
	}
	// The metad that is being taken over from may still write a younger one.
	w.disk.removeTemp(dir, grace)
	if doc, err := w.disk.read(dir); err == nil {
		e.id = doc.ContainerID
		e.last = doc.append(nil, time.Time{})
	}
	w.byDir[dir] = e
	if e.id != "" {
		w.byID[e.id] = e
	}
	return e
}

// Reserve makes the directory of a container that is about to be created, and the first version of
// its file. c is what is known of the container: it has no id, and no name if the Engine chooses
// one. t is its task. If t has no ARN, the token names the task's directory. The token is 32
// hexadecimal digits that no other container has.
//
// The directory has the container's name, with a number appended if that is taken. The caller must
// call Created, Abandon or Unsure. If Reserve returns an error, nothing is left on disk.
func (w *Writer) Reserve(t *task.Task, c *task.Container, form Form, token string) (*Entry, error) {
	name := c.Name
	if name == "" {
		name = token[:12]
	}
	if err := CheckName(name); err != nil {
		return nil, fmt.Errorf("container name: %w", err)
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.open(); err != nil {
		return nil, err
	}
	var taskDir string
	var err error
	if t.ARN != "" {
		taskDir, err = TaskDir(t.ARN)
	} else {
		taskDir = path.Join(cmp.Or(safe(t.Cluster), safe(w.host.Cluster), "default"), token)
	}
	if err != nil {
		return nil, err
	}

	l := w.cfg.Layout.In(form)
	e := &Entry{w: w, pending: true, task: t, ctr: c}
	if e.dir, err = w.disk.mkdir(taskDir, name); err != nil {
		return nil, err
	}
	e.HostDir, e.ContainerDir = l.HostDir(e.dir), l.ContainerDir(name, token)
	e.File = l.File(e.ContainerDir)
	if err = w.disk.mark(e.dir); err == nil {
		err = w.write(e, newDocument(t, c, w.host))
	}
	if err != nil {
		w.remove(e)
		return nil, err
	}
	w.byDir[e.dir] = e
	return e, nil
}

// Created is called when the Engine has created the container. It writes the file again, with the
// id. After an error the first version is in place, and the next Apply tries again.
func (e *Entry) Created(id string) error {
	w := e.w
	w.mu.Lock()
	defer w.mu.Unlock()
	e.settle()
	if e.id == id {
		return nil // Apply was faster, and knew more
	}
	c := *e.ctr
	c.ID = id
	e.id, e.ctr = id, &c
	w.byID[id] = e
	w.whole = true // a set may have had it already, when it had no directory that was known
	if !w.disk.isOpen() {
		return fs.ErrClosed
	}
	return w.write(e, newDocument(e.task, e.ctr, w.host))
}

// Abandon removes the directory of a container that was not created.
func (e *Entry) Abandon() {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.w.remove(e)
}

// Unsure is called when the outcome of the creation is not known. The directory stays if Apply or
// Sweep finds the container.
func (e *Entry) Unsure() {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.settle()
}

// settle ends the time in which only the caller of Reserve knows the container. Needs w.mu.
func (e *Entry) settle() {
	e.pending, e.made = false, e.w.now()
}

// Apply writes the files that differ from tasks, the complete current set, ordered by ARN. It
// removes the directory of a container that an earlier set had and this one lacks. A container that
// no set had may be new, or not inspected yet: see Sweep. A container without a directory gets
// none, because Docker mounts nothing into an existing container.
func (w *Writer) Apply(tasks []*task.Task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.open(); err != nil {
		w.whole = true
		return // logged; nothing can be there
	}
	whole := w.changed || w.whole
	if whole {
		w.applied = nil
	}
	var changed []*task.Task
	gone := map[string]bool{}
	for was, is := range task.Diff(w.applied, tasks) {
		if was != nil {
			for _, c := range was.Containers {
				gone[c.ID] = true
			}
		}
		if is != nil {
			changed = append(changed, is)
		}
	}
	w.adopt(changed)
	for _, t := range changed {
		for _, c := range t.Containers {
			delete(gone, c.ID)
			if e := w.byID[c.ID]; e != nil {
				w.update(e, t, c)
			}
		}
	}
	if whole {
		w.addUnlisted(gone, tasks)
	}
	for id := range gone {
		if e := w.byID[id]; e != nil && e.seen {
			w.remove(e)
		}
	}
	w.applied, w.changed, w.whole = tasks, false, false
}

// addUnlisted adds to gone the containers that have a directory and are in none of tasks. Needs
// w.mu.
func (w *Writer) addUnlisted(gone map[string]bool, tasks []*task.Task) {
	for id := range w.byID {
		gone[id] = true
	}
	for _, t := range tasks {
		for _, c := range t.Containers {
			delete(gone, c.ID)
		}
	}
}

// Retry writes the files again whose last write failed, for example because the disk was full.
// Apply does that only for tasks that have changed.
func (w *Writer) Retry() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.byDir {
		if e.failed && w.disk.isOpen() {
			w.update(e, e.task, e.ctr)
		}
	}
}

// Mounted is a container with its bind mounts, for Sweep.
type Mounted struct {
	ID      string
	Sources []string // of its bind mounts, on the host
}

// InDoubt reports whether a directory has had no container in any set given to Apply: metad or the
// request ended too early, or the container was gone before its inspect.
func (w *Writer) InDoubt() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open() != nil {
		return false
	}
	for _, e := range w.byDir {
		if w.doubtful(e, w.now()) {
			return true
		}
	}
	return false
}

// doubtful reports whether e has no container although no creation can be under way. Needs w.mu.
func (w *Writer) doubtful(e *Entry, asked time.Time) bool {
	return !e.seen && !e.pending && asked.Sub(e.made) > grace
}

// Sweep removes the directories in doubt that belong to none of the containers. containers are all
// containers of the Engine, running or not, at the time asked.
func (w *Writer) Sweep(asked time.Time, containers []Mounted) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.disk.isOpen() {
		return
	}
	needed := map[string]bool{}
	for _, c := range containers {
		needed[c.ID] = true
		for _, source := range c.Sources {
			needed[source] = true
		}
	}
	for _, e := range w.byDir {
		if w.doubtful(e, asked) && !needed[e.HostDir] && (e.id == "" || !needed[e.id]) {
			w.log.Info("metadata directory without a container removed",
				zap.String("dir", e.HostDir), zap.String("container", e.id))
			w.remove(e)
		}
	}
}

// adopt finds, by their mounts, the containers of directories whose file names no container. metad
// may have ended before it could write the id, or another metad made the directory. If several
// containers mount it (--volumes-from), it was made for the oldest one. Needs w.mu.
func (w *Writer) adopt(tasks []*task.Task) {
	found := map[*Entry]*task.Container{}
	root := w.cfg.Layout.Root() + "/"
	for _, t := range tasks {
		for _, c := range t.Containers {
			if c.ID == "" || w.byID[c.ID] != nil {
				continue
			}
			for _, v := range c.Volumes {
				dir, ok := strings.CutPrefix(v.Source, root)
				if !ok {
					continue
				}
				e := w.byDir[dir]
				if e == nil && fs.ValidPath(dir) && w.disk.ours(dir) {
					e = w.load(dir)
				}
				if e == nil || e.id != "" {
					continue
				}
				if old := found[e]; old == nil ||
					c.CreatedAt.Before(old.CreatedAt) {
					found[e] = c
				}
			}
		}
	}
	for e, c := range found {
		e.id = c.ID
		w.byID[c.ID] = e
	}
}

// update writes e's file if its contents changed. Needs w.mu.
func (w *Writer) update(e *Entry, t *task.Task, c *task.Container) {
	if e.seen && e.task == t && !e.failed && !w.changed {
		return
	}
	e.seen, e.task, e.ctr = true, t, c
	w.link(e)
	err := w.write(e, newDocument(t, c, w.host))
	if err != nil && !e.failed {
		w.log.Warn("metadata file not written", zap.String("dir", e.HostDir),
			zap.String("container", c.ID), zap.Error(err))
	}
	e.failed = err != nil
}

// link makes e's directory available under its task's id and its container's name. The directory
// itself may be elsewhere: when it was made, the id may not have been known, or the name may have
// been taken, or the name changed later. Then a link is made. Needs w.mu.
func (w *Writer) link(e *Entry) {
	alias := ""
	if dir, err := TaskDir(e.task.ARN); err == nil && CheckName(e.ctr.Name) == nil {
		alias = path.Join(dir, e.ctr.Name)
	}
	if alias == e.dir {
		alias = ""
	}
	if alias == e.alias {
		return
	}
	w.unlink(e)
	if alias == "" {
		return
	}
	// It fails if another container of the task has the name, or if the disk is full.
	if w.disk.link(e.dir, alias) == nil {
		e.alias = alias
	}
}

// unlink removes the link that link made. Needs w.mu.
func (w *Writer) unlink(e *Entry) {
	if e.alias == "" {
		return
	}
	w.disk.unlink(e.alias)
	e.alias = ""
}

// write replaces e's file, unless only the time would change. After an error the old text is in
// place. Needs w.mu.
func (w *Writer) write(e *Entry, doc *Document) error {
	plain := doc.append(nil, time.Time{})
	if bytes.Equal(plain, e.last) {
		return nil
	}
	if err := w.disk.replace(e.dir, doc.append(nil, w.now()), e.seen); err != nil {
		return err
	}
	e.last = plain
	return nil
}

// remove removes e's directory, and that of its task with the last container. A directory that
// holds anything that metad did not make stays. Needs w.mu.
func (w *Writer) remove(e *Entry) {
	if w.byDir[e.dir] == e {
		delete(w.byDir, e.dir)
	}
	if w.byID[e.id] == e {
		delete(w.byID, e.id)
	}
	if w.disk.isOpen() {
		w.unlink(e)
		w.disk.remove(e.dir)
	}
}
