package server

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/pkg/task"
)

// The agent's documents of T, recognisable.
const (
	agentsTask      = `{"TaskARN":"` + arnT + `","LaunchType":"EC2"}`
	agentsContainer = `{"DockerId":"` + idA + `","LogDriver":"awslogs"}`
)

// documentAgent answers as the ECS agent does of T, with one status for everything if that is set.
type documentAgent struct {
	status atomic.Int32
	asked  atomic.Int32
	hang   atomic.Pointer[chan struct{}] // closed: go on
}

func (a *documentAgent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.asked.Add(1)
	if ch := a.hang.Load(); ch != nil {
		select {
		case <-*ch:
		case <-r.Context().Done():
		}
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if status := a.status.Load(); status != 0 {
		w.WriteHeader(int(status))
		return
	}
	version, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	body := map[string]string{
		endpointA: agentsContainer, endpointA + "/task": agentsTask, endpointA + "/taskWithTags": taggedT,
		endpointA + "/stats": `{"agents":1}`,
	}[rest]
	if body == "" {
		w.WriteHeader(404)
		body = `"` + version + ` from v3 endpoint ID: "`
	}
	_, _ = io.WriteString(w, body)
}

// beside returns a host beside an agent, and what the host logs.
func beside(t *testing.T, a http.Handler, change ...func(*Config)) (*host, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	cfg := serveAgent(t, a).config()
	cfg.Log = zap.New(core)
	for _, f := range change {
		f(&cfg)
	}
	return newHost(t, cfg, newAwsvpc(), newOther(), newShop()), logs
}

func ownContainer(v task.Version) string {
	_, each := task.Render(newAwsvpc())
	return each[0][v].String()
}

// Metadata of a container whose id the agent made is the agent's, however the container is named;
// statistics and streams are metad's own, and so is everything of other containers.
func TestAgentsDocuments(t *testing.T) {
	a := &documentAgent{}
	h, _ := beside(t, a)
	for _, v := range []string{"/v3/", "/v4/"} {
		want(t, h.get(t, addrU, v+endpointA), 200, typeJSON, agentsContainer)
		want(t, h.get(t, addrU, v+endpointA+"/task"), 200, typeJSON, agentsTask)
		want(t, h.get(t, addrU, v+endpointA+"/taskWithTags"), 200, typeJSON, taggedT)
		for _, self := range []string{v + "self", v + "containers/app"} {
			want(t, h.get(t, addrT, self), 200, typeJSON, agentsContainer)
			want(t, h.get(t, addrT, self+"/task"), 200, typeJSON, agentsTask)
			want(t, h.get(t, addrT, self+"/taskWithTags"), 200, typeJSON, taggedT)
		}
	}
	if r := h.do(t, addrT, "HEAD", "/v4/"+endpointA); r.StatusCode != 200 ||
		r.ContentLength != int64(len(agentsContainer)) {
		t.Errorf("HEAD: got %d, length %d", r.StatusCode, r.ContentLength)
	}
	want(t, h.send(t, addrT, "POST /v4/"+endpointA+" HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"), 200, typeJSON, agentsContainer)
	if r := h.get(t, addrT, "/v4"); r.Header.Get("X-Rate-Limit-Limit") != "40.00" {
		t.Errorf("got %v", r.Header)
	}
	asked := a.asked.Load()
	want(t, h.get(t, addrU, "/v4/"+endpointA+"/stats"), 200, typeJSON, string(v4Sample(idA).JSON))
	want(t, h.get(t, addrT, "/v4/task/stats"), 200, typeJSON, `{"`+idA+`":`+string(v4Sample(idA).JSON)+`,"`+idP+`":{}}`)
	want(t, h.get(t, addrW, "/v4"), 200, typeJSON, shopDocument(task.V4, 0))
	want(t, h.get(t, addrW, "/v4/"+endpointD+"/task"), 200, typeJSON, taskDocument(task.V4, newShop()))
	want(t, h.get(t, addrT, "/v2/metadata"), 200, typeJSON, taskDocument(task.V2, newAwsvpc()))
	want(t, h.get(t, addrT, "/v4/containers/~internal~ecs~pause"), 200, typeJSON, containerDocumentOf(newAwsvpc(), 1))
	if n := a.asked.Load() - asked; n != 0 {
		t.Errorf("the agent was asked %d times for what metad has", n)
	}
	if got := h.Counters(); got.AgentAway+got.AgentDisowned != 0 {
		t.Errorf("got %+v", got)
	}
}

func containerDocumentOf(tk *task.Task, i int) string {
	_, each := task.Render(tk)
	return each[i][task.V4].String()
}

// An id that metad does not know may still be the agent's: the request is passed on. Where nothing
// listens, the client is told what the agent tells of an unknown id.
func TestUnknownIDIsPassedOn(t *testing.T) {
	a := &documentAgent{}
	h, _ := beside(t, a)
	const unknown = "11111111-2222-3333-4444-555555555555"
	r := h.get(t, addrU, "/v4/"+unknown)
	if r.StatusCode != 404 || r.body != `"v4 from v3 endpoint ID: "` || a.asked.Load() != 1 {
		t.Errorf("got %d %s, asked %d times", r.StatusCode, r.body, a.asked.Load())
	}
	h.agent.Addr = refusing(t)
	wantText(t, h.get(t, addrU, "/v3/"+unknown), 500, v3Container+unknown)
	wantText(t, h.get(t, addrU, "/v4/"+unknown+"/stats"), 404, "V4 container stats handler: unable to get task arn from request: unable to get task Arn from v3 endpoint ID: "+unknown)
	want(t, h.get(t, addrU, "/v4/"+unknown+"/associations/x"), 404, typeText, "404 page not found\n")

	own, _ := beside(t, a, func(c *Config) { c.OwnIDsOnly = true })
	asked := a.asked.Load()
	for _, id := range []string{unknown, endpointA} {
		if r := own.get(t, addrU, "/v4/"+id); r.StatusCode != 404 ||
			a.asked.Load() != asked {
			t.Errorf("own ids only: got %d %s, asked %d times", r.StatusCode, r.body,
				a.asked.Load()-asked)
		}
	}
}

// Statistics that metad does not take are the agent's, of the agent's ids.
func TestNoStatsIsPassedOn(t *testing.T) {
	h, _ := beside(t, &documentAgent{}, func(c *Config) { c.NoStats = true })
	want(t, h.get(t, addrT, "/v4/"+endpointA+"/stats"), 200, typeJSON, `{"agents":1}`)
	wantText(t, h.get(t, addrW, "/v4/"+endpointW+"/stats"), 500, "Unable to get container stats for: "+idW)
}

// An agent that answers with an error, does not know the id, or takes it for another container's,
// is asked again the next time; the answer is metad's own.
func TestAgentRefuses(t *testing.T) {
	a := &documentAgent{}
	h, logs := beside(t, a)
	for i, status := range []int32{500, 503, 404, 429, 204, 301} {
		a.status.Store(status)
		want(t, h.get(t, addrU, "/v4/"+endpointA), 200, typeJSON, ownContainer(task.V4))
		if n := a.asked.Load(); n != int32(i+1) {
			t.Errorf("%d: the agent was asked %d times", status, n)
		}
	}
	if got := h.Counters(); got.AgentAway != 2 || got.AgentDisowned != 4 {
		t.Errorf("got %+v, want 2 and 4", got)
	}
	if logs.Len() > 2 {
		t.Errorf("got %d lines: %v", logs.Len(), logs.All())
	}
	lying, _ := beside(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `{"DockerId":"`+idB+`","TaskARN":"`+arnB+`"}`)
	}))
	want(t, lying.get(t, addrU, "/v4/"+endpointA), 200, typeJSON, ownContainer(task.V4))
	want(t, lying.get(t, addrU, "/v4/"+endpointA+"/task"), 200, typeJSON, taskDocument(task.V4, newAwsvpc()))
	if n := lying.Counters().AgentDisowned; n != 2 {
		t.Errorf("counted %d, want 2", n)
	}
}

// While the agent is away, no request waits for it; one in a second has it asked again, and when it
// is back its documents are too. The log says each change once, the first at once.
func TestAgentAway(t *testing.T) {
	a := &documentAgent{}
	h, logs := beside(t, a, func(c *Config) { c.AgentPatience = 50 * time.Millisecond })
	var clock fakeClock
	start := time.Now()
	h.documents.now = func() time.Time { return clock.of(start)(nil) }
	want(t, h.get(t, addrU, "/v4/"+endpointA), 200, typeJSON, agentsContainer)
	goOn := make(chan struct{})
	a.hang.Store(&goOn)
	own := func() {
		t.Helper()
		want(t, h.get(t, addrU, "/v4/"+endpointA), 200, typeJSON, ownContainer(task.V4))
	}
	own()
	for range 20 {
		own()
	}
	if n := a.asked.Load(); n != 2 {
		t.Errorf("asked %d times, want twice: once a second", n)
	}
	clock.advance(retryEvery + 1)
	for range 20 {
		own()
	}
	eventually(t, "asked again", func() bool { return a.asked.Load() == 3 })
	a.hang.Store(nil)
	close(goOn)
	clock.advance(tellEvery)
	eventually(t, "back", func() bool {
		clock.advance(retryEvery + 1)
		return h.get(t, addrU, "/v4/"+endpointA).body == agentsContainer
	})
	h.quiet(t)
	if got := h.Counters().AgentAway; got < 41 {
		t.Errorf("counted %d, want 41 at least", got)
	}
	var said []string
	for _, e := range logs.All() {
		said = append(said, e.ContextMap()["agent"].(string))
	}
	if got := strings.Join(said, ", "); got != agentHangs+", "+agentAnswers {
		t.Errorf("logged %q", got)
	}
}

// An agent that is killed and started again under load costs no client an error or its statistics;
// metadata falls back to metad's own and returns to the agent's.
func TestAgentRestarts(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	a := &documentAgent{}
	s := &httptest.Server{Listener: ln, Config: &http.Server{Handler: a}}
	s.Start()
	cfg := testConfig()
	cfg.AgentURL = "http://" + addr
	h := newHost(t, cfg, newAwsvpc())
	var agents, own, stats atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				switch r := h.get(t, addrT, "/v4/"+endpointA); {
				case r.body == agentsContainer:
					agents.Add(1)
				case r.StatusCode == 200 && r.body == ownContainer(task.V4):
					own.Add(1)
				default:
					t.Errorf("metadata: got %d %s", r.StatusCode, r.body)
				}
				if r := h.get(t, addrT,
					"/v4/"+endpointA+"/stats"); r.body != string(
					v4Sample(idA).JSON) {
					t.Errorf("statistics: got %d %s", r.StatusCode, r.body)
				}
				stats.Add(1)
			}
		})
	}
	for range 2 {
		before := agents.Load()
		eventually(t, "the agent's documents", func() bool { return agents.Load() > before+20 })
		s.CloseClientConnections()
		s.Close()
		before = own.Load()
		eventually(t, "metad's own documents", func() bool { return own.Load() > before+20 })
		if ln, err = net.Listen("tcp", addr); err != nil {
			t.Fatal(err)
		}
		s = &httptest.Server{Listener: ln, Config: &http.Server{Handler: a}}
		s.Start()
	}
	before := agents.Load()
	eventually(t, "the agent's documents again", func() bool { return agents.Load() > before+20 })
	close(stop)
	wg.Wait()
	s.Close()
	t.Logf("%d documents of the agent's, %d of metad's own, %d statistics", agents.Load(),
		own.Load(), stats.Load())
}

func TestIsAgentID(t *testing.T) {
	f := func(id string, want bool) {
		t.Helper()
		if got := isAgentID(id); got != want {
			t.Errorf("%q: got %v", id, got)
		}
	}
	f(endpointA, true)
	f(strings.ToUpper(endpointA), true)
	f(endpointW, false)
	f("", false)
	f(endpointA[1:], false)
	f(endpointA+"0", false)
	f("0b69d5c0/d655-4695-98cd-5d2d526d9d5a", false)
	f("0b69d5c0-d655-4695-98cd-5d2d526d9d5g", false)
	f("0b69d5c0d655--4695-98cd-5d2d526d9d5a", false)
}
