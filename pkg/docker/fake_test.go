package docker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/versions"
	"github.com/docker/docker/client"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"metad/pkg/task"
)

func testLog(t testing.TB) *zap.Logger { return zaptest.NewLogger(t) }

// fakeEngine answers nothing.
type fakeEngine struct{ Engine }

// engine is a Docker Engine over a real socket whose faults a test chooses.
type engine struct {
	t      testing.TB
	socket string
	server *http.Server

	mu         sync.Mutex
	containers map[string]*container.InspectResponse
	streams    map[chan events.Message]bool
	inspects   int
	lists      int
	created    int
	emitted    uint64
	asked      []string // paths of images and networks

	images   map[string]map[string]string // their labels, by id
	networks []network.Inspect
	version  string // refuses clients of lower ones; "": none

	onInspect func(id string)                  // before an inspect is answered; may block
	onList    func(w http.ResponseWriter) bool // true: it has answered
}

func startEngine(t testing.TB) *engine {
	t.Helper()
	e := &engine{t: t, socket: filepath.Join(t.TempDir(), "docker.sock"),
		containers: map[string]*container.InspectResponse{},
		streams:    map[chan events.Message]bool{}}
	e.up()
	t.Cleanup(e.down)
	return e
}

func (e *engine) up() {
	l, err := net.Listen("unix", e.socket)
	if err != nil {
		e.t.Fatal(err)
	}
	e.server = &http.Server{Handler: e}
	go e.server.Serve(l)
}

// down ends the engine with all its connections.
func (e *engine) down() { e.server.Close() }

func (e *engine) client() *client.Client {
	c, err := client.NewClientWithOpts(client.WithHost("unix://"+e.socket),
		client.WithVersion("1.41"))
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { c.Close() })
	return c
}

var inspectPath = regexp.MustCompile(`/containers/([^/]+)/json$`)

func (e *engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if v := strings.TrimPrefix(strings.SplitN(r.URL.Path, "/", 3)[1], "v"); e.least() != "" &&
		v != "_ping" && versions.LessThan(v, e.least()) {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w,
			`{"message":"client version %s is too old. Minimum supported API version is %s"}`, v, e.least())
		return
	}
	switch {
	case strings.HasSuffix(r.URL.Path, "/containers/json"):
		e.mu.Lock()
		e.lists++
		hook := e.onList
		e.mu.Unlock()
		if hook != nil && hook(w) {
			return
		}
		json.NewEncoder(w).Encode(e.list())
	case strings.HasSuffix(r.URL.Path, "/events"):
		e.events(w, r)
	case strings.HasSuffix(r.URL.Path, "/_ping"):
		w.Header().Set("Api-Version", cmp.Or(e.least(), "1.41"))
	case strings.Contains(r.URL.Path, "/images/"), strings.Contains(r.URL.Path, "/networks"):
		e.others(w, r.URL.Path)
	default:
		m := inspectPath.FindStringSubmatch(r.URL.Path)
		if m == nil {
			http.Error(w, "{}", http.StatusNotImplemented)
			return
		}
		e.mu.Lock()
		e.inspects++
		hook := e.onInspect
		e.mu.Unlock()
		if hook != nil {
			hook(m[1])
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		c := e.containers[m[1]]
		if c == nil {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"message":"No such container: %s"}`, m[1])
			return
		}
		json.NewEncoder(w).Encode(c)
	}
}

func (e *engine) least() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.version
}

// others answers for images and networks.
func (e *engine) others(w http.ResponseWriter, path string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = append(e.asked, path[strings.Index(path[1:], "/")+1:])
	if strings.HasSuffix(path, "/networks") {
		json.NewEncoder(w).Encode(e.networks)
		return
	}
	for id, labels := range e.images {
		if strings.HasSuffix(path, "/images/"+id+"/json") {
			json.NewEncoder(w).Encode(map[string]any{"Id": id,
				"Config": map[string]any{"Labels": labels}})
			return
		}
	}
	for _, n := range e.networks {
		if strings.HasSuffix(path, "/networks/"+n.Name) {
			json.NewEncoder(w).Encode(n)
			return
		}
	}
	w.WriteHeader(http.StatusNotFound)
	fmt.Fprint(w, `{"message":"no such thing"}`)
}

func (e *engine) list() []container.Summary {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := []container.Summary{}
	for id, c := range e.containers {
		s := container.Summary{ID: id, Names: []string{c.Name}, State: c.State.Status,
			NetworkSettings: &container.NetworkSettingsSummary{
				Networks: c.NetworkSettings.Networks}}
		list = append(list, s)
	}
	return list
}

func (e *engine) events(w http.ResponseWriter, r *http.Request) {
	ch := make(chan events.Message, 10000)
	e.mu.Lock()
	e.streams[ch] = true
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		delete(e.streams, ch)
		e.mu.Unlock()
	}()
	w.(http.Flusher).Flush()
	enc := json.NewEncoder(w)
	for {
		select {
		case m := <-ch:
			enc.Encode(m)
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func (e *engine) emit(action events.Action, id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	attributes := map[string]string{}
	if c := e.containers[id]; c != nil { // as the Engine has it: the labels, and these
		maps.Copy(attributes, c.Config.Labels)
		attributes["name"], attributes["image"] = strings.TrimPrefix(c.Name, "/"),
			c.Config.Image
	}
	for ch := range e.streams {
		e.emitted++
		ch <- events.Message{Type: events.ContainerEventType, Action: action,
			Actor:    events.Actor{ID: id, Attributes: attributes},
			TimeNano: time.Now().UnixNano()}
	}
}

// run adds a running container without telling anybody, and returns its id.
func (e *engine) run(change ...func(*container.InspectResponse)) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.created++
	n := e.created
	id := fmt.Sprintf("%x", sha256.Sum256([]byte{byte(n >> 16), byte(n >> 8), byte(n)}))
	started := time.Now().UTC()
	c := &container.InspectResponse{
		ContainerJSONBase: &container.ContainerJSONBase{ID: id,
			Name: fmt.Sprintf("/c%d", n), Created: started.Format(time.RFC3339Nano),
			State: &container.State{Status: "running", Running: true, Pid: 100 + n,
				StartedAt: started.Format(time.RFC3339Nano)},
			HostConfig: &container.HostConfig{NetworkMode: "bridge"}},
		Config: &container.Config{Image: "i"},
		NetworkSettings: &container.NetworkSettings{
			Networks: map[string]*network.EndpointSettings{
				"bridge": {IPAddress: netip.AddrFrom4([4]byte{172, 17, byte(n >> 8), byte(n)}).String()}}},
	}
	for _, f := range change {
		f(c)
	}
	e.containers[id] = c
	return id
}

// change changes a container without telling anybody.
func (e *engine) change(id string, f func(*container.InspectResponse)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := copyOf(e.t, e.containers[id]) // the old may be being sent
	f(&c)
	e.containers[id] = &c
}

func copyOf(t testing.TB, c *container.InspectResponse) (other container.InspectResponse) {
	b, _ := json.Marshal(c)
	if err := json.Unmarshal(b, &other); err != nil {
		t.Error(err)
	}
	return other
}

func stopped(c *container.InspectResponse) {
	*c.State = container.State{Status: "exited", StartedAt: c.State.StartedAt,
		FinishedAt: time.Now().UTC().Format(time.RFC3339Nano)}
}

func (e *engine) remove(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.containers, id)
}

func (e *engine) counts() (inspects, lists int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.inspects, e.lists
}

// told returns how many events were emitted to somebody.
func (e *engine) told() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.emitted
}

// watched is a Follower of an engine, with what it has told.
type watched struct {
	*Follower
	mu      sync.Mutex
	tasks   []*task.Task
	applies int
	called  chan struct{} // holds a token after an Apply
	readNS  func(*task.Container) (*namespace, error)
}

// fakeNamespace is what would be found in the namespace of c: its addresses, at ports numbered by
// the process.
func fakeNamespace(c *task.Container) (*namespace, error) {
	ns := &namespace{inode: uint64(c.PID)}
	for _, addr := range assigned(c) {
		ns.endpoints = append(ns.endpoints, task.Endpoint{Addr: addr, Ifindex: c.PID})
	}
	return ns, nil
}

func watch(t testing.TB, e *engine, change ...func(*Config)) *watched {
	t.Helper()
	w := newWatched(t, e, change...)
	w.start(t)
	select {
	case <-w.Synced():
	case <-time.After(30 * time.Second):
		t.Fatal("no first Apply")
	}
	return w
}

func newWatched(t testing.TB, e *engine, change ...func(*Config)) *watched {
	t.Helper()
	w := &watched{called: make(chan struct{}, 1), readNS: fakeNamespace}
	cfg := Config{Engine: e.client(), Log: zap.NewNop(), ReconcileEvery: time.Hour,
		Apply: func(tasks []*task.Task) {
			w.mu.Lock()
			w.tasks = tasks
			w.applies++
			w.mu.Unlock()
			select {
			case w.called <- struct{}{}:
			default:
			}
		}}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	if w.Follower, err = newFollower(cfg); err != nil {
		t.Fatal(err)
	}
	w.state.inode = func(pid int) uint64 { return uint64(pid) }
	w.read = func(c *task.Container) (*namespace, error) {
		w.mu.Lock()
		f := w.readNS
		w.mu.Unlock()
		return f(c)
	}
	return w
}

func (w *watched) start(t testing.TB) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(30 * time.Second):
			t.Error("Run does not end")
		}
	})
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func (w *watched) current() []*task.Task {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tasks
}

func (w *watched) until(t testing.TB, what string, ok func([]*task.Task) bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		tasks := w.current()
		if ok(tasks) {
			return
		}
		select {
		case <-w.called:
		case <-deadline:
			t.Fatalf("waited in vain for: %s; have %s", what, show(tasks))
		}
	}
}

func find(tasks []*task.Task, id string) (*task.Task, *task.Container) {
	for _, tk := range tasks {
		if c := tk.Container(id); c != nil {
			return tk, c
		}
	}
	return nil, nil
}

// up reports that id runs and has an endpoint.
func up(id string) func([]*task.Task) bool {
	return func(tasks []*task.Task) bool {
		tk, c := find(tasks, id)
		return c != nil && c.KnownStatus == task.StatusRunning && len(tk.Endpoints) == 1
	}
}
