// Package snapshot stores the current tasks and their samples in a file. The next process answers
// with them before Docker has answered it. They may be out of date, so lookup.Table.Restore takes
// only the tasks that the kernel's map confirms.
package snapshot

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
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

	// wholeEvery is for newer samples of containers that have one in the file. They are out of
	// date after a second in any case, and the next process takes its own as soon as the Engine
	// has answered it.
	wholeEvery = 30 * time.Second

	// soonest is the shortest time between two writes. A write of 1,000 tasks takes some 80 ms,
	// what a change adds to the file less than 1 ms. If it takes long, the pause is longer too:
	// writing is one part in so many of the time.
	soonest = time.Second
	share   = 20
)

// block is one line of the file: {"Version": 2, "Tasks": [{"Tag": 7, "Task": {…}, "Samples": {id:
// {"Read": time, "V2": 1234, "JSON": {…}}}}], "Gone": [ARN]}. The first has all tasks; each that
// follows has those that have changed since, whole, and the ARNs of those that are gone.
type block struct {
	Version int
	Tasks   []saved
	Gone    []string `json:",omitempty"`
}

// blockBegin is where a block begins that is not the first. In a block there is no such line.
const blockBegin = "\n{"

type saved struct {
	Tag     uint32
	Task    *task.Task
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

// Parse reads what a Writer or Encode wrote. Every task that it returns is complete: containers
// have a StatsCell, with their last sample if there is one.
func Parse(b []byte) ([]lookup.Saved, error) {
	all := map[string]lookup.Saved{}
	for first := true; first || len(b) > 0; first = false {
		end := len(b)
		if i := bytes.Index(b, []byte(blockBegin)); i >= 0 {
			end = i + 1
		}
		err := parseBlock(all, b[:end])
		var cut *json.SyntaxError
		if !first && end == len(b) && errors.As(err, &cut) {
			break // the writer was killed before its end
		}
		if err != nil {
			return nil, fmt.Errorf("snapshot: %w", err)
		}
		b = b[end:]
	}
	tags := make(map[uint32]bool, len(all))
	for _, s := range all {
		if tags[s.Tag] {
			return nil, fmt.Errorf("snapshot: tag %d appears twice", s.Tag)
		}
		tags[s.Tag] = true
	}
	list := slices.AppendSeq(make([]lookup.Saved, 0, len(all)), maps.Values(all))
	slices.SortFunc(list, func(a, b lookup.Saved) int {
		return cmp.Compare(a.Task.ARN, b.Task.ARN)
	})
	return list, nil
}

// parseBlock brings all, which is by ARN, up to date with one block.
func parseBlock(all map[string]lookup.Saved, text []byte) error {
	var head struct{ Version int }
	if err := json.Unmarshal(text, &head); err != nil {
		return err
	}
	if head.Version != version && head.Version != versionBefore {
		return fmt.Errorf("version %d, want %d", head.Version, version)
	}
	var b block
	if err := json.Unmarshal(text, &b); err != nil {
		return err
	}
	for _, arn := range b.Gone {
		delete(all, arn)
	}
	here := map[string]bool{}
	for _, s := range b.Tasks {
		if err := s.complete(); err != nil {
			return fmt.Errorf("task with tag %d: %w", s.Tag, err)
		}
		if here[s.Task.ARN] {
			return fmt.Errorf("task %q appears twice", s.Task.ARN)
		}
		here[s.Task.ARN] = true
		all[s.Task.ARN] = lookup.Saved{Tag: s.Tag, Task: s.Task}
	}
	return nil
}

// complete checks the task, and gives its containers their cells.
func (s *saved) complete() error {
	t := s.Task
	if s.Tag == 0 || s.Tag > bpf.TagTask {
		return errors.New("the tag is not a task's")
	}
	if t == nil || t.ARN == "" {
		return errors.New("no ARN")
	}
	for _, ep := range t.Endpoints {
		if !ep.Addr.Is4() || ep.Ifindex <= 0 {
			return fmt.Errorf("endpoint %v at ifindex %d", ep.Addr, ep.Ifindex)
		}
	}
	for _, c := range t.Containers {
		if c == nil {
			return errors.New("a container is null")
		}
		// The id is written into documents without escaping.
		if strings.Trim(c.ID, "0123456789abcdef") != "" {
			return fmt.Errorf("container id %q", c.ID)
		}
		c.Stats = new(task.StatsCell)
		if sm, ok := s.Samples[c.ID]; ok {
			c.Stats.Store(sm.parse())
		}
	}
	return nil
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
	err := encode(&b, views, nil)
	return b.Bytes(), err
}

// Writer keeps the file in a directory up to date. One writer at a time, in one goroutine.
type Writer struct {
	dir  string
	last []any // what the file holds: tags, tasks and samples, by identity; nil: not known
	held []held
	// bytes of the file, and of its first block
	size, first int64
	max         int64
}

// held is a task that the file holds.
type held struct {
	tag     uint32
	task    *task.Task
	samples int // containers with one
}

func heldOf(v *lookup.View) held {
	h := held{tag: v.Tag, task: v.Task}
	for _, c := range v.Task.Containers {
		if c.Stats != nil && c.Stats.Load() != nil {
			h.samples++
		}
	}
	return h
}

// NewWriter returns a Writer for dir, which it makes if it is missing.
func NewWriter(dir string) (*Writer, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	return &Writer{dir: dir, max: maxBytes}, nil
}

// Run adds what has changed in the result of views to the file after each interval (zero: 5s) and
// soon after a message on changed. It writes the whole file each 30 s in which a sample has
// changed, and when ctx ends. It writes nothing while views reports that the file belongs to
// another process. It logs the first of several errors in a row.
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
	var next time.Time // not before
	var whole time.Time
	for ended := false; !ended; {
		select {
		case <-tick.C:
		case <-changed:
			// After a kill, a task that is in the kernel's map and not in the file
			// would get no answers.
			select {
			case <-time.After(time.Until(next)):
			case <-ctx.Done():
				ended = true
			}
		case <-ctx.Done():
			ended = true
		}
		began := time.Now()
		next = began.Add(soonest)
		v, ours := views()
		if !ours {
			w.forget()
			continue
		}
		write := w.Update
		if ended || !began.Before(whole) {
			write, whole = w.Write, began.Add(wholeEvery)
		}
		err := write(v)
		next = began.Add(min(max(soonest, share*time.Since(began)), wholeEvery))
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
	w.hold(views)
	return nil
}

// Update adds to the file those of views that have changed, with their last samples, and which are
// gone. It costs what has changed, and now and then what there is.
func (w *Writer) Update(views []*lookup.View) error {
	if w.held == nil || w.size > 2*w.first {
		return w.Write(views)
	}
	changed, gone := w.changed(views)
	if len(changed)+len(gone) == 0 {
		return nil
	}
	var b bytes.Buffer
	err := encode(&b, changed, gone)
	if err == nil {
		err = w.add(b.Bytes())
	}
	if err != nil { // the file may be gone, or hold half a block
		w.forget()
		return w.Write(views)
	}
	w.last = nil
	w.hold(views)
	return nil
}

// changed returns what is new in views, and the ARNs of the tasks that are not in them any more.
func (w *Writer) changed(views []*lookup.View) (changed []*lookup.View, gone []string) {
	before := w.held
	for _, v := range views {
		for len(before) > 0 && before[0].task.ARN < v.Task.ARN {
			gone = append(gone, before[0].task.ARN)
			before = before[1:]
		}
		if len(before) > 0 && before[0].task.ARN == v.Task.ARN {
			was := before[0]
			before = before[1:]
			if is := heldOf(v); was.tag == is.tag && was.task == is.task &&
				was.samples >= is.samples {
				continue
			}
		}
		changed = append(changed, v)
	}
	for _, h := range before {
		gone = append(gone, h.task.ARN)
	}
	return changed, gone
}

// hold takes note that the file has the tasks of views.
func (w *Writer) hold(views []*lookup.View) {
	w.held = make([]held, len(views))
	for i, v := range views {
		w.held[i] = heldOf(v)
	}
}

// forget is called when the file may hold anything.
func (w *Writer) forget() { w.last, w.held = nil, nil }

// add writes a block at the end of the file.
func (w *Writer) add(text []byte) error {
	if w.size+int64(len(text)) > w.max {
		return fmt.Errorf("%d bytes, more than %d", w.size+int64(len(text)), w.max)
	}
	f, err := os.OpenFile(filepath.Join(w.dir, fileName), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	w.size += int64(len(text))
	return errors.Join(err, f.Close())
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
	err = errors.Join(encode(b, views, nil), b.Flush())
	if st, e := f.Stat(); err == nil && e == nil {
		if w.size, w.first = st.Size(), st.Size(); w.size > w.max {
			err = fmt.Errorf("%d bytes, more than %d", w.size, w.max)
		}
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temp, filepath.Join(w.dir, fileName))
	}
	if err != nil {
		os.Remove(temp)
	}
	return err
}

// encode writes a block to b. The caller gets the write errors from b.
func encode(b interface {
	io.Writer
	io.StringWriter
}, views []*lookup.View, gone []string) error {
	fmt.Fprintf(b, `{"Version":%d,"Tasks":[`, version)
	for i, v := range views {
		text, err := json.Marshal(v.Task)
		if err != nil {
			return fmt.Errorf("task %q: %w", v.Task.ARN, err)
		}
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(b, `{"Tag":%d,"Task":`, v.Tag)
		b.Write(text)
		b.WriteString(`,"Samples":{`)
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
			fmt.Fprintf(b, `%s"%s":{"Read":%s,"V2":%d,"JSON":`, sep, c.ID, read, s.V2)
			b.Write(s.JSON)
			b.WriteString("}")
			sep = ","
		}
		b.WriteString("}}")
	}
	b.WriteString("]")
	if len(gone) > 0 {
		text, err := json.Marshal(gone)
		if err != nil {
			return err
		}
		b.WriteString(`,"Gone":`)
		b.Write(text)
	}
	b.WriteString("}\n")
	return nil
}
