package stats

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"strconv"
	"strings"
	"testing"

	"metad/pkg/task"
)

// render returns what a feed has to say now, without a past.
func render(t testing.TB, feed Feed, c *task.Container) []byte {
	t.Helper()
	s, err := feed.Sample(false)
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
	case ".id", ".name", ".num_procs", ".pids_stats.limit", ".memory_stats.limit", ".cpu_stats.online_cpus",
		".memory_stats.stats.hierarchical_memory_limit", ".memory_stats.stats.hierarchical_memsw_limit":
		return true
	}
	return strings.HasSuffix(path, ".major") || strings.HasSuffix(path, ".minor") || strings.HasSuffix(path, ".op")
}

// compare checks every field of the Engine's document against ours from before and after it, and
// returns what is wrong.
func compare(t testing.TB, before, engine, after []byte) (wrong []string) {
	t.Helper()
	b, e, a := flatten(t, before), flatten(t, engine), flatten(t, after)
	complain := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for _, m := range []map[string]string{b, e, a} {
		maps.DeleteFunc(m, func(path, _ string) bool {
			// A single question's precpu_stats is zero.
			return path == ".read" || path == ".preread" || strings.HasPrefix(path, ".precpu_stats")
		})
	}
	for path := range e {
		if _, ok := a[path]; !ok {
			complain("%s: missing", path)
		}
	}
	for path := range a {
		if _, ok := e[path]; !ok {
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
