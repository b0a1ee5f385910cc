// Package admin serves the operator of the host over HTTP: metrics, health, and the tasks that
// metad knows.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Config says what to serve. Its functions are called from several goroutines at once.
type Config struct {
	Addr       string                 // host:port to listen on
	PProf      bool                   // serve /debug/pprof
	Ready      func() error           // nil while requests from containers are answered
	Tasks      func(stats bool) Tasks // what /v1/tasks shows; stats asks for samples too
	Collectors []prometheus.Collector
}

// Tasks is the answer of GET /v1/tasks.
type Tasks struct {
	Version string
	Tasks   []Task
}

// Task is one task as metad knows it.
type Task struct {
	ARN        string
	ID         string
	Family     string
	Revision   string
	Status     string
	Tag        uint32 // what the kernel marks its connections with
	Endpoints  []Endpoint
	Containers []Container
}

// Endpoint is an address of a task and the port that proves it.
type Endpoint struct {
	Address string
	MAC     string
	Ifindex int
}

// Container is one container of a task.
type Container struct {
	ID     string
	Name   string
	Type   string
	Status string
	// Which way it got its metadata file and the endpoint's address: proxy, nri, agent or itself;
	// "": it has none.
	File, URIs string `json:",omitempty"`
	// Stats is the last sample, as containers get it; with ?stats=1 only, null before the
	// first.
	Stats json.RawMessage `json:",omitempty"`
}

// Server is the admin HTTP server.
type Server struct {
	http *http.Server
	ln   net.Listener
}

// Listen makes the server; Serve runs it. The error names the address.
func Listen(cfg Config) (*Server, error) {
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("admin %q: %w", cfg.Addr, err)
	}
	return &Server{ln: ln, http: &http.Server{Handler: handler(cfg), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}}, nil
}

// Addr returns the address listened on.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Serve answers until ctx ends, then returns nil; any other end is an error.
func (s *Server) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.http.Close() })
	defer stop()
	if err := s.http.Serve(s.ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("admin: %w", err)
	}
	return nil
}

func handler(cfg Config) http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(cfg.Collectors...)
	mux := http.NewServeMux()
	// A collector that fails does not hide the others.
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := cfg.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /v1/tasks", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(cfg.Tasks(r.FormValue("stats") == "1")) // it fails only when the client is gone
	})
	if cfg.PProf {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}
