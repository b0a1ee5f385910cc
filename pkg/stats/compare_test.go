package stats

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"metad/pkg/task"

	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"
)

// render returns the sample of a feed, without a previous one. The files stay open afterwards.
func render(t testing.TB, feed Feed, c *task.Container) []byte {
	t.Helper()
	s, err := feed.Sample(true)
	if err != nil {
		t.Fatal(c.DockerName, err)
	}
	doc, _, _ := appendSample(nil, c.ID, "/"+c.DockerName, s, previous{})
	return doc
}

// flatten returns a JSON document's leaves by path. An empty object, list or null is a leaf.
func flatten(t testing.TB, doc []byte) map[string]string {
	t.Helper()
	var v any
	dec := json.NewDecoder(strings.NewReader(string(doc)))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, doc)
	}
	leaves := map[string]string{}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, x := range v {
				walk(path+"."+k, x)
			}
			if len(v) > 0 {
				return
			}
		case []any:
			for i, x := range v {
				walk(path+"."+strconv.Itoa(i), x)
			}
			if len(v) > 0 {
				return
			}
		}
		leaves[path] = fmt.Sprint(v)
	}
	walk("", v)
	return leaves
}

// exact lists the fields that must be equal to the byte. All other numbers must lie between our
// readings directly before and after the Engine's, or be within 2 % of the nearer.
func exact(path string) bool {
	switch path {
	case ".id", ".name", ".num_procs", ".pids_stats.limit", ".memory_stats.limit",
		".cpu_stats.online_cpus",
		".memory_stats.stats.hierarchical_memory_limit",
		".memory_stats.stats.hierarchical_memsw_limit":
		return true
	}
	return strings.HasSuffix(path, ".major") || strings.HasSuffix(path, ".minor") ||
		strings.HasSuffix(path, ".op")
}

// compare checks every field of the Engine's document against ours from before and after it, and
// returns what is wrong.
func compare(t testing.TB, before, engine, after []byte) (wrong []string) {
	t.Helper()
	b, e, a := flatten(t, before), flatten(t, engine), flatten(t, after)
	complain := func(format string, args ...any) {
		wrong = append(wrong, fmt.Sprintf(format, args...))
	}
	for _, m := range []map[string]string{b, e, a} {
		maps.DeleteFunc(m, func(path, _ string) bool {
			// A single question's precpu_stats is zero. Docker 29 has os_type besides.
			return path == ".os_type" || path == ".read" || path == ".preread" ||
				strings.HasPrefix(path, ".precpu_stats")
		})
	}
	for path := range e {
		if _, ok := a[path]; !ok {
			complain("%s: missing", path)
		}
	}
	for path := range a {
		// Docker 26 and later leave the container's id and name out where a single question
		// is asked.
		if _, ok := e[path]; !ok && path != ".id" && path != ".name" {
			complain("%s: the Engine has no such field", path)
		}
	}
	for path, want := range e {
		w, err := strconv.ParseFloat(want, 64)
		if exact(path) || err != nil { // a text, or one of [], null, {}
			if a[path] != want {
				complain("%s: got %s, want exactly %s", path, a[path], want)
			}
			continue
		}
		lo, _ := strconv.ParseFloat(b[path], 64)
		hi, _ := strconv.ParseFloat(a[path], 64)
		near := math.Min(math.Abs(lo-w), math.Abs(hi-w))
		if (w < math.Min(lo, hi) || w > math.Max(lo, hi)) && near > 0.02*w {
			complain("%s: got %s and %s, want %s in between", path, b[path], a[path], want)
		}
	}
	return wrong
}

// TestRecordedMatchesEngine is TestRootCgroupMatchesEngine with files of real hosts, cgroup v1
// (Linux 6.18, Docker 20.10) and v2 (Debian's 6.1, the same Docker), and the Engine's answers that
// were recorded between them.
func TestRecordedMatchesEngine(t *testing.T) {
	archives, err := filepath.Glob("testdata/v[12]/*.txtar")
	if err != nil || len(archives) < 8 {
		t.Fatalf("got recordings %q, error %v", archives, err)
	}
	for _, file := range archives {
		t.Run(strings.TrimSuffix(strings.TrimPrefix(file, "testdata/"), ".txtar"),
			func(t *testing.T) {
				dir := unpack(t, file)
				var c task.Container
				data, err := os.ReadFile(filepath.Join(dir, "container.json"))
				if err != nil {
					t.Fatal(err)
				}
				if err := json.Unmarshal(data, &c); err != nil {
					t.Fatal(err)
				}
				answer, err := os.ReadFile(filepath.Join(dir, "engine.json"))
				if err != nil {
					t.Fatal(err)
				}
				reading := func(when string) []byte {
					src := treeSource(t, filepath.Join(dir, when))
					feed, err := src.Open(aTask(&c), &c, nil)
					if err != nil {
						t.Fatal(err)
					}
					defer feed.Close()
					return render(t, feed, &c)
				}
				for _, w := range compare(t, reading("before"), answer,
					reading("after")) {
					t.Error(w)
				}
			})
	}
}

// unpack returns a directory that holds the files of a recording.
func unpack(t testing.TB, file string) string {
	t.Helper()
	ar, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, f := range ar.Files {
		writeFile(t, filepath.Join(dir, f.Name), f.Data)
	}
	return dir
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
		os.WriteFile(path, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// treeSource returns a source for the files below dir, where <pid>/ns/net is a list of links.
func treeSource(t testing.TB, dir string) *CgroupSource {
	t.Helper()
	src, err := NewCgroupSource(CgroupConfig{
		CgroupRoot: filepath.Join(dir, "sys/fs/cgroup"),
		ProcRoot:   filepath.Join(dir, "proc"),
		Links: func(nsfd int) (links []Link, err error) {
			b := make([]byte, 4096)
			n, err := unix.Read(nsfd, b)
			return links, errors.Join(err, json.Unmarshal(b[:max(n, 0)], &links))
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	src.net.start = func(f func()) { f() } // a reading finds the interfaces listed
	return src
}
