package snapshot

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"metad/bpf"
	"metad/internal/expect"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// kernel is a kernel map as a pin would have kept it.
type kernel map[netip.Addr]bpf.TaskValue

func (k kernel) Put(a netip.Addr, v *bpf.TaskValue) error { k[a] = *v; return nil }
func (k kernel) Delete(a netip.Addr) error                { delete(k, a); return nil }
func (k kernel) Entries() (map[netip.Addr]bpf.TaskValue, error) {
	c := map[netip.Addr]bpf.TaskValue{}
	for a, v := range k {
		c[a] = v
	}
	return c, nil
}

const (
	id1 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	id2 = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"
)

// fill sets every member of the struct to something that is not zero, so that none can be
// forgotten on the way.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if v.Type() == reflect.TypeFor[*task.StatsCell]() {
			v.Set(reflect.ValueOf(new(task.StatsCell)))
			return
		}
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		switch v.Type() {
		case reflect.TypeFor[time.Time]():
			v.Set(reflect.ValueOf(time.Date(2026, 11, 22, 10, 44, 7, 123456789,
				time.UTC)))
		case reflect.TypeFor[netip.Addr]():
			v.Set(reflect.ValueOf(netip.MustParseAddr("169.254.172.2")))
		default:
			for i := range v.NumField() {
				fill(v.Field(i))
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		key, value := reflect.New(v.Type().Key()).Elem(),
			reflect.New(v.Type().Elem()).Elem()
		fill(key)
		fill(value)
		v.SetMapIndex(key, value)
	case reflect.String:
		v.SetString("text <&> \"ü\"")
	case reflect.Int, reflect.Int64:
		v.SetInt(42)
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(7)
	case reflect.Float64:
		v.SetFloat(0.25)
	case reflect.Bool:
		v.SetBool(true)
	default:
		panic(v.Type())
	}
}

func fullTask() *task.Task {
	t := new(task.Task)
	fill(reflect.ValueOf(t).Elem())
	t.Containers[0].ID = id1
	t.Settling = false // of the moment: not kept
	return t
}

func views(t testing.TB, k kernel, tasks ...*task.Task) []*lookup.View {
	t.Helper()
	table := lookup.New(k, zap.NewNop())
	if err := table.Apply(tasks); err != nil {
		t.Fatal(err)
	}
	return table.Views()
}

// TestRestart: what the one process wrote the next answers with, byte for byte, sample included.
func TestRestart(t *testing.T) {
	dir, k := t.TempDir(), kernel{}
	was := fullTask()
	const v2 = `{"read":"x","name":"<&>","n":[1, 2]`
	sample := &task.Sample{JSON: []byte(v2 + `,"network_rate_stats":{}}`), V2: len(v2),
		Read: time.Date(2026, 11, 22, 10, 0, 0, 5, time.UTC)}
	was.Containers[0].Stats.Store(sample)
	vs := views(t, k, was)
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(vs); err != nil {
		t.Fatal(err)
	}

	table := lookup.New(k, zap.NewNop())
	if err := table.Restore(Read(dir, zap.NewNop())); err != nil {
		t.Fatal(err)
	}
	v := table.Resolve(vs[0].Tag, was.Endpoints[0].Addr)
	if v == nil {
		t.Fatal("got no task")
	}
	for _, version := range []task.Version{task.V2, task.V3, task.V4} {
		if got, want := v.Document(version).String(),
			vs[0].Document(version).String(); got != want {
			t.Errorf("got document\n%s\nwant\n%s", got, want)
		}
	}
	is := v.Task
	got := is.Containers[0].Stats.Load()
	if got == nil || !bytes.Equal(got.JSON, sample.JSON) || got.V2 != sample.V2 ||
		!got.Read.Equal(sample.Read) {
		t.Errorf("got sample %v, want %v", got, sample)
	}
	is.Containers[0].Stats = was.Containers[0].Stats
	if !reflect.DeepEqual(is, was) {
		t.Errorf("got %+v, want %+v", is, was)
	}
	if st, err := os.Stat(filepath.Join(dir, fileName)); err != nil ||
		st.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v, want mode 0600", st, err)
	}
}

// TestVersion: task.Task is part of the file's shape. When this fails, bump version.
func TestVersion(t *testing.T) {
	b, err := json.Marshal(fullTask())
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/task_v2.json"
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != strings.TrimSpace(string(want)) {
		t.Errorf("task.Task has changed:\n%s\nwant as in %s (version %d)\n%s", b, golden,
			version, want)
	}
}

// An upgrade: what the version before wrote is read, its samples in the form that v2 has of them.
func TestVersionBefore(t *testing.T) {
	text, err := os.ReadFile("testdata/task_v1.json")
	if err != nil {
		t.Fatal(err)
	}
	all, err := Parse(fmt.Appendf(nil,
		`{"Version":1,"Tasks":[{"Tag":7,"Task":%s,"Samples":{"%s":{"Read":"2026-11-22T10:44:07Z","JSON":{"a":1}}}}]}`, text, id1))
	if err != nil {
		t.Fatal(err)
	}
	c := all[0].Task.Containers[0]
	if s := c.Stats.Load(); s == nil || string(s.JSON) != `{"a":1}` || s.V2 != len(`{"a":1`) ||
		c.DockerNetworks[0].MAC == "" {
		t.Errorf("got sample %+v of %+v", s, c)
	}
}

// TestIgnored: what cannot be believed is left alone, with one log line.
func TestIgnored(t *testing.T) {
	good, err := Encode(views(t, kernel{}, fullTask()))
	if err != nil {
		t.Fatal(err)
	}
	f := func(name string, content []byte, want int, log string) {
		t.Helper()
		dir := t.TempDir()
		if content != nil {
			if err := os.WriteFile(filepath.Join(dir, fileName), content,
				0o600); err != nil {
				t.Fatal(err)
			}
		}
		core, logs := observer.New(zapcore.DebugLevel)
		if got := Read(dir, zap.New(core)); len(got) != want {
			t.Errorf("%s: got %d tasks, want %d", name, len(got), want)
		}
		lines := logs.All()
		if log == "" && len(lines) != 0 {
			t.Errorf("%s: got %v in the log, want nothing", name, lines)
		}
		if log != "" && (len(lines) != 1 ||
			!strings.Contains(fmt.Sprint(lines[0].ContextMap()), log)) {
			t.Errorf("%s: got %v in the log, want one line with %q", name, lines, log)
		}
	}
	change := func(old, new string) []byte {
		t.Helper()
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("no %q in %s", old, good)
		}
		return bytes.ReplaceAll(good, []byte(old), []byte(new))
	}
	one := strings.TrimSuffix(strings.TrimPrefix(string(good), `{"Version":2,"Tasks":[`),
		"]}\n")
	f("good", good, 1, "")
	f("none", nil, 0, "")
	f("empty", []byte{}, 0, "unexpected end")
	f("garbage", []byte("\x00\x01\x02"), 0, "invalid character")
	f("truncated", good[:len(good)-8], 0, "unexpected end")
	f("newer", change(`"Version":2`, `"Version":3`), 0, "version 3, want 2")
	f("newer, and of another shape", []byte(`{"Version":3,"Tasks":{}}`), 0, "version 3, want 2")
	f("no version", []byte(`{}`), 0, "version 0")
	f("no tag", change(`"Tag":1`, `"Tag":0`), 0, "the tag is not a task's")
	f("a port's tag", change(`"Tag":1`, `"Tag":2147483649`), 0, "the tag is not a task's")
	f("tag too large", change(`"Tag":1`, `"Tag":4294967296`), 0, "cannot unmarshal")
	f("no task", []byte(`{"Version":2,"Tasks":[{"Tag":1,"Task":null}]}`), 0, "no ARN")
	f("same tag", []byte(`{"Version":2,"Tasks":[`+one+","+strings.Replace(one, `"ARN":"text`, `"ARN":"other`, 1)+"]}"), 0, "twice")
	f("same task", []byte(`{"Version":2,"Tasks":[`+one+","+strings.Replace(one, `"Tag":1`, `"Tag":2`, 1)+"]}"), 0, "twice")
	f("two tasks", []byte(`{"Version":2,"Tasks":[`+one+","+strings.NewReplacer(`"Tag":1`, `"Tag":2`, `"ARN":"text`, `"ARN":"other`).Replace(one)+"]}"), 2, "")
	f("address of another family", change(`"169.254.172.2"`, `"fe80::1"`), 0, "endpoint fe80::1")
	f("no address", change(`"169.254.172.2"`, `""`), 0, "endpoint invalid IP")
	f("no port", change(`"Ifindex":42`, `"Ifindex":0`), 0, "at ifindex 0")
	f("container id that breaks out", change(id1, `0\",\"`), 0, "container id")
	f("no container", change(`"Containers":[`, `"Containers":[null,`), 0, "a container is null")
	f("null", []byte("null"), 0, "version 0")
}

// TestSampleIsObject: only an object can be put into a document, whole and without what v4 adds.
func TestSampleIsObject(t *testing.T) {
	tk := fullTask()
	f := func(text string, v2 int, want bool) {
		t.Helper()
		tk.Containers[0].Stats.Store(&task.Sample{JSON: []byte(text), V2: v2})
		b, err := Encode(views(t, kernel{}, tk))
		if err != nil {
			t.Fatal(err)
		}
		all, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		if got := all[0].Task.Containers[0].Stats.Load() != nil; got != want {
			t.Errorf("%s: got a sample: %v, want %v", text, got, want)
		}
	}
	f(`{"read":1}`, 9, true)
	f(`{"read":1,"x":{}}`, 9, true)
	f(`{"read":1,"x":{}}`, 10, false) // the form of v2 would end in a comma
	f(`{"read":1,"x":{}}`, 15, false)
	f(`{"read":1}`, -1, false)
	f(`{"read":1}`, 10, false)
	f(`null`, 3, false)
	f(`[]`, 1, false)
	f(`"x"`, 2, false)
}

// TestWriteWhenChanged: the file is replaced only when there is something new to say.
func TestWriteWhenChanged(t *testing.T) {
	dir, k := t.TempDir(), kernel{}
	w, err := NewWriter(filepath.Join(dir, "made"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "made", fileName)
	a, b := fullTask(), fullTask()
	b.ARN, b.Endpoints, b.Containers[0].ID = "other", nil, id2
	f := func(name string, vs []*lookup.View, wantWritten bool, wantTasks int) {
		t.Helper()
		os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)) // the first time there is none
		if err := w.Write(vs); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := st.ModTime().Unix() != 1; got != wantWritten {
			t.Errorf("%s: written: %v, want %v", name, got, wantWritten)
		}
		if got := Read(filepath.Dir(path), zap.NewNop()); len(got) != wantTasks {
			t.Errorf("%s: got %d tasks, want %d", name, len(got), wantTasks)
		}
	}
	f("nothing", nil, true, 0)
	f("nothing again", nil, false, 0)
	f("a task", views(t, k, a), true, 1)
	f("the same", views(t, k, a), false, 1)
	f("another", views(t, k, a, b), true, 2)
	a.Containers[0].Stats.Store(&task.Sample{JSON: []byte("{}"), V2: 1})
	f("a sample", views(t, k, a, b), true, 2)
	f("the same sample", views(t, k, a, b), false, 2)
	f("one gone", views(t, k, b), true, 1)
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 1 {
		t.Errorf("got %v, want the file alone", entries)
	}
}

// TestUpdate: after each change the file has what there is, whatever was added to it before; it is
// written whole again before it has twice the size, when it is gone, and when it may be another's.
func TestUpdate(t *testing.T) {
	dir, k := t.TempDir(), kernel{}
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, fileName)
	table, r := lookup.New(k, zap.NewNop()), rand.New(rand.NewPCG(1, 2))
	tasks := map[string]*task.Task{}
	whole := 0
	for round := range 200 {
		for range r.IntN(3) {
			tk := fullTask()
			tk.ARN, tk.Endpoints = fmt.Sprint("arn:", r.IntN(8)), nil
			tk.Family = fmt.Sprint(round)
			if tasks[tk.ARN] = tk; r.IntN(3) == 0 {
				delete(tasks, tk.ARN)
			}
		}
		set := slices.SortedFunc(maps.Values(tasks),
			func(a, b *task.Task) int { return cmp.Compare(a.ARN, b.ARN) })
		if err := table.Apply(set); err != nil {
			t.Fatal(err)
		}
		switch r.IntN(20) {
		case 0:
			_ = os.Remove(path)
		case 1:
			w.forget()
		}
		vs := table.Views()
		if err := w.Update(vs); err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) { // removed, and nothing has changed since
			w.forget()
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Count(content, []byte(`"Version":`)) == 1 {
			whole++
		}
		if w.size > 3*w.first+4096 {
			t.Fatalf("%d bytes, of which the first block has %d", w.size, w.first)
		}
		if got, want := said(t, content), wanted(vs); got != want {
			t.Fatalf("round %d: got\n%s\nwant\n%s", round, got, want)
		}
	}
	if whole == 0 || whole == 200 {
		t.Errorf("the file was whole in %d rounds of 200", whole)
	}
}

// TestUpdateFirstSample: a container's first sample comes into the file with the next update, and
// newer ones do not.
func TestUpdateFirstSample(t *testing.T) {
	dir := t.TempDir()
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	tk := fullTask()
	all := []*task.Task{tk}
	for i := range 5 { // so that the file is not written whole
		other := fullTask()
		other.ARN, other.Endpoints, other.Containers[0].ID = fmt.Sprint("u", i), nil, id2
		all = append(all, other)
	}
	vs := views(t, kernel{}, all...)
	for i, want := range []string{"", `{"n":1}`, `{"n":1}`} {
		if i > 0 {
			tk.Containers[0].Stats.Store(&task.Sample{JSON: fmt.Appendf(nil, `{"n":%d}`, i),
				V2: 6})
		}
		if err := w.Update(vs); err != nil {
			t.Fatal(err)
		}
		got := ""
		if s := Read(dir, zap.NewNop())[0].Task.Containers[0].Stats.Load(); s != nil {
			got = string(s.JSON)
		}
		if got != want {
			t.Errorf("update %d: got the sample %q, want %q", i, got, want)
		}
	}
}

// said returns the tags, ARNs and families of what Parse returns.
func said(t *testing.T, content []byte) (text string) {
	t.Helper()
	all, err := Parse(content)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		text += fmt.Sprintln(s.Tag, s.Task.ARN, s.Task.Family)
	}
	return text
}

func wanted(vs []*lookup.View) (text string) {
	for _, v := range vs {
		text += fmt.Sprintln(v.Tag, v.Task.ARN, v.Task.Family)
	}
	return text
}

// TestUpdateCutOff: wherever the end of a block is missing, what was written before it counts.
func TestUpdateCutOff(t *testing.T) {
	dir, k := t.TempDir(), kernel{}
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	a, b := fullTask(), fullTask()
	b.ARN, b.Endpoints, b.Containers[0].ID = "other", nil, id2
	table := lookup.New(k, zap.NewNop())
	for _, set := range [][]*task.Task{{a}, {b, a}, {b}} {
		if err := table.Apply(set); err != nil {
			t.Fatal(err)
		}
		if err := w.Update(table.Views()); err != nil {
			t.Fatal(err)
		}
	}
	content, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	ends := []int{}
	for i, c := range content {
		if c == '\n' {
			ends = append(ends, i)
		}
	}
	if len(ends) != 3 {
		t.Fatalf("got %d blocks, want 3", len(ends))
	}
	for n := ends[0]; n <= len(content); n++ {
		want := 1
		if ends[1] <= n && n < ends[2] {
			want = 2
		}
		all, err := Parse(content[:n])
		if err != nil || len(all) != want {
			t.Fatalf("%d of %d bytes: got %d tasks, %v, want %d", n, len(content),
				len(all), err, want)
		}
	}
}

// TestWriteFails: the old file stays, and the next attempt is a full one.
func TestWriteFails(t *testing.T) {
	dir := t.TempDir()
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(nil); err != nil {
		t.Fatal(err)
	}
	block := filepath.Join(dir, tempName, "x") // a folder is in the way
	if err := os.MkdirAll(block, 0o700); err != nil {
		t.Fatal(err)
	}
	vs := views(t, kernel{}, fullTask())
	if err := w.Write(vs); err == nil {
		t.Error("got no error")
	}
	if got := Read(dir, zap.NewNop()); got == nil || len(got) != 0 {
		t.Errorf("got %v, want the old file with no task", got)
	}
	if err := os.RemoveAll(filepath.Dir(block)); err != nil {
		t.Fatal(err)
	}
	if err := w.Write(vs); err != nil {
		t.Error(err)
	}
	if got := Read(dir, zap.NewNop()); len(got) != 1 {
		t.Errorf("got %d tasks, want 1", len(got))
	}
}

// TestTooLarge: a file that would not be read is not written, and none is read into memory to find
// out.
func TestTooLarge(t *testing.T) {
	dir := t.TempDir()
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(nil); err != nil {
		t.Fatal(err)
	}
	w.max = 100
	if err := w.Write(views(t, kernel{}, fullTask())); err == nil ||
		!strings.Contains(err.Error(), "more than 100") {
		t.Errorf("write: got %v, want an error", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the old file alone", entries, err)
	}
	if err := os.Truncate(filepath.Join(dir, fileName), maxBytes+1); err != nil {
		t.Fatal(err)
	}
	if got, err := read(filepath.Join(dir, fileName)); err == nil ||
		!strings.Contains(err.Error(), "more than") {
		t.Errorf("read: got %v, %v, want an error", got, err)
	}
}

// TestRun: the last word is written when ctx ends, and a row of errors is one line.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	vs := views(t, kernel{}, fullTask())
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	w.Run(ctx, time.Hour, nil, func() ([]*lookup.View, bool) { return vs, true }, zap.NewNop())
	if got := Read(dir, zap.NewNop()); len(got) != 1 {
		t.Errorf("got %d tasks, want 1", len(got))
	}
	w.Run(ctx, time.Hour, nil, func() ([]*lookup.View, bool) { return nil, false },
		zap.NewNop())
	if got := Read(dir, zap.NewNop()); len(got) != 1 {
		t.Errorf("after a run that did not own the file: got %d tasks, want 1", len(got))
	}

	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.DebugLevel)
	ctx, cancel = context.WithCancel(context.Background())
	calls := 0
	w = &Writer{dir: dir, max: maxBytes}
	w.Run(ctx, time.Millisecond, nil, func() ([]*lookup.View, bool) {
		if calls++; calls == 5 {
			cancel()
		}
		return vs, true
	}, zap.New(core))
	if calls < 5 || logs.Len() != 1 {
		t.Errorf("got %d lines of %d failures, want 1", logs.Len(), calls)
	}
}

// A task is in the file soon after it is known, and not only at the next interval: metad may be
// killed.
func TestRunAfterAChange(t *testing.T) {
	dir := t.TempDir()
	w, err := NewWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	vs := views(t, kernel{}, fullTask())
	ctx, cancel := context.WithCancel(t.Context())
	changed, done := make(chan []*task.Task), make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx, time.Hour, changed, func() ([]*lookup.View, bool) { return vs, true },
			zap.NewNop())
	}()
	changed <- nil
	expect.Until(t, "the task in the file", func() bool {
		return len(Read(dir, zap.NewNop())) == 1
	})
	vs = nil // the writer waits for changed
	changed <- nil
	expect.Until(t, "the task to go", func() bool { return len(Read(dir, zap.NewNop())) == 0 })
	cancel()
	<-done
}

func FuzzParse(f *testing.F) {
	// Small ones: the fuzzer spends its time on shrinking large ones.
	f.Add([]byte(
		`{"Version":2,"Tasks":[{"Tag":1,"Task":{"ARN":"a","Containers":[{"ID":"0a","StartedAt":"2026-11-22T10:44:07Z"}],` +
			`"Endpoints":[{"Addr":"10.0.0.1","Ifindex":4,"MAC":[1,2]}]},"Samples":{"0a":{"Read":"2026-11-22T10:44:07Z","JSON":{"n":1}}}}]}`))
	f.Add([]byte(
		`{"Version":2,"Tasks":[{"Tag":1,"Task":{"ARN":"a","Containers":[{"ID":""}]},"Samples":{"":{"JSON":{}}}}]}`))
	f.Add([]byte(`{"Version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := Parse(b)
		if err != nil {
			return
		}
		// What was accepted a table can hold, and it comes back the same.
		k := kernel{}
		for _, s := range all {
			for _, ep := range s.Task.Endpoints {
				k[ep.Addr] = bpf.TaskValue{Tag: s.Tag, Ifindex: uint32(ep.Ifindex),
					Mac: ep.MAC}
			}
		}
		table := lookup.New(k, zap.NewNop())
		if err := table.Restore(all); err != nil {
			t.Fatal(err)
		}
		vs := table.Views()
		for _, v := range vs {
			for _, c := range v.Containers {
				if s := c.Stats.Load(); s != nil && !(json.Valid(s.JSON) &&
					json.Valid(append(bytes.Clone(s.JSON[:s.V2]), '}'))) {
					t.Errorf("sample %q, for v2 %d", s.JSON, s.V2)
				}
				if len(c.StatsKey) != len(c.ID)+3 ||
					!json.Valid(append(append([]byte{'{'}, c.StatsKey...),
						"0}"...)) {
					t.Errorf("key %q", c.StatsKey)
				}
			}
		}
		again, err := Encode(vs)
		if err != nil {
			return // a time past the year 9999 can be read and not written
		}
		if back, err := Parse(again); err != nil || len(back) != len(vs) {
			t.Errorf("got %d tasks, %v, want %d again of\n%s", len(back), err, len(vs),
				again)
		}
	})
}
