package agent

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"metad/pkg/task"
)

// document is the agent's v4 document of the task derived, as far as it is of use.
const document = `{"Cluster":"default","TaskARN":"` + arn +
	`","Family":"web","Revision":"7","DesiredStatus":"RUNNING","KnownStatus":"RUNNING",
	"Limits":{"CPU":0.25,"Memory":512},"PullStartedAt":"2024-01-02T02:04:05.5Z","PullStoppedAt":"2024-01-02T02:04:06Z",
	"ExecutionStoppedAt":"2024-01-02T03:04:05Z","AvailabilityZone":"us-west-2b","LaunchType":"EC2","Containers":[
	{"DockerId":"a","ContainerARN":"arn:aws:ecs:us-west-2:111122223333:container/default/158d/0206","LogDriver":"awslogs",
	 "LogOptions":{"awslogs-group":"g","awslogs-stream":"s"},"RestartCount":2,
	 "Networks":[{"NetworkMode":"awsvpc","IPv4Addresses":["192.0.2.3"],"AttachmentIndex":0,"MACAddress":"02:00:00:00:00:01",
	 "IPv4SubnetCIDRBlock":"192.0.2.0/24","PrivateDNSName":"ip-192-0-2-3.ec2.internal","SubnetGatewayIpv4Address":"192.0.2.1/24",
	 "DomainNameServers":["192.0.2.2"],"DomainNameSearchList":["ec2.internal"]}]},
	{"DockerId":"gone"}],"VPCID":"vpc-1","ServiceName":"shop","FaultInjectionEnabled":true,"AvailabilityZoneID":"usw2-az2"}`

// withEndpoint is derived with an id that the agent has put into a container's environment.
func withEndpoint() *task.Task {
	t := derived()
	t.LaunchType = "EXTERNAL"
	t.Containers[0].EndpointID = "eid"
	return t
}

// taskEndpoint is an agent's task endpoint that counts what it is asked.
type taskEndpoint struct {
	*httptest.Server
	mu    sync.Mutex
	paths []string
}

func newTaskEndpoint(t *testing.T, answer http.HandlerFunc) *taskEndpoint {
	t.Helper()
	e := &taskEndpoint{}
	e.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter,
		r *http.Request) {
		e.mu.Lock()
		e.paths = append(e.paths, r.URL.Path)
		e.mu.Unlock()
		answer(w, r)
	}))
	t.Cleanup(e.Close)
	return e
}

// run runs a client of e alone and returns it with the channel that gets a token at each call of
// Changed.
func run(t *testing.T, e *taskEndpoint) (*Client, <-chan struct{}) {
	t.Helper()
	changed := make(chan struct{}, 100)
	cfg := DefaultConfig()
	cfg.URL, cfg.TaskURL, cfg.Changed = "", e.URL, func(...string) { changed <- struct{}{} }
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { c.Run(ctx); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return c, changed
}

// What only the agent knows of a task is in the task soon after Docker has told of it.
func TestFactsOfDocument(t *testing.T) {
	e := newTaskEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, document)
	})
	c, changed := run(t, e)
	got := withEndpoint()
	c.Enrich(got)
	if !reflect.DeepEqual(got, withEndpoint()) {
		t.Errorf("before an answer: got %+v", got)
	}
	select {
	case <-changed:
	case <-time.After(30 * time.Second):
		t.Fatal("Changed was not called")
	}
	c.Enrich(got)
	want := withEndpoint()
	want.Limits = task.TaskLimits{CPU: 0.25, Memory: 512}
	want.PullStartedAt = time.Date(2024, 1, 2, 2, 4, 5, 5e8, time.UTC)
	want.PullStoppedAt = time.Date(2024, 1, 2, 2, 4, 6, 0, time.UTC)
	want.ExecutionStoppedAt = time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)
	want.AvailabilityZone, want.AvailabilityZoneID, want.LaunchType = "us-west-2b", "usw2-az2",
		"EC2"
	want.VPCID, want.ServiceName, want.FaultInjectionEnabled = "vpc-1", "shop", true
	app := want.Containers[0]
	app.ARN = "arn:aws:ecs:us-west-2:111122223333:container/default/158d/0206"
	app.LogDriver, app.LogOptions = "awslogs", map[string]string{"awslogs-group": "g",
		"awslogs-stream": "s"}
	app.RestartPolicy, app.RestartCount = true, 2
	app.Networks = []task.Network{{Mode: "awsvpc", IPv4Addresses: []string{"192.0.2.3"},
		NetworkDetails: task.NetworkDetails{
			MAC: "02:00:00:00:00:01", Subnet: "192.0.2.0/24",
			SubnetGateway: "192.0.2.1/24", DNSName: "ip-192-0-2-3.ec2.internal",
			DNSServers: []string{"192.0.2.2"}, DNSSearch: []string{"ec2.internal"}}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if e.mu.Lock(); e.paths[0] != "/v4/eid/task" {
		t.Errorf("asked %v", e.paths)
	}
	e.mu.Unlock()

	// What Docker and the operator know stays.
	given := withEndpoint()
	given.AvailabilityZone = "eu-west-1a"
	given.Containers[0].RestartPolicy, given.Containers[0].RestartCount = true, 7
	given.Containers[0].Networks = []task.Network{{Mode: "awsvpc",
		IPv4Addresses: []string{"192.0.2.9"}}}
	c.Enrich(given)
	if n := given.Containers[0]; given.AvailabilityZone != "eu-west-1a" ||
		n.RestartCount != 7 || n.Networks[0].IPv4Addresses[0] != "192.0.2.9" ||
		n.Networks[0].MAC == "" {
		t.Errorf("got %+v, %+v", given, n)
	}
}

// An answer that is not the task's own document adds nothing: a container chooses its environment.
func TestForeignDocument(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"another task's": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, strings.ReplaceAll(document, "158d", "other"))
		},
		"not found": func(w http.ResponseWriter, r *http.Request) { http.Error(w, `"no such id"`, http.StatusNotFound) },
		"a failure": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, `"Unable to generate"`, http.StatusInternalServerError)
		},
		"limited":  func(w http.ResponseWriter, r *http.Request) { http.Error(w, "", http.StatusTooManyRequests) },
		"not JSON": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "<html>") },
		"of another type": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, `{"TaskARN":"`+arn+`","PullStartedAt":""}`)
		},
	} {
		e := newTaskEndpoint(t, answer)
		cfg := DefaultConfig()
		cfg.TaskURL = e.URL
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := c.document(t.Context(), arn, "eid"); f != nil || err != nil {
			t.Errorf("%s: got %+v, %v", name, f, err)
		}
	}
}

// The agent is not asked about tasks that it has not made, nor again about one that has not
// changed.
func TestWhoIsAskedFor(t *testing.T) {
	d := &documents{tasks: map[string]*asked{}, wake: make(chan struct{}, 1)}
	now := time.Now()
	made := withEndpoint()
	made.MadeUp = true
	d.enrich(made, now)
	d.enrich(derived(), now)
	if _, _, wait := d.next(now); wait != askAgain || len(d.tasks) != 0 {
		t.Fatalf("got %v until a question", wait)
	}
	tk := withEndpoint()
	var asks []time.Duration
	at := func(until time.Duration) (asks []time.Duration) {
		for after := time.Duration(0); after <= until; after += time.Second {
			for {
				of, endpoint, _ := d.next(now.Add(after))
				if of == "" {
					break
				}
				asks = append(asks, after)
				d.answered(of, endpoint, &facts{TaskARN: of})
			}
			d.enrich(tk, now.Add(after)) // nothing new
		}
		return asks
	}
	d.enrich(tk, now)
	asks = at(1300 * time.Second)
	if want := []time.Duration{0, 2 * time.Second, 15 * time.Second, 600 * time.Second,
		1200 * time.Second}; !slices.Equal(asks, want) {
		t.Errorf("asked at %v, want %v", asks, want)
	}
	now = now.Add(time.Hour)
	tk.Containers[0].KnownStatus = task.StatusStopped
	d.enrich(tk, now)
	if asks = at(10 * time.Second); !slices.Equal(asks, []time.Duration{0, 2 * time.Second}) {
		t.Errorf("after a change: asked at %v", asks)
	}
}

// metad forgets a task that the agent has forgotten, and the memory for tasks is bounded.
func TestTasksAreBounded(t *testing.T) {
	d := &documents{tasks: map[string]*asked{}, wake: make(chan struct{}, 1)}
	now := time.Now()
	for i := range maxTasks + 10 {
		tk := withEndpoint()
		tk.ARN = fmt.Sprint(i)
		d.enrich(tk, now)
	}
	if len(d.tasks) != maxTasks {
		t.Errorf("got %d tasks, want %d", len(d.tasks), maxTasks)
	}
	for arn := range d.tasks {
		for range askAfter {
			d.answered(arn, "eid", nil)
		}
	}
	if len(d.tasks) != 0 {
		t.Errorf("got %d tasks that the agent does not know", len(d.tasks))
	}
}

// If the agent hangs up, metad pauses, and does not ask it for each task.
func TestAgentAwayIsLeftAlone(t *testing.T) {
	e := newTaskEndpoint(t, func(w http.ResponseWriter, r *http.Request) {
		if hj, ok := w.(http.Hijacker); ok {
			nc, _, _ := hj.Hijack()
			nc.Close()
		}
	})
	c, _ := run(t, e)
	for i := range 100 {
		tk := withEndpoint()
		tk.ARN = fmt.Sprint(i)
		c.Enrich(tk)
	}
	start := time.Now()
	time.Sleep(500 * time.Millisecond) // nothing is to happen: there is nothing to wait for
	e.mu.Lock()
	defer e.mu.Unlock()
	if most := 2 + int(time.Since(start)/time.Second); len(e.paths) > most {
		t.Errorf("asked %d times in half a second, want at most %d", len(e.paths), most)
	}
}
