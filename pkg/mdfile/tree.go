package mdfile

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"go.uber.org/zap"
)

// maxFileSize bounds what is read back of a file.
const maxFileSize = 1 << 20

// tmpPrefix begins the names of files that are being written.
const tmpPrefix = ".metadata-"

// tree is the directories and files on disk. Paths are below its root, with forward slashes. It
// knows nothing of containers. Its methods need the lock of its Writer.
type tree struct {
	log  *zap.Logger
	root *os.Root // nil until open has succeeded
}

// open opens the root, and makes it if it does not exist.
func (t *tree) open(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	t.root = root
	return nil
}

func (t *tree) isOpen() bool { return t.root != nil }

func (t *tree) close() error {
	if t.root == nil {
		return nil
	}
	err := t.root.Close()
	t.root = nil
	return err
}

// scan returns the directories that metad made for containers, empty ones included, and the links
// to them with their targets.
func (t *tree) scan() (dirs []string, links map[string]string) {
	links = map[string]string{}
	var visit func(dir string, depth int)
	visit = func(dir string, depth int) {
		list, err := fs.ReadDir(t.root.FS(), dir)
		if err != nil {
			t.log.Warn("cannot list metadata directory", zap.String("dir", dir),
				zap.Error(err))
			return
		}
		if depth > 0 && (len(list) == 0 || t.ours(dir)) {
			dirs = append(dirs, dir)
			return
		}
		for _, e := range list {
			name := path.Join(dir, e.Name())
			if e.IsDir() && depth < 3 { // <cluster>/<task id>/<container name>
				visit(name, depth+1)
			}
			if target, err := t.root.Readlink(name); err == nil && depth > 0 {
				if target = path.Join(dir, target); fs.ValidPath(target) {
					links[name] = target
				}
			}
		}
	}
	visit(".", 0)
	return dirs, links
}

// ours reports whether metad made the directory. The ECS agent may use the same tree: in its
// directories AgentFileName is a file, in metad's a link.
func (t *tree) ours(dir string) bool {
	target, err := t.root.Readlink(path.Join(dir, AgentFileName))
	return err == nil && target == FileName
}

// modTime returns when dir changed last; the zero time if that is not known.
func (t *tree) modTime(dir string) time.Time {
	info, err := t.root.Stat(dir)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

// read returns the document in dir.
func (t *tree) read(dir string) (*Document, error) {
	return readDocument(t.root.FS(), path.Join(dir, FileName))
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

// mkdir makes a new directory in taskDir and returns its path. Its name is name, with a number
// appended if that is taken: while one container replaces another, both have the name.
func (t *tree) mkdir(taskDir, name string) (string, error) {
	if err := t.root.MkdirAll(taskDir, 0o755); err != nil {
		return "", err
	}
	dir := path.Join(taskDir, name)
	err := t.root.Mkdir(dir, 0o755)
	for n := 2; errors.Is(err, fs.ErrExist) && n < 1000; n++ {
		dir = path.Join(taskDir, fmt.Sprintf("%s-%d", name, n))
		err = t.root.Mkdir(dir, 0o755)
	}
	if err == nil {
		// The container's user must be able to read it, whatever metad's umask is.
		if err = t.root.Chmod(dir, 0o755); err != nil {
			_ = t.root.Remove(dir)
		}
	}
	if err != nil {
		t.prune(taskDir)
		return "", err
	}
	return dir, nil
}

// mark makes the link by which ours recognises the directory.
func (t *tree) mark(dir string) error {
	return t.root.Symlink(FileName, path.Join(dir, AgentFileName))
}

// replace writes the file of dir. A reader sees the old text or the new text, whole. After an error
// the old text is in place. With remake, a directory that another program removed is made again:
// the container sees it when it starts again.
func (t *tree) replace(dir string, text []byte, remake bool) (err error) {
	tmp := path.Join(dir, tmpPrefix+newToken()[:12])
	f, err := t.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrNotExist) && remake {
		if err = t.root.MkdirAll(dir, 0o755); err == nil {
			_ = t.mark(dir)
			f, err = t.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		}
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = t.root.Remove(tmp)
		}
	}()
	_, err = f.Write(text)
	err = errors.Join(err, f.Chmod(0o644), f.Close()) // whatever the umask is
	if err != nil {
		return err
	}
	return t.root.Rename(tmp, path.Join(dir, FileName))
}

// link makes a link at alias that leads to dir.
func (t *tree) link(dir, alias string) error {
	if err := t.root.MkdirAll(path.Dir(alias), 0o755); err != nil {
		return err
	}
	return t.root.Symlink(strings.Repeat("../", strings.Count(alias, "/"))+dir, alias)
}

// unlink removes a link, and its directory if that is empty then.
func (t *tree) unlink(alias string) {
	_ = t.root.Remove(alias)
	t.prune(path.Dir(alias))
}

// remove removes what metad makes in dir, and dir if nothing else is in it.
func (t *tree) remove(dir string) {
	if t.ours(dir) {
		t.removeTemp(dir, 0)
		_ = t.root.Remove(path.Join(dir, FileName))
		// Last, because this link says that the directory is metad's.
		_ = t.root.Remove(path.Join(dir, AgentFileName))
	}
	t.prune(dir)
}

// removeTemp removes the files of dir whose writing was interrupted, if they are older than age.
func (t *tree) removeTemp(dir string, age time.Duration) {
	list, _ := fs.ReadDir(t.root.FS(), dir)
	for _, f := range list {
		if !strings.HasPrefix(f.Name(), tmpPrefix) {
			continue
		}
		if info, err := f.Info(); err == nil && time.Since(info.ModTime()) >= age {
			_ = t.root.Remove(path.Join(dir, f.Name()))
		}
	}
}

// prune removes dir if it is empty, and its parents likewise.
func (t *tree) prune(dir string) {
	for ; dir != "."; dir = path.Dir(dir) {
		if t.root.Remove(dir) != nil {
			return
		}
	}
}

// newToken returns 32 random hexadecimal digits, the form of an ECS task's id.
func newToken() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
