//go:build bench

package bench

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"metad/internal/testhost"
)

// metricsRun is one run of the client.
type metricsRun struct {
	rps float64
	cpu time.Duration // metad's, per request
}

func byCPU(a, b metricsRun) int { return cmp.Compare(a.cpu, b.cpu) }

// TestBenchMetrics measures what metrics cost the request path: metad with --container-metrics, of
// which both pages are read each second, against metad without them. Prometheus reads a page four
// times a minute.
func TestBenchMetrics(t *testing.T) {
	const rounds, seconds, tasks = 5, 2, 30
	binary := os.Getenv("METAD")
	if binary == "" {
		binary = testhost.Build(t)
	}
	h := testhost.New(t)
	all := make([]*testhost.Task, tasks)
	for i := range all {
		all[i] = h.AddTask(3, nil)
	}
	client := start(t, "client", taskOf(all[0].Task), 1, nil)
	command, err := json.Marshal(load{Conns: 64, KeepAlive: true, Seconds: seconds,
		Path: "/v4/task"})
	if err != nil {
		t.Fatal(err)
	}
	run := func(on bool) metricsRun {
		var args []string
		if on {
			args = []string{"--container-metrics"}
		}
		m := h.Start(binary, 0, args...)
		m.WaitReady()
		m.WaitHooked(tasks)
		m.Hot(all) // the samples of each second are no part of the difference
		end := func() {}
		if on {
			end = scrape(t, m)
		}
		before := m.CPU()
		var l load
		client.do(string(command), &l)
		used := m.CPU() - before
		end()
		m.Stop()
		if l.Requests == 0 || l.Errors > 0 {
			t.Fatalf("client: %+v", l)
		}
		return metricsRun{float64(l.Requests) / l.Elapsed.Seconds(),
			used / time.Duration(l.Requests)}
	}
	var with, without []metricsRun
	for i := range rounds {
		both := []func(){
			func() { with = append(with, run(true)) },
			func() { without = append(without, run(false)) },
		}
		if i%2 == 1 {
			slices.Reverse(both)
		}
		for _, f := range both {
			f()
		}
	}
	ratio := func(f func(metricsRun) float64) float64 {
		return median(with, f) / median(without, f)
	}
	fmt.Printf("\nmetrics of %d containers on and off, medians of %d interleaved runs of %d "+
		"s: "+
		"requests/s ratio %.2f, metad's CPU per request ratio %.2f (%v to %v without)\n",
		3*tasks, rounds, seconds, ratio(func(r metricsRun) float64 { return r.rps }),
		ratio(func(r metricsRun) float64 { return float64(r.cpu) }),
		slices.MinFunc(without, byCPU).cpu, slices.MaxFunc(without, byCPU).cpu)
}

// scrape reads both pages of metrics each second until its result is called.
func scrape(t testing.TB, m *testhost.Metad) (end func()) {
	stop := make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			for _, page := range []string{"/metrics", "/metrics/containers"} {
				if code, _, err := m.Get(page); err != nil || code != 200 {
					t.Errorf("%s: %d, %v", page, code, err)
				}
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
			}
		}
	})
	return func() { close(stop); reading.Wait() }
}
