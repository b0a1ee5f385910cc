//go:build root

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"metad/internal/testdocker"
	"metad/internal/testnet"
)

// v4Container is a container whose endpoint id is one of the ECS agent's.
type v4Container struct {
	ns                netns.NsHandle
	id, arn, endpoint string
}

// uuid returns the n-th of some ids that have the form of the agent's.
func uuid(n int) string { return fmt.Sprintf("c0ffee00-0000-4000-8000-%012d", n) }

func startV4Container(t *testing.T, h *testdocker.Host, n int) *v4Container {
	t.Helper()
	v := &v4Container{endpoint: uuid(n)}
	run := h.RunTask(t, testdocker.Task{ID: fmt.Sprintf("v4-%d", n),
		Containers: []testdocker.Container{{Name: "app",
			Env: []string{"ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/" +
				v.endpoint}}}})
	v.id, v.arn = run.Containers[0], run.ARN
	var err error
	if v.ns, err = netns.GetFromPid(h.Inspect(t, v.id).State.Pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.ns.Close() })
	return v
}

// client returns a client that asks from the container's namespace.
func (v *v4Container) client() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return testnet.Dial(v.ns, "", testnet.Endpoint, 10*time.Second)
		}}}
}

// standInMark is a member of the stand-in agent's documents that metad's own never have.
const standInMark = `"StandIn":true`

// v4Agent answers for the containers as the ECS agent does, and has no statistics.
func v4Agent(containers []*v4Container) http.Handler {
	mux := http.NewServeMux()
	for _, v := range containers {
		mux.HandleFunc("/v4/"+v.endpoint, func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"DockerId":%q,%s}`, v.id, standInMark)
		})
		mux.HandleFunc("/v4/"+v.endpoint+"/task",
			func(w http.ResponseWriter, _ *http.Request) {
				fmt.Fprintf(w, `{"TaskARN":%q,%s}`, v.arn, standInMark)
			})
	}
	return mux
}

// v4Load is clients of v4 that ask without a pause, and an account of their answers.
type v4Load struct {
	stop atomic.Bool
	wait sync.WaitGroup

	mu         sync.Mutex     // guards what follows
	agents     int            // documents of the agent's
	own        int            // documents of metad's own
	statistics int            // answers with numbers of the right container
	reads      map[string]int // times of samples, by how often they were seen
	failed     []string       // everything else
}

func startV4Load(t *testing.T, containers []*v4Container, clients int) *v4Load {
	l := &v4Load{reads: map[string]int{}}
	for i := range clients {
		l.wait.Go(func() {
			v := containers[i%len(containers)]
			c := v.client()
			defer c.CloseIdleConnections()
			for !l.stop.Load() {
				for _, form := range []string{"", "/task", "/stats",
					"/task/stats"} {
					l.note(v, form, v.get(c, form))
				}
			}
		})
	}
	t.Cleanup(l.end)
	return l
}

func (l *v4Load) end() {
	l.stop.Store(true)
	l.wait.Wait()
}

// get returns the answer's body, or what was wrong.
func (v *v4Container) get(c *http.Client, form string) string {
	resp, err := c.Get("http://169.254.170.2/v4/" + v.endpoint + form)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Sprintf("%s %s %v", resp.Status, body, err)
	}
	return string(body)
}

// note counts an answer.
func (l *v4Load) note(v *v4Container, form, body string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case strings.HasSuffix(form, "stats"):
		if read := sampleRead(v, form, body); read != "" {
			l.statistics++
			l.reads[read]++
			return
		}
	case form == "" && strings.HasPrefix(body, `{"DockerId":"`+v.id+`"`),
		form == "/task" && strings.Contains(body, `"TaskARN":"`+v.arn+`"`):
		if strings.Contains(body, standInMark) {
			l.agents++
		} else {
			l.own++
		}
		return
	}
	l.failed = append(l.failed, fmt.Sprintf("%s%s: %.300s", v.endpoint, form, body))
}

// sampleRead returns the time of v's sample in statistics, "" if there is none.
func sampleRead(v *v4Container, form, body string) string {
	type sample struct{ ID, Read string }
	var one sample
	if form == "/stats" {
		_ = json.Unmarshal([]byte(body), &one) // what it is not, it does not have
	} else {
		var all map[string]sample
		_ = json.Unmarshal([]byte(body), &all)
		one = all[v.id]
	}
	if one.ID != v.id {
		return ""
	}
	return one.Read
}

// counts returns the account so far.
func (l *v4Load) counts() (agents, own, statistics, reads int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.agents, l.own, l.statistics, len(l.reads)
}

// The ECS agent is killed and started again while clients of v4 ask: they see no error, the
// statistics go on, and the documents are metad's own until the agent is back.
func TestRootAgentKilledUnderLoad(t *testing.T) {
	const rounds = 3
	h := testdocker.Shared(t)
	containers := []*v4Container{startV4Container(t, h, 1), startV4Container(t, h, 2)}
	agent := v4Agent(containers)
	kill := startAgent(t, h, agent)
	d := startMetad(t, h)
	for _, v := range containers {
		c := v.client()
		waitFor(t, "the first sample", func() bool { return sampleRead(v, "/stats", v.get(c, "/stats")) != "" })
		c.CloseIdleConnections()
	}
	l := startV4Load(t, containers, 8)
	// on waits until count has gone on by n, and the samples by three.
	on := func(what string, count func() int, n int) {
		t.Helper()
		from := count()
		_, _, _, reads := l.counts()
		waitFor(t, what, func() bool {
			_, _, _, now := l.counts()
			return count() >= from+n && now >= reads+3
		})
	}
	agents := func() int { n, _, _, _ := l.counts(); return n }
	own := func() int { _, n, _, _ := l.counts(); return n }
	on("the agent's documents", agents, 500)
	told := func() int {
		return strings.Count(d.out.String(), "state of the ECS agent changed")
	}
	for range rounds {
		kill()
		on("metad's own documents", own, 500)
		waitFor(t, "a line in the log", func() bool { return told() > 0 })
		before := agents()
		on("more of metad's own documents", own, 100)
		if now := agents(); now != before {
			t.Errorf("%d documents of a dead agent's", now-before)
		}
		kill = startAgent(t, h, agent)
		on("the agent's documents again", agents, 500)
	}
	l.end()
	_, body, err := d.get(defaultAdmin, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	lines := slices.DeleteFunc(strings.Split(body, "\n"), func(l string) bool {
		return !strings.HasPrefix(l, "metad_agent_fallbacks_total")
	})
	t.Logf("%d kills: %d documents by the agent, %d by metad, %d statistics of %d samples, "+
		"%d failed; %d lines in the log; %q",
		rounds, l.agents, l.own, l.statistics, len(l.reads), len(l.failed), told(), lines)
	if len(l.failed) > 0 {
		t.Errorf("failed: %q", first(l.failed))
	}
	if want := fmt.Sprintf(`metad_agent_fallbacks_total{reason="away"} %d`,
		l.own); !slices.Contains(lines, want) {
		t.Errorf("metrics: got %q, want %s", lines, want)
	}
	if n := told(); n > 2*rounds {
		t.Errorf("the log says %d times that the agent goes or comes", n)
	}
}
