//go:build !race

package server

import (
	"bytes"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"metad/pkg/task"
)

// An answer of metad's own allocates nothing: every route, however it names its container, for
// tasks of 1, 3 and 10 containers, with and without samples and with a rate limit.
func TestAnswerAllocs(t *testing.T) {
	for _, n := range []int{1, 3, 10} {
		for _, limited := range []bool{false, true} {
			tk := newTask()
			tk.Containers = nil
			for i := range n {
				c := running(fmt.Sprintf("%064x", i+1), fmt.Sprintf("c%d", i))
				if i%2 == 0 {
					sample := `{"read":"` + strings.Repeat("x", 3000) + `"}`
					c.Stats.Store(&task.Sample{JSON: []byte(sample),
						V2: len(sample) - 1, Read: time.Now()})
				}
				c.EndpointID = fmt.Sprintf("%032x-%032x", 1, i)
				tk.Containers = append(tk.Containers, c)
			}
			last := tk.Containers[n-1]
			tk.Endpoints[0].Container = last.ID
			cfg := testConfig()
			if limited {
				cfg.Rate = RateLimit{1 << 20, 1 << 20}
			}
			h := newStopped(t, cfg, tk)
			c := newLoopConn(addrT)
			h.serveLoop(t, c)
			targets := []string{"/v2/metadata", "/v2/metadata/self",
				"/v2/metadata/" + last.ID, "/v2/stats", "/v2/stats/self", "/v2/stats/" + last.ID}
			for _, version := range []string{"/v3", "/v4"} {
				for _, who := range []string{"", "/self", "/" + last.EndpointID,
					"/containers/" + last.Name} {
					for _, form := range []string{"", "/task", "/taskWithTags",
						"/stats", "/task/stats"} {
						targets = append(targets, version+who+form)
					}
				}
			}
			for _, target := range targets {
				t.Run(fmt.Sprintf("%d/%v%s", n, limited, target),
					func(t *testing.T) {
						req := request(target)
						if got := c.get(req); !bytes.HasPrefix(got,
							[]byte("HTTP/1.1 200 OK\r\n")) {
							t.Fatalf("got %.200s", got)
						}
						if got := testing.AllocsPerRun(200,
							func() { c.get(req) }); got != 0 {
							t.Errorf("got %v allocs, want 0", got)
						}
					})
			}
		}
	}
}

// Memory stays where it is whatever paths are asked for.
func TestMemoryFlat(t *testing.T) {
	cfg := testConfig()
	// the agent's limiter is what grows
	cfg.Rate = RateLimit{PerSecond: 1 << 20, Burst: 1 << 20}
	h := newStopped(t, cfg, newTask())
	c := newLoopConn(addrT)
	h.serveLoop(t, c)
	ask := func(from, to int) {
		for i := from; i < to; i++ {
			c.get(request(fmt.Sprintf("/v2/metadata/%d", i)))
			c.get(request(fmt.Sprintf("/%d/x", i)))
		}
	}
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	ask(0, 1000)
	before := heap()
	ask(1000, 51_000)
	if grown := heap() - before; grown > 1<<20 { // 100,000 paths; 10 bytes for each would show
		t.Errorf("grown by %d bytes", grown)
	}
}
