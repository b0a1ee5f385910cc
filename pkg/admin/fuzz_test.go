package admin

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// FuzzAdmin: whatever a client sends, TCP says nothing of a task, no path but those that are known
// is answered, only GET and HEAD are, and what the socket says of tasks is JSON that means the
// tasks, with samples if they are asked for.
func FuzzAdmin(f *testing.F) {
	const secret = "zq7-a-task"
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "metad_test_total"})
	notReady := errors.New("no")
	cfg := Config{
		Ready:      func() error { return notReady },
		Collectors: []prometheus.Collector{counter},
		Tasks: func(stats bool) Tasks {
			c := Container{ID: "c1", Name: "\x1b[31m" + secret}
			if stats {
				c.Stats = json.RawMessage(`{"read":"x"}`)
			}
			return Tasks{Version: "v",
				Tasks: []Task{{ARN: secret, Containers: []Container{c}}}}
		},
	}
	public, private := publicHandler(cfg), privateHandler(cfg)
	known := map[string]bool{"/metrics": true, "/healthz": true, "/readyz": true}
	for _, path := range []string{"/metrics", "/healthz", "/readyz", "/tasks", "/tasks?stats=1",
		"/tasks?stats=%31&stats=2", "/tasks?stats=1;x",
		"/v1/tasks", "/debug/pprof/", "/debug/pprof/heap", "/", "//tasks", "/tasks/", "/x/../tasks", "/%74asks", "/tasks%2f", "http://h/tasks", "*", "/metrics?name[]=x"} {
		for _, head := range []string{"GET %s HTTP/1.1\r\nHost: h\r\n\r\n",
			"POST %s HTTP/1.1\r\nHost: h\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 7\r\n\r\nstats=1",
			"HEAD %s HTTP/1.0\r\n\r\n", "GET %s HTTP/1.1\r\nHost: h\r\nAccept-Encoding: gzip\r\nAccept: application/openmetrics-text;version=1.0.0\r\n\r\n"} {
			f.Add([]byte(strings.Replace(head, "%s", path, 1)))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		answer := func(h http.Handler) (*http.Request, *httptest.ResponseRecorder) {
			r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
			if err != nil || r.Method == http.MethodConnect || r.URL.Path == "" {
				return nil, nil
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			return r, w
		}
		r, w := answer(public)
		if r == nil {
			return
		}
		if w.Code == http.StatusOK && (!known[r.URL.Path] || r.Method != http.MethodGet &&
			r.Method != http.MethodHead) ||
			r.URL.Path == "/readyz" && w.Code == http.StatusOK {
			t.Fatalf("by TCP: %s %s: %d", r.Method, r.URL.Path, w.Code)
		}
		if bytes.Contains(w.Body.Bytes(), []byte(secret)) &&
			!bytes.Contains(raw, []byte("zq7")) {
			t.Fatalf("a task by TCP: %s", w.Body)
		}
		r, w = answer(private)
		if w.Code != http.StatusOK || known[r.URL.Path] {
			return
		}
		if r.URL.Path != "/tasks" || r.Method != http.MethodGet &&
			r.Method != http.MethodHead {
			t.Fatalf("by the socket: %s %s: 200", r.Method, r.URL.Path)
		}
		var got Tasks
		d := json.NewDecoder(w.Body)
		if err := d.Decode(&got); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			t.Fatalf("after the tasks: %v", err)
		}
		stats := r.FormValue("stats") == "1"
		if len(got.Tasks) != 1 || got.Tasks[0].ARN != secret ||
			(got.Tasks[0].Containers[0].Stats != nil) != stats {
			t.Fatalf("stats %v: got %+v", stats, got)
		}
	})
}
