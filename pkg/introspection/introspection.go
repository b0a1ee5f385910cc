// Package introspection serves the ECS agent's introspection API on hosts without an agent. Log
// collectors and old scripts read from it which containers run (ecs-agent/introspection/v1,
// agent/handlers/v1).
package introspection

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"metad/pkg/task"
)

// Config holds the contents of the API and its address.
type Config struct {
	Addr    string // host:port
	Cluster string
	Version string // metad's
	// Tasks returns all tasks, in the order to show them. Safe for concurrent use.
	Tasks func() []*task.Task
}

// Server is a listening API. It answers once Serve runs.
type Server struct {
	ln   net.Listener
	http *http.Server
}

// Listen listens at cfg.Addr. It fails if the address is in use, for example by an ECS agent.
func Listen(cfg Config) (*Server, error) {
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("introspection: %w", err)
	}
	return &Server{ln: ln, http: &http.Server{Handler: handler(cfg),
		ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second,
		IdleTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10}}, nil
}

// Addr returns the address that the server listens at.
func (s *Server) Addr() net.Addr { return s.ln.Addr() }

// Serve answers until ctx ends, and returns nil then.
func (s *Server) Serve(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = s.http.Close() })()
	if err := s.http.Serve(s.ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// handler routes as the agent does: for an unknown path it answers with the list of paths.
func handler(cfg Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/metadata", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, metadataOf(cfg))
	})
	mux.HandleFunc("/v1/tasks", func(w http.ResponseWriter, r *http.Request) {
		status, doc := tasksOf(cfg.Tasks(), r.URL.Query().Get("taskarn"),
			r.URL.Query().Get("dockerid"))
		answer(w, status, doc)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK,
			struct{ AvailableCommands []string }{[]string{"/v1/metadata", "/v1/tasks"}})
	})
	return mux
}

func answer(w http.ResponseWriter, status int, doc any) {
	b, err := json.Marshal(doc)
	if err != nil { // all values of the documents have a JSON form
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b)
}

// metadata is {"Cluster": text, "ContainerInstanceArn": ARN or null, "Version": text}.
type metadata struct {
	Cluster              string
	ContainerInstanceArn *string
	Version              string
}

func metadataOf(cfg Config) metadata {
	m := metadata{Cluster: cfg.Cluster, Version: "metad - " + cfg.Version}
	for _, t := range cfg.Tasks() {
		if t.ContainerInstanceARN != "" {
			m.ContainerInstanceArn = &t.ContainerInstanceARN
			break
		}
	}
	return m
}

// tasksOf answers /v1/tasks with all tasks, or with one task by its ARN or by the id of a
// container. Of the id, up to 12 of the first characters are enough. If not exactly one task
// matches, or if both are given, it answers with an error and an empty task.
func tasksOf(tasks []*task.Task, arn, dockerID string) (int, any) {
	if arn == "" && dockerID == "" {
		all := struct{ Tasks []taskDocument }{make([]taskDocument, 0, len(tasks))}
		for _, t := range tasks {
			all.Tasks = append(all.Tasks, newTask(t))
		}
		return http.StatusOK, all
	}
	var found []*task.Task
	for _, t := range tasks {
		if arn != "" && t.ARN == arn || dockerID != "" && hasContainer(t, dockerID) {
			found = append(found, t)
		}
	}
	switch {
	case arn != "" && dockerID != "" || len(found) > 1:
		return http.StatusBadRequest, taskDocument{}
	case len(found) == 0:
		return http.StatusNotFound, taskDocument{}
	}
	return http.StatusOK, newTask(found[0])
}

// shortID is the longest beginning of a Docker id that stands for it.
const shortID = 12

func hasContainer(t *task.Task, id string) bool {
	for _, c := range t.Containers {
		if c.ID == id || len(id) <= shortID && c.ID != "" && strings.HasPrefix(c.ID, id) {
			return true
		}
	}
	return false
}
