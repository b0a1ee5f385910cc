// Package admin serves the operator of the host over HTTP: metrics, health, and the tasks that
// metad knows.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Config says what to serve. Its functions are called from several goroutines at once.
type Config struct {
	// Addr is the host:port of metrics and health. Every process and every container on the
	// host's network can connect to it: it says nothing about a task.
	Addr string
	// Socket is the path of the unix socket, which has everything. Its directory is root's.
	Socket string
	// Group may use the socket beside root: a name or a number; empty: no group.
	Group string

	PProf      bool                   // serve /debug/pprof on the socket
	Ready      func() error           // nil while requests from containers are answered
	Tasks      func(stats bool) Tasks // what /tasks shows; stats asks for samples too
	Collectors []prometheus.Collector
	Private    map[string]http.Handler // more paths of the socket, for GET
	// what /metrics/containers is answered by; nil: there is none
	Containers http.Handler
}

// Path is a path that the server answers.
type Path struct {
	Path       string
	SocketOnly bool
	What       string // it answers
}

// Paths are those of every server; Config.Private has more of them.
var Paths = []Path{
	{"/metrics", false, "metrics of metad itself, for Prometheus"},
	{"/metrics/containers", false, "statistics of every container, for Prometheus, with " +
		"--container-metrics"},
	{"/healthz", false, "200 while the process runs"},
	{"/readyz", false, "200 while the requests of containers are answered from a complete " +
		"list of them; else 503, and why"},
	{"/tasks", true, "every task with its tag, addresses, ports and containers; with " +
		"?stats=1 their last samples and connections too, which keeps them sampled " +
		"each second"},
	{"/debug/pprof/", true, "profiles, with --pprof"},
}

// Tasks is the answer of GET /tasks.
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
	// Container is the id of the container that has it; "": not known.
	Container string `json:",omitempty"`
	// Connections is how many it has made to the endpoint; with ?stats=1 only.
	Connections uint64 `json:",omitempty"`
}

// Container is one container of a task.
type Container struct {
	ID     string
	Name   string
	Type   string
	Status string
	// Number is the container's in its task, as bits 24 to 30 of a tag have it; 0: the kernel
	// does not name it.
	Number int `json:",omitempty"`
	// Which way it got its metadata file and the endpoint's address: proxy, nri, agent or
	// itself; "": it has none.
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

// Listen makes the server at cfg.Addr; Serve runs it. It returns an error that names the address if
// that cannot be listened on.
func Listen(cfg Config) (*Server, error) {
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("admin %q: %w", cfg.Addr, err)
	}
	return newServer(ln, publicHandler(cfg)), nil
}

// ListenSocket makes the server at cfg.Socket; Serve runs it and removes the socket. A socket that
// is there is replaced. An error names the field of cfg.
func ListenSocket(cfg Config) (*Server, error) {
	gid, mode := -1, fs.FileMode(0o600)
	if cfg.Group != "" {
		var err error
		if gid, err = groupID(cfg.Group); err != nil {
			return nil, fmt.Errorf("admin group %q: %w", cfg.Group, err)
		}
		mode = 0o660
	}
	ln, err := listenSocket(cfg.Socket, gid, mode)
	if err != nil {
		return nil, fmt.Errorf("admin socket %q: %w", cfg.Socket, err)
	}
	return newServer(ln, privateHandler(cfg)), nil
}

// listenSocket makes the socket where only root can see it, and moves it to its place with its
// mode.
func listenSocket(path string, gid int, mode fs.FileMode) (_ net.Listener, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".admin-") // mode 0700
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	hidden := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: hidden, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	err = os.Chown(hidden, -1, gid)
	if err == nil {
		err = os.Chmod(hidden, mode)
	}
	if err == nil {
		err = os.Rename(hidden, path)
	}
	var own fs.FileInfo
	if err == nil {
		own, err = os.Lstat(path)
	}
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return &socket{ln, path, own}, nil
}

// socket is a listener that removes its name, if that is still its own.
type socket struct {
	*net.UnixListener
	path string
	own  fs.FileInfo
}

// Close implements net.Listener.
func (s *socket) Close() error {
	err := s.UnixListener.Close()
	if info, serr := os.Lstat(s.path); serr == nil && os.SameFile(info, s.own) {
		err = errors.Join(err, os.Remove(s.path))
	}
	return err
}

func groupID(name string) (int, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}

func newServer(ln net.Listener, h http.Handler) *Server {
	return &Server{ln: ln, http: &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout: time.Minute}}
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

// publicHandler has what every process of the host may know.
func publicHandler(cfg Config) *http.ServeMux {
	reg := prometheus.NewRegistry()
	reg.MustRegister(cfg.Collectors...)
	mux := http.NewServeMux()
	// If one collector fails, the others' metrics are served.
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg,
		promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	if cfg.Containers != nil {
		mux.Handle("GET /metrics/containers", cfg.Containers)
	}
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := cfg.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// privateHandler has all of it.
func privateHandler(cfg Config) *http.ServeMux {
	mux := publicHandler(cfg)
	mux.HandleFunc("GET /tasks", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		// the client is gone
		_ = json.NewEncoder(w).Encode(cfg.Tasks(r.FormValue("stats") == "1"))
	})
	for path, h := range cfg.Private {
		mux.Handle("GET "+path, h)
	}
	if cfg.PProf {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}
