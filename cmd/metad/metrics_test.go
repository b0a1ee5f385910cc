package main

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/zap"

	"metad/pkg/docker"
	"metad/pkg/fdbudget"
	"metad/pkg/inject"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/server"
	"metad/pkg/stats"
	"metad/pkg/task"
)

// stillKernel is a kernel that has counted something.
type stillKernel struct{}

func (stillKernel) Verdicts() ([]loader.VerdictCount, error) {
	return []loader.VerdictCount{{Name: "port_task", Packets: 7}}, nil
}
func (stillKernel) Status() loader.Status { return loader.Status{Tasks: 3, MaxTasks: 4} }

// everyMetric returns a registry of all that the parts can show.
func everyMetric(t *testing.T) *prometheus.Registry {
	t.Helper()
	table := lookup.New(&fullMap{room: true}, zap.NewNop())
	srv, err := server.New(server.DefaultConfig(), table)
	if err != nil {
		t.Fatal(err)
	}
	srv.Metrics().Routes[0].Took.Observe(time.Millisecond)
	var answers firstAnswers
	reg := prometheus.NewRegistry()
	reg.MustRegister(everyCollector(t, table, func(out scraper) {
		out.server(srv)
		out.histogram(descFirstAnswer, &answers.took)
	})...)
	return reg
}

// everyCollector returns collectors of all parts, but for the server, which is more.
func everyCollector(t *testing.T, table *lookup.Table, more scrape) []prometheus.Collector {
	t.Helper()
	return []prometheus.Collector{
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		scrape(buildMetrics),
		scrape(func(out scraper) { out.kernel(stillKernel{}) }),
		scrape(func(out scraper) { out.table(table) }),
		scrape(func(out scraper) { out.sampler(new(stats.Metrics)) }),
		scrape(func(out scraper) { out.descriptors(fdbudget.Usage{Limit: 10, Open: 5}) }),
		scrape(func(out scraper) { out.docker(docker.Status{}, false) }),
		scrape(func(out scraper) { out.creations(inject.New(inject.Config{}, nil)) }),
		scrape(func(out scraper) { out.takeovers(true, 2) }),
		more,
	}
}

// promtool finds nothing to say about the metrics' names and help texts.
func TestMetricNames(t *testing.T) {
	problems, err := testutil.GatherAndLint(everyMetric(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// Each limit is shown with how much of it is used, under one name for all.
func TestLimits(t *testing.T) {
	families, err := everyMetric(t).Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := func(name string) map[string]float64 {
		all := map[string]float64{}
		for _, f := range families {
			for _, m := range f.Metric {
				if f.GetName() == name {
					all[label(m, "limit")] = m.GetGauge().GetValue()
				}
			}
		}
		return all
	}
	used, limits := values("metad_limit_used"), values("metad_limit_max")
	if len(used) != len(limits) || used["addresses"] != 3 || limits["addresses"] != 4 ||
		used["descriptors"] != 5 {
		t.Errorf("got %v of %v", used, limits)
	}
	for _, name := range []string{"addresses", "agent_exchanges", "connections",
		"connections_of_one_task", "descriptors", "streams", "waiting_requests"} {
		if limits[name] <= 0 {
			t.Errorf("%s: got limit %v, want a positive one", name, limits[name])
		}
	}
}

func label(m *dto.Metric, name string) string {
	for _, l := range m.Label {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

// The page has every path, and a histogram that Prometheus reads without its native form too.
func TestMetricsPage(t *testing.T) {
	const want = `
# HELP metad_takeovers_total Takeovers: completed, if this metad took over from another when it started; abandoned, those that another began and did not finish.
# TYPE metad_takeovers_total counter
metad_takeovers_total{outcome="abandoned"} 2
metad_takeovers_total{outcome="completed"} 1
`
	reg := everyMetric(t)
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want),
		"metad_takeovers_total"); err != nil {
		t.Error(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "metad_request_duration_seconds" {
			continue
		}
		if h := f.Metric[0].GetHistogram(); len(f.Metric) != 1 || h.GetSampleCount() != 1 ||
			len(h.Bucket) == 0 || len(h.PositiveSpan) == 0 {
			t.Errorf("got %v, want one histogram of both forms", f)
		}
		return
	}
	t.Error("no metad_request_duration_seconds")
}

// A container's first answer is measured once, from its start, and only if no earlier process can
// have given one.
func TestFirstAnswers(t *testing.T) {
	since := time.Unix(1000, 0)
	f := &firstAnswers{since: since}
	note := func(started time.Time, answered time.Duration) uint64 {
		c := &task.Container{ID: "c", StartedAt: started, Stats: new(task.StatsCell)}
		c.Stats.Answered(started.Add(answered).UnixNano())
		c.Stats.Answered(started.Add(time.Hour).UnixNano())
		set := []*task.Task{{Containers: []*task.Container{c,
			{ID: "new", Stats: new(task.StatsCell)}, {Name: "creating"}}}}
		before := f.took.Count()
		f.note(set)
		f.note(set)
		return f.took.Count() - before
	}
	if n := note(since.Add(time.Second), 300*time.Millisecond); n != 1 {
		t.Errorf("started after metad: counted %d times, want once", n)
	}
	if n := note(since.Add(-time.Second), 300*time.Millisecond); n != 0 {
		t.Errorf("started before metad: counted %d times, want never", n)
	}
	// The program may ask before Docker knows that it runs.
	c := &task.Container{ID: "c", Stats: new(task.StatsCell)}
	c.Stats.Answered(since.Add(2 * time.Second).UnixNano())
	f.note([]*task.Task{{Containers: []*task.Container{c}}})
	started := *c
	started.StartedAt = since.Add(2500 * time.Millisecond)
	f.note([]*task.Task{{Containers: []*task.Container{&started}}})
	if n := f.took.Count(); n != 2 {
		t.Errorf("answered before its start was known: counted %d in all, want 2", n)
	}
}
