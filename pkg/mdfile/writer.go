package mdfile

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
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
	// DataDir is the data directory as metad sees it, absolute. Made if it is not there. "": that of
	// Layout.
	DataDir string
	// Layout makes the paths that the Docker Engine and the containers see. Its DataDir differs from
	// the one above when metad runs in a container; "" means /var/lib/ecs/data.
	Layout Layout
}

// Validate names the first bad field.
func (c Config) Validate() error {
	for name, dir := range map[string]string{"DataDir": c.DataDir, "Layout.DataDir": c.Layout.DataDir} {
		if dir == "" {
			continue
		}
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("%s %q: not an absolute path", name, dir)
		}
		if name == "Layout.DataDir" && strings.Contains(dir, ":") && c.Layout.Platform == Linux {
			return fmt.Errorf("%s %q: a ':' cannot stand in a bind mount", name, dir)
		}
	}
	return nil
}

// grace is how long a directory may be without a container before Sweep takes it for left behind. It
// covers the creations of another metad that is just being taken over from.
const grace = time.Minute

// maxFileSize bounds what is read back of a file.
const maxFileSize = 1 << 20

// tmpPrefix begins the names of files that are being written.
const tmpPrefix = ".metadata-"

// Writer keeps the files. All methods are safe for concurrent use.
type Writer struct {
	cfg Config
	log *zap.Logger
	now func() time.Time

	mu      sync.Mutex // guards what follows, and the tree on disk
	root    *os.Root   // of Layout.Root; nil until the first time it could be opened
	host    Host
	byDir   map[string]*Entry // every directory of ours
	byID    map[string]*Entry // those whose container is known
	changed bool              // host facts changed since the last Apply

	unusable bool // the root could not be opened the last time
}

// Entry is the directory of one container, from Reserve until its container is gone.
type Entry struct {
	w *Writer

	// Where the directory is on the host, for the engine; where in the container; and the path of
	// the file in the container, the value of EnvVar.
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
// yet: that is opened when it is first needed, and tried again whenever it is needed.
func NewWriter(cfg Config, log *zap.Logger) (*Writer, error) {
	if cfg.Layout.DataDir == "" {
		cfg.Layout.DataDir = DefaultDataDir(cfg.Layout.Platform, os.Getenv("ProgramData"))
	}
	if cfg.DataDir == "" {
		cfg.DataDir = cfg.Layout.DataDir
	}
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Layout.Platform == Linux {
		cfg.Layout.DataDir = path.Clean(cfg.Layout.DataDir) // as the Engine shows it in mounts
	}
	return &Writer{cfg: cfg, log: log, now: time.Now, byDir: map[string]*Entry{}, byID: map[string]*Entry{}}, nil
}

// Close releases the data directory. The files stay: containers outlive metad.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.root == nil {
		return nil
	}
	err := w.root.Close()
	w.root = nil
	return err
}

// Layout returns the layout the Writer was made with.
func (w *Writer) Layout() Layout { return w.cfg.Layout }

// SetHost gives the facts about the host that documents made from now on carry. Files that are
// there get them with the next Apply.
func (w *Writer) SetHost(h Host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changed = w.changed || h != w.host
	w.host = h
}

// open opens the root and takes stock of what is there, unless it has. The log has a line when that
// begins to fail. Needs w.mu.
func (w *Writer) open() error {
	if w.root != nil {
		return nil
	}
	err := w.openRoot()
	if err != nil && !w.unusable {
		w.log.Warn("metadata directory not usable yet", zap.Error(err))
	}
	w.unusable = err != nil
	return err
}

// openRoot needs w.mu.
func (w *Writer) openRoot() error {
	dir := filepath.Join(w.cfg.DataDir, "metadata")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	w.root = root
	aliases := map[string]string{}
	w.scan(".", 0, aliases)
	for alias, dir := range aliases {
		if e := w.byDir[dir]; e != nil && e.alias == "" {
			e.alias = alias
			continue
		}
		_ = w.root.Remove(alias)
		w.prune(path.Dir(alias))
	}
	return nil
}

// scan makes entries of the directories below dir that an earlier metad left, and notes aliases and
// what they point to. Needs w.mu.
func (w *Writer) scan(dir string, depth int, aliases map[string]string) {
	list, err := fs.ReadDir(w.root.FS(), dir)
	if err != nil {
		w.log.Warn("list metadata directory", zap.String("dir", dir), zap.Error(err))
		return
	}
	if depth > 0 && (len(list) == 0 || w.ours(dir)) {
		w.load(dir, list)
		return
	}
	for _, e := range list {
		name := path.Join(dir, e.Name())
		if e.IsDir() && depth < 3 { // <cluster>/<task id>/<container name>
			w.scan(name, depth+1, aliases)
		}
		if target, err := w.root.Readlink(name); err == nil && depth > 0 {
			if target = path.Join(dir, target); fs.ValidPath(target) {
				aliases[name] = target
			}
		}
	}
}

// ours reports whether metad made the directory. The ECS agent may share the tree: in its
// directories the agent's file is a file, in ours a link. Needs w.mu.
func (w *Writer) ours(dir string) bool {
	target, err := w.root.Readlink(path.Join(dir, AgentFileName))
	return err == nil && target == FileName
}

// load makes an entry of a directory that is there. Needs w.mu.
func (w *Writer) load(dir string, list []fs.DirEntry) *Entry {
	e := &Entry{w: w, dir: dir, HostDir: w.cfg.Layout.HostDir(dir), made: w.now()}
	if info, err := w.root.Stat(dir); err == nil {
		e.made = info.ModTime()
	}
	w.removeTemp(dir, list, grace) // a younger one may be being written by the metad that is taken over from
	if doc, err := readDocument(w.root.FS(), path.Join(dir, FileName)); err == nil {
		e.id = doc.ContainerID
		e.last = doc.append(nil, time.Time{})
	}
	w.byDir[dir] = e
	if e.id != "" {
		w.byID[e.id] = e
	}
	return e
}

// removeTemp removes files of dir that were not written to their end, if they are older than age. Needs w.mu.
func (w *Writer) removeTemp(dir string, list []fs.DirEntry, age time.Duration) {
	for _, f := range list {
		if !strings.HasPrefix(f.Name(), tmpPrefix) {
			continue
		}
		if info, err := f.Info(); err == nil && time.Since(info.ModTime()) >= age {
			_ = w.root.Remove(path.Join(dir, f.Name()))
		}
	}
}

func readDocument(fsys fs.FS, name string) (*Document, error) {
	info, err := fs.Stat(fsys, name)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxFileSize {
		return nil, fmt.Errorf("%s: %d bytes are too many", name, info.Size())
	}
	b, err := fs.ReadFile(fsys, name)
	if err != nil {
		return nil, err
	}
	var doc Document
	return &doc, json.Unmarshal(b, &doc)
}

// Reserve makes the directory of a container that is about to be created, and the first version of
// its file. c describes it as far as is known: no id, and no name if the Engine is to choose one. t
// is its task; without an ARN the directory of the task is named by the token, 32 hexadecimal digits that no other
// container has.
//
// The name of the directory is the container's, with a number appended if that is taken. The caller
// calls Created, Abandon or Unsure. If Reserve returns an error, nothing is left on disk.
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
	if e.dir, err = w.mkdir(taskDir, name); err != nil {
		return nil, err
	}
	e.HostDir, e.ContainerDir = l.HostDir(e.dir), l.ContainerDir(name, token)
	e.File = l.File(e.ContainerDir)
	err = w.root.Symlink(FileName, path.Join(e.dir, AgentFileName))
	if err == nil {
		err = w.write(e, newDocument(t, c, w.host))
	}
	if err != nil {
		w.remove(e)
		return nil, err
	}
	w.byDir[e.dir] = e
	return e, nil
}

// mkdir makes a new directory named name in taskDir, with a number appended to the name if it is
// taken: two containers of one name at a time are normal while one replaces the other. Needs w.mu.
func (w *Writer) mkdir(taskDir, name string) (string, error) {
	if err := w.root.MkdirAll(taskDir, 0o755); err != nil {
		return "", err
	}
	dir := path.Join(taskDir, name)
	err := w.root.Mkdir(dir, 0o755)
	for n := 2; errors.Is(err, fs.ErrExist) && n < 1000; n++ {
		dir = path.Join(taskDir, fmt.Sprintf("%s-%d", name, n))
		err = w.root.Mkdir(dir, 0o755)
	}
	if err == nil {
		// The container's user may be anyone, whatever metad's umask is.
		if err = w.root.Chmod(dir, 0o755); err != nil {
			_ = w.root.Remove(dir)
		}
	}
	if err != nil {
		w.prune(taskDir)
		return "", err
	}
	return dir, nil
}

// Created tells that the Engine has made the container, and writes what is known of it then. An
// error leaves the first version in place; the next Apply tries again.
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
	if w.root == nil {
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

// Unsure tells that nobody knows whether the container was created. The directory stays if Apply or
// Sweep learn that it was.
func (e *Entry) Unsure() {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.settle()
}

// settle ends the time in which only the caller of Reserve can know about the container. Needs w.mu.
func (e *Entry) settle() {
	e.pending, e.made = false, e.w.now()
}

// Apply brings every file up to date with tasks, the whole current set, and removes the directories
// of containers that were in an earlier set and are no longer in it. One that never was may be new, or not
// looked at yet: see Sweep. Containers without a directory are left alone: one cannot be mounted later.
func (w *Writer) Apply(tasks []*task.Task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.open(); err != nil {
		return // logged; nothing can be there
	}
	w.adopt(tasks)
	present := map[string]bool{}
	for _, t := range tasks {
		for _, c := range t.Containers {
			if e := w.byID[c.ID]; e != nil {
				present[c.ID] = true
				w.update(e, t, c)
			}
		}
	}
	w.changed = false
	for _, e := range w.byDir {
		if e.seen && !present[e.id] {
			w.remove(e)
		}
	}
}

// Retry writes again what could not be written, as when the disk was full. Apply does so too, but it
// is called only when something changes.
func (w *Writer) Retry() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.byDir {
		if e.failed && w.root != nil {
			w.update(e, e.task, e.ctr)
		}
	}
}

// Mounted is a container as Sweep needs to know it.
type Mounted struct {
	ID      string
	Sources []string // of its bind mounts, on the host
}

// InDoubt reports whether there are directories for which no set given to Apply has shown a container:
// metad or the request ended before that, or the container was gone before it was looked at.
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

// doubtful reports whether nobody can be busy with e any more, and still it has no container. Needs w.mu.
func (w *Writer) doubtful(e *Entry, asked time.Time) bool {
	return !e.seen && !e.pending && asked.Sub(e.made) > grace
}

// Sweep removes the directories in doubt that belong to none of the containers, which are all that the
// Engine had, running or not, when it was asked.
func (w *Writer) Sweep(asked time.Time, containers []Mounted) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.root == nil {
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
			w.log.Info("metadata directory without a container removed", zap.String("dir", e.HostDir), zap.String("container", e.id))
			w.remove(e)
		}
	}
}

// adopt finds the containers of directories whose file does not name one, by their mounts. That
// happens when metad ended before it could note the id, or when another metad made the directory.
// Of several containers (--volumes-from) the oldest is the one the directory was made for.
// Needs w.mu.
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
				if e == nil && fs.ValidPath(dir) && w.ours(dir) {
					list, _ := fs.ReadDir(w.root.FS(), dir)
					e = w.load(dir, list)
				}
				if e == nil || e.id != "" {
					continue
				}
				if old := found[e]; old == nil || c.CreatedAt.Before(old.CreatedAt) {
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

// update writes e's file if what it should say has changed. Needs w.mu.
func (w *Writer) update(e *Entry, t *task.Task, c *task.Container) {
	if e.seen && e.task == t && !e.failed && !w.changed {
		return
	}
	e.seen, e.task, e.ctr = true, t, c
	w.link(e)
	err := w.write(e, newDocument(t, c, w.host))
	if err != nil && !e.failed {
		w.log.Warn("metadata file not written", zap.String("dir", e.HostDir), zap.String("container", c.ID), zap.Error(err))
	}
	e.failed = err != nil
}

// link makes it true that every container's directory is found by its task's id and its name. Not every
// directory lies there: the id may not have been known when it was made, the name may have been taken or have changed.
// There is a link then. Needs w.mu.
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
	target := strings.Repeat("../", strings.Count(alias, "/")) + e.dir
	err := w.root.MkdirAll(path.Dir(alias), 0o755)
	if err == nil {
		err = w.root.Symlink(target, alias)
	}
	if err == nil {
		e.alias = alias // else another container of the task has the name, or the disk is full
	}
}

// unlink removes what link has made. Needs w.mu.
func (w *Writer) unlink(e *Entry) {
	if e.alias == "" {
		return
	}
	_ = w.root.Remove(e.alias)
	w.prune(path.Dir(e.alias))
	e.alias = ""
}

// write replaces e's file, unless only the time would change. Readers see the old text or the new
// one, whole. After an error the old one is in place. Needs w.mu.
func (w *Writer) write(e *Entry, doc *Document) (err error) {
	plain := doc.append(nil, time.Time{})
	if bytes.Equal(plain, e.last) {
		return nil
	}
	tmp := path.Join(e.dir, tmpPrefix+newToken()[:12])
	f, err := w.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrNotExist) && e.seen {
		// Somebody removed the directory. The container sees a new one when it starts again.
		if err = w.root.MkdirAll(e.dir, 0o755); err == nil {
			_ = w.root.Symlink(FileName, path.Join(e.dir, AgentFileName))
			f, err = w.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		}
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = w.root.Remove(tmp)
		}
	}()
	_, err = f.Write(doc.append(nil, w.now()))
	err = errors.Join(err, f.Chmod(0o644), f.Close()) // whatever the umask
	if err != nil {
		return err
	}
	if err := w.root.Rename(tmp, path.Join(e.dir, FileName)); err != nil {
		return err
	}
	e.last = plain
	return nil
}

// remove takes e's directory away, and the task's with its last container. Only what metad makes is
// removed: a directory that holds anything else stays. Needs w.mu.
func (w *Writer) remove(e *Entry) {
	if w.byDir[e.dir] == e {
		delete(w.byDir, e.dir)
	}
	if w.byID[e.id] == e {
		delete(w.byID, e.id)
	}
	if w.root == nil {
		return
	}
	w.unlink(e)
	if w.ours(e.dir) {
		list, _ := fs.ReadDir(w.root.FS(), e.dir)
		w.removeTemp(e.dir, list, 0)
		_ = w.root.Remove(path.Join(e.dir, FileName))
		_ = w.root.Remove(path.Join(e.dir, AgentFileName)) // last: it says that the directory is ours
	}
	w.prune(e.dir)
}

// prune removes dir and its parents as far as they are empty. Needs w.mu.
func (w *Writer) prune(dir string) {
	for ; dir != "."; dir = path.Dir(dir) {
		if w.root.Remove(dir) != nil {
			return
		}
	}
}

// newToken returns 32 random hexadecimal digits, which is what the ids of ECS tasks look like.
func newToken() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// safe returns the last element of name, an ARN or plain name, or "" if it cannot name a directory.
func safe(name string) string {
	name = name[strings.LastIndexByte(name, '/')+1:]
	if CheckName(name) != nil {
		return ""
	}
	return name
}
