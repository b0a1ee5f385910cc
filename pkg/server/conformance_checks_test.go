package server

import (
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"metad/pkg/task"
)

// validate is the agent's sample application, misc/taskmetadata-validator, check by check, on a
// task that has just started: no sample yet.
func validate(t *testing.T) {
	h := newHost(t, testConfig(), newTask())
	get := func(target string, into any) {
		t.Helper()
		r := h.get(t, addrT, target)
		if r.StatusCode != http.StatusOK {
			t.Fatalf("%s: got status %d", target, r.StatusCode)
		}
		if err := json.Unmarshal([]byte(r.body), into); err != nil {
			t.Fatalf("%s: %v", target, err)
		}
	}
	type limits struct{ CPU, Memory uint }
	type container struct {
		DockerID                         string `json:"DockerId"`
		Name, DockerName, Image, ImageID string
		Ports                            []struct{ ContainerPort, HostPort uint16 }
		Labels                           map[string]string
		DesiredStatus, KnownStatus       string
		ExitCode                         *int
		Limits                           limits
		CreatedAt, StartedAt, FinishedAt *time.Time
		Type                             string
		Networks                         []struct{ NetworkMode string }
	}
	var tk struct {
		Cluster, TaskARN, Family, Revision, DesiredStatus, KnownStatus string
		Containers                                                     []container
		Limits                                                         *limits
		PullStartedAt, PullStoppedAt, ExecutionStoppedAt               *time.Time
	}
	get("/v2/metadata", &tk)     // 1
	if len(tk.Containers) != 2 { // 2
		t.Fatalf("got %d containers, want 2", len(tk.Containers))
	}
	var id string
	for _, c := range tk.Containers { // 3
		if c.Type == "NORMAL" {
			id = c.DockerID
		}
	}
	if id == "" {
		t.Fatal("no NORMAL container with an id")
	}
	get("/v2/metadata/"+id, &container{}) // 4
	type stats struct {
		Read    time.Time `json:"read"`
		PreRead time.Time `json:"preread"`
	}
	get("/v2/stats", &map[string]*stats{}) // 5
	get("/v2/stats/"+id, &stats{})         // 6
}

// limitedHost is a host with a rate limit and a clock of its own.
type limitedHost struct {
	*host
	clock *fakeClock
}

var limitedRate = RateLimit{PerSecond: 2, Burst: 3}

func newLimited(t *testing.T) *limitedHost {
	t.Helper()
	cfg := testConfig()
	cfg.Rate = limitedRate
	clock := &fakeClock{}
	clock.advance(time.Hour)
	h := newStopped(t, cfg, newTask(), newOther())
	h.now = clock.of(h.start)
	h.listen(t)
	return &limitedHost{h, clock}
}

// exhaust asks for a path until the burst is used up, and returns the answer after that.
func (h *limitedHost) exhaust(t *testing.T) reply {
	t.Helper()
	for i := range limitedRate.Burst {
		if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 200 {
			t.Fatalf("request %d: got %d", i, r.StatusCode)
		}
	}
	return h.get(t, addrT, "/v2/metadata")
}

const (
	sampleA = `{"read":"2024-01-02T03:04:05Z","id":"` + idA + `"}`
	sampleP = `{"read":"2024-01-02T03:04:05Z","id":"` + idP + `"}`
)

// sampled is T with a sample of each container.
func sampled() *task.Task {
	tk := newTask()
	tk.Containers[0].Stats.Store(&task.Sample{JSON: []byte(sampleA), V2: len(sampleA) - 1})
	tk.Containers[1].Stats.Store(&task.Sample{JSON: []byte(sampleP), V2: len(sampleP) - 1})
	return tk
}

func stop(c *task.Container) {
	code := 0
	c.PID, c.State, c.ExitCode = 0, "exited", &code
	c.KnownStatus = task.StatusStopped
	c.FinishedAt = time.Date(2024, 1, 2, 3, 4, 7, 0, time.UTC)
}

var unknownBody = `"Unable to get task arn from request: unable to associate '` + addrU.String() +
	`' with task"`

func unknown(t *testing.T, target string) {
	t.Helper()
	h := newHost(t, testConfig(), newTask())
	want(t, h.get(t, addrU, target), 400, typeJSON, unknownBody)
}

// wantNoContainer asks for a container by id, as it stands in the path, and wants to be told that
// there is no such thing, named as shown.
func wantNoContainer(t *testing.T, id, shown string) {
	t.Helper()
	h := newHost(t, testConfig(), newTask(), newOther())
	want(t, h.get(t, addrT, "/v2/metadata/"+id), 400, typeJSON, `"Unable to generate metadata for container '`+shown+`'"`)
}

func moved(t *testing.T, target, location string) {
	t.Helper()
	h := newHost(t, testConfig(), newTask())
	r := h.get(t, addrT, target)
	if got := r.Header.Get("Location"); r.StatusCode != 301 || got != location {
		t.Errorf("%s: got %d to %q, want 301 to %q", target, r.StatusCode, got, location)
	}
	if got := r.Header.Values("X-Rate-Limit-Limit"); got != nil {
		t.Errorf("%s: X-Rate-Limit-Limit: got %q, want none", target, got)
	}
}

// taskOf returns the document that a task with tk's containers and limits is told of itself.
func taskOf(t *testing.T, tk *task.Task) string {
	t.Helper()
	h := newHost(t, testConfig(), tk)
	r := h.get(t, addrT, "/v2/metadata")
	want(t, r, 200, typeJSON, r.body)
	return r.body
}

func containerOf(t *testing.T, c *task.Container) string {
	t.Helper()
	tk := newTask()
	tk.Containers = []*task.Container{c}
	h := newHost(t, testConfig(), tk)
	r := h.get(t, addrT, "/v2/metadata/"+c.ID)
	want(t, r, 200, typeJSON, r.body)
	return r.body
}

type shownContainer struct {
	DockerID                string `json:"DockerId"`
	Name, Type, KnownStatus string
	Networks                json.RawMessage
}

type shownTask struct{ Containers []shownContainer }

func decode(t *testing.T, doc string) (d shownTask) {
	t.Helper()
	if err := json.Unmarshal([]byte(doc), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

var containersMember = regexp.MustCompile(`"Containers":\[.*\]`)

func stripContainers(doc string) string { return containersMember.ReplaceAllString(doc, "") }

// keysOf checks a JSON object's own keys, in order.
func keysOf(t *testing.T, doc string, want ...string) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(doc))
	if _, err := dec.Token(); err != nil {
		t.Fatal(err)
	}
	var got []string
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, key.(string))
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("keys: got %v, want %v", got, want)
	}
}

func want(t *testing.T, r reply, status int, contentType, body string) {
	t.Helper()
	if r.StatusCode != status || r.Header.Get("Content-Type") != contentType || r.body != body {
		t.Errorf("got %d %q %s\nwant %d %q %s", r.StatusCode, r.Header.Get("Content-Type"),
			r.body, status, contentType, body)
	}
}

func has(t *testing.T, s, part string) {
	t.Helper()
	if !strings.Contains(s, part) {
		t.Errorf("no %s in %s", part, s)
	}
}

func lacks(t *testing.T, s, part string) {
	t.Helper()
	if strings.Contains(s, part) {
		t.Errorf("%s in %s", part, s)
	}
}
