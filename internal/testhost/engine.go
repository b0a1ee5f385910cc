package testhost

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/network"
)

// Engine is a fake Docker Engine that speaks list, inspect and events (API 1.41) on a unix socket.
// Its documents are as long as a real Engine's.
type Engine struct {
	Socket string

	mu         sync.Mutex // guards what follows
	containers map[string]*told
	events     [][]byte // the last ones, oldest first
	times      []int64  // of events, Unix nanoseconds
	more       chan struct{}
	unknown    map[string]int // paths asked for that it has no answer to
}

// told is what the Engine reports about a container.
type told struct {
	summary container.Summary
	inspect []byte
	created time.Time
}

// keptEvents is how many past events an Engine keeps for its clients (moby: daemon/events).
const keptEvents = 256

func newEngine(t testing.TB) *Engine {
	t.Helper()
	e := &Engine{Socket: filepath.Join(t.TempDir(), "docker.sock"),
		containers: map[string]*told{},
		more:       make(chan struct{}), unknown: map[string]int{}}
	ln, err := net.Listen("unix", e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: e}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return e
}

// Unknown returns the requested paths that the Engine does not know.
func (e *Engine) Unknown() map[string]int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.unknown
}

// InspectBytes returns how long a container's inspect is.
func (e *Engine) InspectBytes(c *Container) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.containers[c.ID].inspect)
}

var apiPath = regexp.MustCompile(`^/v1\.\d+(/.*)$`)

// ServeHTTP implements http.Handler.
func (e *Engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Api-Version", "1.41")
	w.Header().Set("Ostype", "linux")
	path := r.URL.Path
	if m := apiPath.FindStringSubmatch(path); m != nil {
		path = m[1]
	}
	id, isInspect := strings.CutPrefix(path, "/containers/")
	id, ends := strings.CutSuffix(id, "/json")
	switch {
	case path == "/_ping":
		_, _ = w.Write([]byte("OK"))
	case path == "/events":
		e.serveEvents(w, r)
	case path == "/containers/json":
		answer(w, e.list())
	case isInspect && ends:
		e.mu.Lock()
		c := e.containers[id]
		e.mu.Unlock()
		if c == nil {
			http.Error(w, `{"message":"No such container: `+id+`"}`,
				http.StatusNotFound)
			return
		}
		answer(w, c.inspect)
	case path == "/networks":
		answer(w, []byte("[]"))
	case strings.HasPrefix(path, "/images/") && strings.HasSuffix(path, "/json"):
		answer(w, []byte(`{"Id":"sha256:`+strings.Repeat("5", 64)+
			`","Config":{"Labels":{"maintainer":"somebody"}}}`))
	default:
		e.mu.Lock()
		e.unknown[path]++
		e.mu.Unlock()
		http.Error(w, `{"message":"page not found"}`, http.StatusNotFound)
	}
}

func answer(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(body)
}

func (e *Engine) list() []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*told, 0, len(e.containers))
	for _, c := range e.containers {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *told) int {
		return cmp.Or(b.created.Compare(a.created), cmp.Compare(a.summary.ID, b.summary.ID))
	})
	summaries := make([]*container.Summary, len(all))
	for i, c := range all {
		summaries[i] = &c.summary
	}
	b, err := json.Marshal(summaries)
	if err != nil {
		panic(err)
	}
	return b
}

// serveEvents streams the events since the requested time, and the new ones.
func (e *Engine) serveEvents(w http.ResponseWriter, r *http.Request) {
	since := time.Now().UnixNano()
	if text := r.URL.Query().Get("since"); text != "" {
		sec, nano, _ := strings.Cut(text, ".")
		s, err1 := strconv.ParseInt(sec, 10, 64)
		n, err2 := strconv.ParseInt(cmp.Or(nano, "0"), 10, 64)
		if err1 != nil || err2 != nil {
			http.Error(w, `{"message":"invalid since"}`, http.StatusBadRequest)
			return
		}
		since = s*int64(time.Second) + n
	}
	flusher := w.(http.Flusher)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	flusher.Flush()
	for {
		e.mu.Lock()
		var news [][]byte
		for i, at := range e.times {
			if at > since {
				news = append(news, e.events[i])
			}
		}
		if len(e.times) > 0 {
			since = max(since, e.times[len(e.times)-1])
		}
		more := e.more
		e.mu.Unlock()
		for _, ev := range news {
			if _, err := w.Write(ev); err != nil {
				return
			}
		}
		flusher.Flush()
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}

// tell sends an event. It is called with mu held.
func (e *Engine) tell(m events.Message) {
	if n := len(e.times); n > 0 { // one event, one time
		m.TimeNano = max(m.TimeNano, e.times[n-1]+1)
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	e.events, e.times = append(e.events, append(b, '\n')), append(e.times, m.TimeNano)
	if more := len(e.events) - keptEvents; more > 0 {
		e.events, e.times = slices.Clone(e.events[more:]), slices.Clone(e.times[more:])
	}
	close(e.more)
	e.more = make(chan struct{})
}

func (e *Engine) set(t *Task, c *Container, state *container.State, action events.Action) {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.containers[c.ID]
	created := time.Now().UTC()
	if old != nil {
		created = old.created
	}
	in := inspect(t, c, created, state)
	b, err := json.Marshal(in)
	if err != nil {
		panic(err)
	}
	e.containers[c.ID] = &told{inspect: b, created: created, summary: container.Summary{
		ID: c.ID, Names: []string{in.Name}, Image: image, ImageID: in.Image,
		Command: "/bin/server --listen 0.0.0.0:8080", Created: created.Unix(),
		State: state.Status, Status: "Up 2 hours", Labels: in.Config.Labels,
		Mounts: in.Mounts,
		NetworkSettings: &container.NetworkSettingsSummary{
			Networks: in.NetworkSettings.Networks},
	}}
	e.tell(t.event(c, action))
}

func (e *Engine) create(t *Task, c *Container) {
	e.set(t, c, &container.State{Status: "created", StartedAt: "0001-01-01T00:00:00Z",
		FinishedAt: "0001-01-01T00:00:00Z"}, events.ActionCreate)
}

func (e *Engine) started(t *Task, c *Container) {
	e.set(t, c, &container.State{Status: "running", Running: true, Pid: c.PID,
		StartedAt:  time.Now().UTC().Format(time.RFC3339Nano),
		FinishedAt: "0001-01-01T00:00:00Z"}, events.ActionStart)
}

func (e *Engine) stopped(t *Task, c *Container) {
	now := time.Now().UTC().Format(time.RFC3339Nano)
	e.set(t, c, &container.State{Status: "exited", ExitCode: 137, StartedAt: now,
		FinishedAt: now}, events.ActionDie)
}

func (e *Engine) destroy(t *Task, c *Container) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.containers, c.ID)
	e.tell(t.event(c, events.ActionDestroy))
}

const image = "111122223333.dkr.ecr.us-west-2.amazonaws.com/density/server:2026-11-25.1"

func dockerName(t *Task, c *Container) string {
	return "ecs-density-7-" + c.Name + "-" + t.ID[:20]
}

func labels(t *Task, c *Container) map[string]string {
	return map[string]string{
		"com.amazonaws.ecs.cluster": "density", "com.amazonaws.ecs.container-name": c.Name,
		"com.amazonaws.ecs.task-arn":                t.ARN,
		"com.amazonaws.ecs.task-definition-family":  "density",
		"com.amazonaws.ecs.task-definition-version": "7",
		"org.opencontainers.image.created":          "2026-11-25T10:00:00Z",
		"org.opencontainers.image.revision":         strings.Repeat("c0ffee", 6),
		"org.opencontainers.image.source": "https://git.example.com/platform/" +
			"density-server",
		"org.opencontainers.image.title": "density-server",
		"com.example.team":               "platform",
		"com.example.cost-center":        "4711",
		"maintainer":                     "Platform Team <platform@example.com>",
	}
}

// inspect is the answer of a real Engine for a container of an ECS task, 8 KB.
func inspect(t *Task, c *Container, created time.Time,
	state *container.State) *container.InspectResponse {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"AWS_EXECUTION_ENV=AWS_ECS_EC2"}
	for i := range 20 {
		env = append(env,
			fmt.Sprintf(
				"DENSITY_SETTING_%02d=a value that is about as long as values "+
					"of settings are, %d", i, i))
	}
	layer := "/var/lib/docker/overlay2/" + strings.Repeat("ab", 32)
	mode := container.NetworkMode("ecs")
	networks := map[string]*network.EndpointSettings{}
	if c == t.Containers[0] {
		ep := &network.EndpointSettings{NetworkID: strings.Repeat("1", 64)}
		if state.Running {
			ep.EndpointID, ep.IPPrefixLen = strings.Repeat("2", 64), 16
			ep.IPAddress, ep.Gateway = t.Addr.String(), t.Bridge.Gateway.Addr().String()
			ep.MacAddress = net.HardwareAddr(t.MAC[:]).String()
		}
		networks["ecs"] = ep
	} else {
		mode = container.NetworkMode("container:" + t.Containers[0].ID)
	}
	host := &container.HostConfig{NetworkMode: mode,
		RestartPolicy: container.RestartPolicy{Name: "no"},
		LogConfig: container.LogConfig{Type: "json-file",
			Config: map[string]string{"max-size": "10m", "max-file": "3"}}}
	host.CPUShares, host.Memory, host.CgroupParent = 256, 512<<20, "/ecs/"+t.ID
	var mounts []container.MountPoint
	for i := range 3 {
		name := fmt.Sprintf("ecs-density-7-data%d-%s", i, t.ID[:20])
		host.Binds = append(host.Binds, name+fmt.Sprintf(":/data/%d:rw", i))
		mounts = append(mounts, container.MountPoint{Type: "volume", Name: name,
			Source:      "/var/lib/docker/volumes/" + name + "/_data",
			Destination: fmt.Sprintf("/data/%d", i), Driver: "local", Mode: "rw",
			RW: true})
	}
	base := &container.ContainerJSONBase{
		ID: c.ID, Created: created.Format(time.RFC3339Nano), Path: "/bin/server",
		Args: []string{"--listen", "0.0.0.0:8080"}, State: state,
		Image: "sha256:" + strings.Repeat("5", 64), Name: "/" + dockerName(t, c),
		Driver: "overlay2", Platform: "linux", HostConfig: host,
		ResolvConfPath: "/var/lib/docker/containers/" + c.ID + "/resolv.conf",
		HostnamePath:   "/var/lib/docker/containers/" + c.ID + "/hostname",
		HostsPath:      "/var/lib/docker/containers/" + c.ID + "/hosts",
		LogPath:        "/var/lib/docker/containers/" + c.ID + "/" + c.ID + "-json.log",
	}
	base.GraphDriver.Name = "overlay2"
	base.GraphDriver.Data = map[string]string{"LowerDir": strings.Repeat(layer+"/diff:", 6),
		"MergedDir": layer + "/merged",
		"UpperDir":  layer + "/diff", "WorkDir": layer + "/work"}
	settings := &container.NetworkSettings{Networks: networks}
	settings.SandboxID, settings.SandboxKey = strings.Repeat("3", 64),
		"/var/run/docker/netns/"+c.ID[:12]
	return &container.InspectResponse{ContainerJSONBase: base, Mounts: mounts,
		NetworkSettings: settings,
		Config: &container.Config{Hostname: c.ID[:12], Image: image, Env: env,
			Labels: labels(t, c), WorkingDir: "/srv",
			Cmd: []string{"--listen", "0.0.0.0:8080"}}}
}
