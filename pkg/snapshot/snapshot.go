// Package snapshot stores the current tasks and their samples in a file. The next process answers
// with them before Docker has answered it. They may be out of date, so lookup.Table.Restore takes
// only the tasks that the kernel's map confirms.
package snapshot

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// version is that of the file's format, with that of task.Task in it. For upgrades, the version
// before is read too. A file of any other version is ignored.
const (
	version       = 2
	versionBefore = 1 // samples had no V2
)

const (
	fileName = "snapshot.json"
	tempName = "snapshot.tmp"

	// maxBytes is more than 1,000 tasks of 10 containers need.
	maxBytes = 128 << 20

	defaultEvery = 5 * time.Second

	// soonest is the shortest time between two writes. A write takes some 20 ms with 1,000
	// tasks.
	soonest = time.Second
)

// file is the contents of the file: {"Version": 2, "Tasks": [{"Tag": 7, "Task": {…}, "Samples":
// {id: {"Read": time, "V2": 1234, "JSON": {…}}}}]}.
type file struct {
	Version int
	Tasks   []saved
}

type saved struct {
	Tag     uint32
	Task    json.RawMessage   // a task.Task, encoded once for every version of it
	Samples map[string]sample `json:",omitempty"` // by container id
}

type sample struct {
	Read time.Time
	V2   int
	JSON json.RawMessage
}

// parse returns the sample, nil if its JSON is not an object or its v2 form is not one.
func (s *sample) parse() *task.Sample {
	if len(s.JSON) == 0 || s.JSON[0] != '{' {
		return nil
	}
	whole := len(s.JSON) - 1
	if s.V2 == 0 { // versionBefore
		s.V2 = whole
	}
	if s.V2 < 1 || s.V2 > whole || s.V2 < whole &&
		!json.Valid(append(bytes.Clone(s.JSON[:s.V2]), '}')) {
		return nil
	}
	return &task.Sample{JSON: s.JSON, V2: s.V2, Read: s.Read}
}

// Parse reads the output of Writer or Encode. Every task that it returns is complete: containers
// have a StatsCell, with their last sample if there is one.
func Parse(b []byte) ([]lookup.Saved, error) {
	var head struct{ Version int }
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	if head.Version != version && head.Version != versionBefore {
		return nil, fmt.Errorf("snapshot: version %d, want %d", head.Version, version)
	}
	var f file
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	all := make([]lookup.Saved, 0, len(f.Tasks))
	tags, arns := map[uint32]bool{}, map[string]bool{}
	for _, s := range f.Tasks {
		t, err := s.parse()
		if err != nil {
			return nil, fmt.Errorf("snapshot: task with tag %d: %w", s.Tag, err)
		}
		if tags[s.Tag] || arns[t.ARN] {
			return nil, fmt.Errorf("snapshot: task %q or tag %d appears twice", t.ARN,
				s.Tag)
		}
		tags[s.Tag], arns[t.ARN] = true, true
		all = append(all, lookup.Saved{Tag: s.Tag, Task: t})
	}
	return all, nil
}

func (s *saved) parse() (*task.Task, error) {
	if s.Tag == 0 || s.Tag > bpf.TagTask {
		return nil, errors.New("the tag is not a task's")
	}
	t := new(task.Task)
	if err := json.Unmarshal(s.Task, t); err != nil {
		return nil, err
	}
	if t.ARN == "" {
		return nil, errors.New("no ARN")
	}
	for _, ep := range t.Endpoints {
		if !ep.Addr.Is4() || ep.Ifindex <= 0 {
			return nil, fmt.Errorf("endpoint %v at ifindex %d", ep.Addr, ep.Ifindex)
		}
	}
	for _, c := range t.Containers {
		if c == nil {
			return nil, errors.New("a container is null")
		}
		// The id is written into documents without escaping.
		if strings.Trim(c.ID, "0123456789abcdef") != "" {
			return nil, fmt.Errorf("container id %q", c.ID)
		}
		c.Stats = new(task.StatsCell)
		if sm, ok := s.Samples[c.ID]; ok {
			c.Stats.Store(sm.parse())
		}
	}
	return t, nil
}

// Read returns the tasks that the Writer in dir wrote last, and none if there is no file. If the
// file cannot be read or has another version, Read logs that and returns none.
func Read(dir string, log *zap.Logger) []lookup.Saved {
	all, err := read(filepath.Join(dir, fileName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("starting without the last process's tasks", zap.Error(err))
	}
	return all
}

func read(path string) ([]lookup.Saved, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > maxBytes {
		return nil, fmt.Errorf("%s: %d bytes, more than %d", path, st.Size(), maxBytes)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxBytes))
	if err != nil {
		return nil, err
	}
	return Parse(b)
}

// Encode returns views and their last samples in a form that Parse reads, for a process that takes
// over.
func Encode(views []*lookup.View) ([]byte, error) {
	var b bytes.Buffer
	err := new(encoder).encode(&b, views)
	return b.Bytes(), err
}

// Writer keeps the file in a directory up to date. One writer at a time, in one goroutine.
type Writer struct {
	dir  string
	enc  encoder
	last []any // what the file holds: tags, tasks and samples, by identity
	max  int64 // bytes
}

// NewWriter returns a Writer for dir, which it makes if it is missing.
func NewWriter(dir string) (*Writer, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	return &Writer{dir: dir, max: maxBytes}, nil
}

// Run writes the result of views after each interval (zero: 5s) with a change, soon after a
// message on changed, and once more when ctx ends. It writes nothing while views reports that the
// file belongs to another process. It logs the first of several errors in a row.
//
// Run does not use the messages on changed; views must already return the new tasks.
func (w *Writer) Run(ctx context.Context, every time.Duration, changed <-chan []*task.Task,
	views func() (v []*lookup.View, ours bool), log *zap.Logger) {
	if every == 0 {
		every = defaultEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	failed := false
	var last time.Time
	for ended := false; !ended; {
		select {
		case <-tick.C:
		case <-changed:
			// After a kill, a task that is in the kernel's map and not in the file
			// would get no answers.
			select {
			case <-time.After(time.Until(last.Add(soonest))):
			case <-ctx.Done():
				ended = true
			}
		case <-ctx.Done():
			ended = true
		}
		last = time.Now()
		v, ours := views()
		if !ours {
			continue
		}
		err := w.Write(v)
		if err != nil && !failed {
			log.Error("cannot save tasks for the next start", zap.Error(err))
		}
		failed = err != nil
	}
}

// Write puts views and their last samples into the file, unless it holds them already. Readers see
// the old file or the new one.
func (w *Writer) Write(views []*lookup.View) error {
	now := identity(views)
	if slices.Equal(now, w.last) {
		return nil
	}
	if err := w.replace(views); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	w.last = now
	return nil
}

// identity returns the pointers in views. What they point to is immutable, so the same pointers
// mean the same text.
func identity(views []*lookup.View) []any {
	all := make([]any, 0, 4*len(views)+1)
	all = append(all, version) // never empty: nil is a file not yet written
	for _, v := range views {
		all = append(all, v.Tag, v.Task)
		for _, c := range v.Task.Containers {
			if c.Stats != nil {
				all = append(all, c.Stats.Load())
			}
		}
	}
	return all
}

func (w *Writer) replace(views []*lookup.View) (err error) {
	temp := filepath.Join(w.dir, tempName)
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	// The buffer is small because the file may be larger than all of metad's other memory.
	b := bufio.NewWriterSize(f, 64<<10)
	err = errors.Join(w.enc.encode(b, views), b.Flush())
	if st, e := f.Stat(); err == nil && e == nil && st.Size() > w.max {
		err = fmt.Errorf("%d bytes, more than %d", st.Size(), w.max)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temp, filepath.Join(w.dir, fileName))
	}
	if err != nil {
		os.Remove(temp)
	}
	return err
}

// encoder keeps the text of the tasks, because they change seldom and samples change every second.
type encoder struct{ tasks map[*task.Task][]byte }

// encode writes views to b. The caller gets the write errors from b.
func (e *encoder) encode(b interface {
	io.Writer
	io.StringWriter
}, views []*lookup.View) error {
	tasks := make(map[*task.Task][]byte, len(views))
	fmt.Fprintf(b, `{"Version":%d,"Tasks":[`, version)
	for i, v := range views {
		text, ok := e.tasks[v.Task]
		if !ok {
			var err error
			if text, err = json.Marshal(v.Task); err != nil {
				return fmt.Errorf("task %q: %w", v.Task.ARN, err)
			}
		}
		tasks[v.Task] = text
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(b, `{"Tag":%d,"Task":%s,"Samples":{`, v.Tag, text)
		sep := ""
		for _, c := range v.Task.Containers {
			if c.ID == "" || c.Stats == nil {
				continue
			}
			s := c.Stats.Load()
			if s == nil {
				continue
			}
			read, err := s.Read.MarshalJSON()
			if err != nil {
				return fmt.Errorf("sample of %s: %w", c.ID, err)
			}
			fmt.Fprintf(b, `%s"%s":{"Read":%s,"V2":%d,"JSON":%s}`, sep, c.ID, read,
				s.V2, s.JSON)
			sep = ","
		}
		b.WriteString("}}")
	}
	b.WriteString("]}\n")
	e.tasks = tasks
	return nil
}
