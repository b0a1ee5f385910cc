package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func start(t *testing.T, cfg Config) string {
	t.Helper()
	cfg.Addr = "127.0.0.1:0"
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve after cancel: got %v, want nil", err)
		}
	})
	return "http://" + s.Addr().String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

func TestEndpoints(t *testing.T) {
	ready := errors.New("the Docker Engine has not answered yet")
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "metad_test_total"})
	c.Inc()
	url := start(t, Config{
		Ready:      func() error { return ready },
		Collectors: []prometheus.Collector{c},
		Tasks: func(stats bool) Tasks {
			ct := Container{ID: "c1"}
			if stats {
				ct.Stats = json.RawMessage(`{"read":"x"}`)
			}
			return Tasks{Version: "v", Tasks: []Task{{ARN: "arn", Tag: 7, Containers: []Container{ct}}}}
		},
	})
	for _, tt := range []struct {
		path string
		code int
		has  string
		not  string
	}{
		{"/healthz", 200, "ok", ""},
		{"/readyz", 503, "has not answered", ""},
		{"/metrics", 200, "metad_test_total 1", ""},
		{"/v1/tasks", 200, `"Tag":7`, "read"},
		{"/v1/tasks?stats=1", 200, `"Stats":{"read":"x"}`, ""},
		{"/debug/pprof/", 404, "", "goroutine"},
		{"/", 404, "", ""},
	} {
		code, body := get(t, url+tt.path)
		if code != tt.code || !strings.Contains(body, tt.has) || tt.not != "" && strings.Contains(body, tt.not) {
			t.Errorf("GET %s: got %d %q, want %d with %q without %q", tt.path, code, body, tt.code, tt.has, tt.not)
		}
	}
	ready = nil
	if code, _ := get(t, url+"/readyz"); code != 200 {
		t.Errorf("GET /readyz when ready: got %d, want 200", code)
	}
}

func TestPProfByFlag(t *testing.T) {
	url := start(t, Config{PProf: true})
	if code, body := get(t, url+"/debug/pprof/"); code != 200 || !strings.Contains(body, "goroutine") {
		t.Errorf("GET /debug/pprof/: got %d, want 200 with the list", code)
	}
}

// broken is a collector that can tell one of two things.
type broken struct{ err, fine *prometheus.Desc }

func (b broken) Describe(ch chan<- *prometheus.Desc) { ch <- b.err; ch <- b.fine }
func (b broken) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.NewInvalidMetric(b.err, errors.New("map gone"))
	ch <- prometheus.MustNewConstMetric(b.fine, prometheus.CounterValue, 7)
}

func TestMetricsWithoutOne(t *testing.T) {
	url := start(t, Config{Collectors: []prometheus.Collector{broken{
		prometheus.NewDesc("metad_lost_total", "", nil, nil), prometheus.NewDesc("metad_fine_total", "", nil, nil)}}})
	if code, body := get(t, url+"/metrics"); code != 200 || !strings.Contains(body, "metad_fine_total 7") || strings.Contains(body, "metad_lost_total ") {
		t.Errorf("got %d %s", code, body)
	}
}

func TestOnlyGet(t *testing.T) {
	url := start(t, Config{Tasks: func(bool) Tasks { t.Error("asked for tasks"); return Tasks{} }})
	for _, path := range []string{"/metrics", "/healthz", "/readyz", "/v1/tasks"} {
		r, err := http.Post(url+path, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: got %d, want 405", path, r.StatusCode)
		}
	}
}

// A client that keeps its connection does not keep Serve.
func TestServeEndsWithOpenConnections(t *testing.T) {
	s, err := Listen(Config{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	c, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /he"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: got %v, want nil", err)
	}
	if _, err := Listen(Config{Addr: s.Addr().String()}); err != nil {
		t.Errorf("the address is still taken: %v", err)
	}
}

func TestListenNamesTheAddress(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := Listen(Config{Addr: ln.Addr().String()}); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), ln.Addr().String()) {
		t.Errorf("Listen on an address in use: got %v, want an error naming it", err)
	}
	if _, err := Listen(Config{Addr: "127.0.0.1:99999"}); err == nil || !strings.Contains(err.Error(), "127.0.0.1:99999") {
		t.Errorf("Listen on a bad port: got %v, want an error naming it", err)
	}
}
