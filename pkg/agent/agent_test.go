package agent

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/internal/expect"
	"metad/pkg/task"
)

const (
	arn      = "arn:aws:ecs:us-west-2:111122223333:task/default/158d"
	metadata = `{"Cluster":"prod","ContainerInstanceArn":"arn:ci","Version":"Amazon ECS Agent - v1.105.1 (8dfceca6)"}`
	tasks    = `{"Tasks":[{"Arn":"` + arn +
		`","DesiredStatus":"STOPPED","KnownStatus":"RUNNING","Family":"web","Version":"7","Containers":[
		{"DockerId":"a","DockerName":"ecs-web-7-app-00","Name":"app","Ports":[{"ContainerPort":80,"Protocol":"tcp","HostPort":80}],
		 "Networks":[{"NetworkMode":"awsvpc","IPv4Addresses":["192.0.2.3"]}]},
		{"DockerId":"gone"}]},{"Arn":"other","KnownStatus":"PENDING","Containers":null}]}`
)

// fakeAgent answers as the introspection API does: 200 whatever is asked.
func fakeAgent(t *testing.T, metadata, tasks *atomic.Value) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/metadata":
			fmt.Fprint(w, metadata.Load())
		case "/v1/tasks":
			fmt.Fprint(w, tasks.Load())
		default:
			fmt.Fprint(w,
				`{"AvailableCommands":["/v1/metadata","/v1/tasks","/license"]}`)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func value(s string) *atomic.Value {
	v := &atomic.Value{}
	v.Store(s)
	return v
}

func newClient(t *testing.T, url string) *Client {
	t.Helper()
	cfg := DefaultConfig()
	cfg.URL = url
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// derived is the task as Docker alone tells it.
func derived() *task.Task {
	return &task.Task{
		ARN: arn, Cluster: "default", Family: "web", Revision: "7",
		DesiredStatus: task.StatusRunning, KnownStatus: task.StatusCreated,
		Containers: []*task.Container{
			{ID: "a", Name: "app", DesiredStatus: task.StatusRunning, KnownStatus: task.StatusRunning},
			{ID: "p", Name: task.PauseName, Type: task.TypeCNIPause, DesiredStatus: task.StatusResourcesProvisioned, KnownStatus: task.StatusResourcesProvisioned},
		},
	}
}

func TestEnrich(t *testing.T) {
	c := newClient(t, fakeAgent(t, value(metadata), value(tasks)).URL)
	got := derived()
	c.Enrich(got) // before anything was asked
	if !reflect.DeepEqual(got, derived()) {
		t.Errorf("without an answer: got %+v", got)
	}
	if err := c.ask(context.Background()); err != nil {
		t.Fatal(err)
	}
	c.Enrich(got)
	eni := []task.Network{{Mode: "awsvpc", IPv4Addresses: []string{"192.0.2.3"}}}
	want := derived()
	want.Cluster, want.ContainerInstanceARN = "prod", "arn:ci"
	want.DesiredStatus, want.KnownStatus = task.StatusStopped, task.StatusRunning
	want.Containers[0].DesiredStatus, want.Containers[1].DesiredStatus = task.StatusStopped,
		task.StatusStopped
	want.Containers[0].Ports = []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 80}}
	want.Containers[0].Networks, want.Containers[1].Networks = eni, eni
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}

	// What Docker knows better stays.
	got = derived()
	got.KnownStatus = task.StatusStopped
	got.Containers[0].Ports = []task.Port{{ContainerPort: 81}}
	got.Containers[0].Networks = []task.Network{{Mode: "awsvpc",
		IPv4Addresses: []string{"192.0.2.4"}}}
	c.Enrich(got)
	if got.KnownStatus != task.StatusStopped ||
		got.Containers[0].Ports[0].ContainerPort != 81 ||
		got.Containers[0].Networks[0].IPv4Addresses[0] != "192.0.2.4" {
		t.Errorf("got %+v", got)
	}

	// A task that the agent does not know stays as it is.
	other := derived()
	other.ARN = "arn:aws:ecs:us-east-1:000000000000:task/docker/x"
	c.Enrich(other)
	if other.Cluster != "default" || other.ContainerInstanceARN != "" {
		t.Errorf("got %+v", other)
	}
}

func TestLater(t *testing.T) {
	f := func(derived task.Status, agents string, want task.Status) {
		t.Helper()
		if got := later(derived, agents); got != want {
			t.Errorf("%s, %s: got %s, want %s", derived, agents, got, want)
		}
	}
	f(task.StatusNone, "PENDING", task.StatusNone)
	f(task.StatusCreated, "PENDING", task.StatusCreated)
	f(task.StatusRunning, "PENDING", task.StatusRunning)
	f(task.StatusNone, "RUNNING", task.StatusRunning)
	f(task.StatusCreated, "RUNNING", task.StatusRunning)
	f(task.StatusRunning, "RUNNING", task.StatusRunning)
	f(task.StatusStopped, "RUNNING", task.StatusStopped)
	f(task.StatusRunning, "STOPPED", task.StatusStopped)
	f(task.StatusRunning, "", task.StatusRunning)
	f(task.StatusRunning, "SOMETHING", task.StatusRunning)
}

// An answer that is not the agent's changes nothing.
func TestAskErrors(t *testing.T) {
	m, ts := value(metadata), value(tasks)
	c := newClient(t, fakeAgent(t, m, ts).URL)
	if err := c.ask(context.Background()); err != nil {
		t.Fatal(err)
	}
	good := c.last.Load()
	f := func(metadata, tasks, text string) {
		t.Helper()
		m.Store(metadata)
		ts.Store(tasks)
		err := c.ask(context.Background())
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q, %q: got %v", metadata, tasks, err)
		}
		if c.last.Load() != good {
			t.Errorf("%q, %q: the last good answer is lost", metadata, tasks)
		}
	}
	f(`{"AvailableCommands":["/v1/metadata"]}`, tasks, "no cluster")
	f(`hello`, tasks, "/v1/metadata")
	f(metadata, `{"Tasks":[`, "/v1/tasks")
	f(metadata, `{"Tasks":{}}`, "/v1/tasks")
	f(metadata, strings.Repeat(" ", maxAnswer+1), "more than")

	gone := newClient(t, "http://127.0.0.1:1")
	if err := gone.ask(context.Background()); err == nil {
		t.Error("nobody there: no error")
	}
	s := httptest.NewServer(http.NotFoundHandler())
	defer s.Close()
	if err := newClient(t, s.URL).ask(context.Background()); err == nil ||
		!strings.Contains(err.Error(), "404") {
		t.Errorf("got %v", err)
	}
}

// Run calls Changed once for each new answer, logs only changes of state, and ends with its
// context.
func TestRun(t *testing.T) {
	m, ts := value(metadata), value(tasks)
	core, logs := observer.New(zap.InfoLevel)
	changed := make(chan []string, 10)
	cfg := DefaultConfig()
	cfg.URL = fakeAgent(t, m, ts).URL
	cfg.Every = time.Millisecond
	cfg.Changed = func(arns ...string) { changed <- arns }
	cfg.Log = zap.New(core)
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Run(ctx)
	}()
	if arns := <-changed; arns != nil {
		t.Errorf("the first answer concerns %q, want all tasks", arns)
	}
	m.Store("broken")
	expect.Until(t, "the log to say that there is no answer", func() bool {
		return logs.FilterMessageSnippet("does not answer").Len() > 0
	})
	ts.Store(`{"Tasks":[]}`)
	m.Store(metadata)
	if arns := <-changed; !slices.Equal(slices.Sorted(slices.Values(arns)),
		[]string{arn, "other"}) {
		t.Errorf("the new answer concerns %q, want the tasks that it lacks", arns)
	}
	if len(c.last.Load().tasks) != 0 {
		t.Error("the new answer is not there")
	}
	expect.Until(t, "the log to say that the agent answers", func() bool {
		return logs.FilterMessageSnippet("answers").Len() > 0
	})
	cancel()
	<-done
	if n := len(changed); n != 0 {
		t.Errorf("%d changes too many", n)
	}
	if n := logs.FilterMessageSnippet("does not answer").Len(); n != 1 {
		t.Errorf("logged the failure %d times, want once", n)
	}
}

func TestNewErrors(t *testing.T) {
	f := func(field string, change func(*Config)) {
		t.Helper()
		cfg := DefaultConfig()
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: got %v", field, err)
		}
	}
	f("URL", func(c *Config) { c.URL = "127.0.0.1:51678" })
	f("URL", func(c *Config) { c.URL = "http://[" })
	f("Every", func(c *Config) { c.Every = 0 })
	f("Timeout", func(c *Config) { c.Timeout = 0 })
	f("Log", func(c *Config) { c.Log = nil })
}

// An answer concerns the tasks about which it says something else, or all if it is about the host.
func TestDiffering(t *testing.T) {
	f := func(metadataNow, tasksNow string, same bool, want ...string) {
		t.Helper()
		before, err1 := parse([]byte(metadata), []byte(tasks))
		a, err2 := parse([]byte(metadataNow), []byte(tasksNow))
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if got := a.differing(before); !slices.Equal(got, want) ||
			a.sameHost(before) != same {
			t.Errorf("got %q and the same host %v, want %q and %v", got,
				a.sameHost(before), want, same)
		}
	}
	f(metadata, tasks, true)
	f(metadata, strings.Replace(tasks, "192.0.2.3", "192.0.2.4", 1), true, arn)
	f(metadata, strings.Replace(tasks, "PENDING", "RUNNING", 1), true, "other")
	f(metadata, strings.Replace(tasks, `"other"`, `"another"`, 1), true, "another", "other")
	f(strings.Replace(metadata, "prod", "test", 1), tasks, false)
}

// Whatever a server on the agent's TCP port answers, a task keeps its name and its containers, and
// no status goes back.
func FuzzParse(f *testing.F) {
	f.Add([]byte(metadata), []byte(tasks))
	f.Add([]byte(`{"Cluster":"c","ContainerInstanceArn":null}`),
		[]byte(`{"Tasks":[null,{"Arn":"`+arn+
			`","Containers":[{"DockerId":""},{"DockerId":"p","Networks":[{}]}]}]}`))
	f.Fuzz(func(t *testing.T, metadata, tasks []byte) {
		a, err := parse(metadata, tasks)
		if err != nil {
			return
		}
		c := &Client{}
		c.last.Store(a)
		got, want := derived(), derived()
		c.Enrich(got)
		if got.ARN != want.ARN || len(got.Containers) != len(want.Containers) ||
			got.Containers[0].ID != "a" {
			t.Errorf("got %+v", got)
		}
		if order[got.KnownStatus] < order[want.KnownStatus] ||
			order[got.DesiredStatus] < order[want.DesiredStatus] {
			t.Errorf("status went back: %s, %s", got.KnownStatus, got.DesiredStatus)
		}
		task.Render(got)
	})
}
