package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// serve runs s until the test ends.
func serve(t *testing.T, s *Server, err error) {
	t.Helper()
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
}

// start serves cfg on TCP and on a socket, and returns a function that asks each.
func start(t *testing.T, cfg Config) (public, private func(method, path string) (int, string)) {
	t.Helper()
	cfg.Addr, cfg.Socket = "127.0.0.1:0", filepath.Join(t.TempDir(), "admin.sock")
	tcp, err := Listen(cfg)
	serve(t, tcp, err)
	unix, err := ListenSocket(cfg)
	serve(t, unix, err)
	ask := func(c *http.Client, base string) func(method, path string) (int, string) {
		return func(method, path string) (int, string) {
			t.Helper()
			req, err := http.NewRequest(method, base+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			r, err := c.Do(req)
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
	}
	bySocket := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context,
		_, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", cfg.Socket)
	}}}
	t.Cleanup(bySocket.CloseIdleConnections)
	return ask(http.DefaultClient, "http://"+tcp.Addr().String()), ask(bySocket, "http://metad")
}

func TestEndpoints(t *testing.T) {
	ready := errors.New("the Docker Engine has not answered yet")
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "metad_test_total"})
	c.Inc()
	public, private := start(t, Config{
		Ready:      func() error { return ready },
		Collectors: []prometheus.Collector{c},
		Tasks: func(stats bool) Tasks {
			ct := Container{ID: "c1"}
			if stats {
				ct.Stats = json.RawMessage(`{"read":"x"}`)
			}
			return Tasks{Version: "v",
				Tasks: []Task{{ARN: "arn", Tag: 7, Containers: []Container{ct}}}}
		},
	})
	const nowhere = 404
	for _, tt := range []struct {
		path            string
		public, private int
		has, not        string
	}{
		{"/metrics/containers", nowhere, nowhere, "", ""},
		{"/healthz", 200, 200, "ok", ""},
		{"/readyz", 503, 503, "has not answered", ""},
		{"/metrics", 200, 200, "metad_test_total 1", ""},
		{"/tasks", nowhere, 200, `"Tag":7`, "read"},
		{"/tasks?stats=1", nowhere, 200, `"Stats":{"read":"x"}`, ""},
		{"/v1/tasks", nowhere, nowhere, "", "Tag"},
		{"/debug/pprof/", nowhere, nowhere, "", "goroutine"},
		{"/", nowhere, nowhere, "", ""},
	} {
		code, body := private("GET", tt.path)
		if code != tt.private || !strings.Contains(body, tt.has) || tt.not != "" &&
			strings.Contains(body, tt.not) {
			t.Errorf("GET %s by the socket: got %d %q, want %d with %q without %q",
				tt.path, code, body, tt.private, tt.has, tt.not)
		}
		code, body = public("GET", tt.path)
		if code != tt.public || tt.public != nowhere && !strings.Contains(body, tt.has) ||
			strings.Contains(body, "Tag") {
			t.Errorf("GET %s by TCP: got %d %q, want %d", tt.path, code, body,
				tt.public)
		}
	}
	ready = nil
	if code, _ := public("GET", "/readyz"); code != 200 {
		t.Errorf("GET /readyz when ready: got %d, want 200", code)
	}
}

// Every path of the list is answered, by the servers that the list names.
func TestPaths(t *testing.T) {
	public, private := start(t, Config{PProf: true, Ready: func() error { return nil },
		Tasks:      func(bool) Tasks { return Tasks{} },
		Containers: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})})
	for _, p := range Paths {
		if code, _ := private("GET", p.Path); code != 200 {
			t.Errorf("GET %s by the socket: got %d, want 200", p.Path, code)
		}
		if code, _ := public("GET", p.Path); (code == 200) == p.SocketOnly {
			t.Errorf("GET %s by TCP: got %d", p.Path, code)
		}
	}
}

// Profiles tell about tasks too: they are for the socket alone, and only if asked for.
func TestPProfByFlag(t *testing.T) {
	public, private := start(t, Config{PProf: true})
	if code, body := private("GET", "/debug/pprof/"); code != 200 ||
		!strings.Contains(body, "goroutine") {
		t.Errorf("by the socket: got %d, want 200 with the list", code)
	}
	if code, _ := public("GET", "/debug/pprof/"); code != 404 {
		t.Errorf("by TCP: got %d, want 404", code)
	}
}

// The socket is root's, and a group's if one is named. A bad group is an error that names it.
func TestSocketMode(t *testing.T) {
	f := func(group string, want fs.FileMode) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "admin.sock")
		s, err := ListenSocket(Config{Socket: path, Group: group})
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("group %q: got %v, %v, want mode %v", group, info.Mode(), err,
				want)
		}
		if group != "" && fmt.Sprint(info.Sys().(*syscall.Stat_t).Gid) != group {
			t.Errorf("group %q: got %d", group, info.Sys().(*syscall.Stat_t).Gid)
		}
		// A second one, as after a kill or a takeover, takes the place; the first leaves it
		// alone.
		next, err := ListenSocket(Config{Socket: path, Group: group})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.ln.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
			t.Errorf("after the first is closed: got %v, %v, want the socket alone",
				left, err)
		}
		if err := next.ln.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after the last is closed: got %v, want none", err)
		}
	}
	f("", 0o600)
	f(fmt.Sprint(os.Getgid()), 0o660)
	if _, err := ListenSocket(Config{Socket: filepath.Join(t.TempDir(), "s"),
		Group: "no-such-group"}); err == nil || !strings.Contains(err.Error(),
		`admin group "no-such-group"`) {
		t.Errorf("bad group: got %v", err)
	}
	if _, err := ListenSocket(Config{Socket: "/nonexistent/admin.sock"}); err == nil ||
		!strings.Contains(err.Error(), `admin socket "/nonexistent/admin.sock"`) {
		t.Errorf("bad directory: got %v", err)
	}
}

// The metrics of containers are there, by TCP too, if the operator asked for them.
func TestContainersByFlag(t *testing.T) {
	public, private := start(t,
		Config{Containers: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "page")
		})})
	for _, ask := range []func(method, path string) (int, string){public, private} {
		if code, body := ask("GET", "/metrics/containers"); code != 200 || body != "page" {
			t.Errorf("got %d %q, want the page", code, body)
		}
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
	public, _ := start(t, Config{Collectors: []prometheus.Collector{broken{
		prometheus.NewDesc("metad_lost_total", "", nil, nil),
		prometheus.NewDesc("metad_fine_total", "", nil, nil)}}})
	if code, body := public("GET", "/metrics"); code != 200 || !strings.Contains(body,
		"metad_fine_total 7") || strings.Contains(body, "metad_lost_total ") {
		t.Errorf("got %d %s", code, body)
	}
}

func TestOnlyGet(t *testing.T) {
	_, private := start(t, Config{Tasks: func(bool) Tasks {
		t.Error("asked for tasks")
		return Tasks{}
	}})
	for _, path := range []string{"/metrics", "/healthz", "/readyz", "/tasks"} {
		if code, _ := private("POST", path); code != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: got %d, want 405", path, code)
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
	if _, err := io.WriteString(c,
		"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /he"); err != nil {
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
	if _, err := Listen(Config{Addr: ln.Addr().String()}); !errors.Is(err,
		syscall.EADDRINUSE) || !strings.Contains(err.Error(), ln.Addr().String()) {
		t.Errorf("Listen on an address in use: got %v, want an error naming it", err)
	}
	if _, err := Listen(Config{Addr: "127.0.0.1:99999"}); err == nil ||
		!strings.Contains(err.Error(), "127.0.0.1:99999") {
		t.Errorf("Listen on a bad port: got %v, want an error naming it", err)
	}
}
