package main

import (
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"metad/pkg/docker"
	"metad/pkg/fdbudget"
	"metad/pkg/histogram"
	"metad/pkg/inject"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/server"
	"metad/pkg/stats"
	"metad/pkg/task"
)

// This file has metad's own metrics. A part counts without them; they read its counters when metad
// is scraped.

// collectors returns what /metrics shows.
func (d *daemon) collectors() []prometheus.Collector {
	return []prometheus.Collector{
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		scrape(buildMetrics),
		scrape(func(out scraper) { out.kernel(d.own.loader) }),
		scrape(func(out scraper) { out.table(d.tasks.table) }),
		scrape(func(out scraper) { out.server(d.endpoint.current.Load()) }),
		scrape(func(out scraper) { out.sampler(d.sampler.Metrics()) }),
		scrape(func(out scraper) { out.descriptors(fdbudget.Process().Usage()) }),
		scrape(func(out scraper) {
			out.docker(d.follower.Status(), d.plugin != nil && d.plugin.Connected())
			out.creations(d.inject)
			out.takeovers(d.own.pred != nil, d.abandoned.Load())
			d.answers.note(d.tasks.published())
			out.histogram(descFirstAnswer, &d.answers.took)
		}),
	}
}

// scrape is a collector that asks a part for its counters.
type scrape func(scraper)

// Describe implements prometheus.Collector. What is collected depends on the part.
func (scrape) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s scrape) Collect(ch chan<- prometheus.Metric) { s(scraper(ch)) }

// scraper takes the metrics of one scrape.
type scraper chan<- prometheus.Metric

func (s scraper) counter(d *prometheus.Desc, v uint64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
}

func (s scraper) gauge(d *prometheus.Desc, v int, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
}

func (s scraper) histogram(d *prometheus.Desc, h *histogram.Histogram, labels ...string) {
	s <- h.Metric(d, labels...)
}

func (s scraper) limit(name string, used, limit int) {
	s.gauge(descUsed, used, name)
	s.gauge(descLimit, limit, name)
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("metad_"+name, help, labels, nil)
}

var (
	descBuild = desc("build_info", "1, with the version of metad and of Go.", "version",
		"goversion")
	descLimit = desc("limit_max", "The most that a limit of metad's allows.", "limit")
	descUsed  = desc("limit_used", "How much of a limit is used; of connections_of_one_task "+
		"by the task that has most.", "limit")
)

func buildMetrics(s scraper) { s.gauge(descBuild, 1, version, runtime.Version()) }

var (
	descVerdicts = desc("verdicts_total", "Packets by what the eBPF programs decided.",
		"verdict")
	descPorts = desc("ports",
		"Ports of the watched bridges that metad's program is attached to.")
	descPending = desc("ports_pending",
		"Ports that metad's program is still to be attached to after a start; until "+
			"then they are seen at their bridge.")
	descUnhooked = desc("devices_not_attached",
		"Ports and bridges that metad's program could not be attached to: their "+
			"containers are seen at the bridge only, or not at all.")
	descUnwatch = desc("addresses_unwatched",
		"Task addresses behind devices that are no ports of watched bridges: their "+
			"requests are refused, or go to the ECS agent.")
	descAttach = desc("attach_errors_total", "Attachments that failed; later successes "+
		"are not subtracted.")
)

// kernel is the loader.
type kernel interface {
	Verdicts() ([]loader.VerdictCount, error)
	Status() loader.Status
}

func (s scraper) kernel(k kernel) {
	if verdicts, err := k.Verdicts(); err != nil {
		s <- prometheus.NewInvalidMetric(descVerdicts, err)
	} else {
		for _, v := range verdicts {
			s.counter(descVerdicts, v.Packets, v.Name)
		}
	}
	l := k.Status()
	s.gauge(descPorts, l.Ports)
	s.gauge(descPending, l.Pending)
	s.gauge(descUnhooked, l.NotAttached)
	s.gauge(descUnwatch, l.Unwatched)
	s.counter(descAttach, l.AttachErrors)
	s.limit("addresses", l.Tasks, l.MaxTasks)
}

var (
	descTasks    = desc("tasks", "Tasks known.")
	descProvable = desc("containers",
		"Running containers, by whether the kernel tells which of them "+
			"a connection comes from (proof=\"kernel\") or at best its address does "+
			"(proof=\"address\").", "proof")
	descConflict = desc("address_conflicts_total", "Addresses that two ports "+
		"began to claim; the log names the one that does not have it.")
	descCopied = desc("endpoint_id_conflicts_total",
		"Endpoint ids (the last part of ECS_CONTAINER_METADATA_URI) refused because two "+
			"containers held them: an environment was copied.")
	descTurned = desc("waits_refused_total",
		"Requests that did not wait for their task because too many did.")
)

func (s scraper) table(t *lookup.Table) {
	s.gauge(descTasks, len(t.Views()))
	byKernel, byAddress := t.Provable()
	s.gauge(descProvable, byKernel, "kernel")
	s.gauge(descProvable, byAddress, "address")
	s.counter(descConflict, t.Conflicts())
	s.counter(descCopied, t.EndpointConflicts())
	s.counter(descTurned, t.TurnedAway())
	waiting, limit := t.Waiting()
	s.limit("waiting_requests", waiting, limit)
}

var (
	descRequests = desc("requests_total",
		"Requests that metad answered itself, by path and class of the status; "+
			"route=\"other\" is every path that is none of metad's.", "route", "status")
	descTook = desc("request_duration_seconds",
		"Time from the end of a request's header to metad's answer, waits included.",
		"route")
	descAgent = desc("agent_requests_total",
		"What the ECS agent was asked for: requests passed on "+
			"(kind=\"request\") and metadata documents (kind=\"document\"), by "+
			"outcome; absent: nothing listens, failed: no valid answer.", "kind",
		"outcome")
	descAgentTook = desc("agent_request_duration_seconds",
		"Time from the beginning of a question to the ECS agent to its end.", "kind")
	descAge = desc("sample_age_seconds",
		"Age of statistics samples when they were asked for.")
	descReceived = desc("received_bytes_total", "Bytes from containers, HTTP headers included.")
	descSent     = desc("sent_bytes_total", "Bytes to containers, HTTP headers included.")
	descOpen     = desc("connections", "Open connections from containers.")
	descRefused  = desc("connections_refused_total", "Connections over "+
		"--max-conns-per-task or the limit for all.")
	descDelayed = desc("requests_delayed_total",
		"Requests that waited because their client sent them before it had its answers "+
			"(pipelining); a client that waits for each answer is never delayed.")
	descWaiting = desc("waiting_requests",
		"Requests from addresses whose task is not known yet.")
	descUnnamed = desc("callers_not_named_total",
		"Requests about the container that asks of which nothing told which it is: "+
			"answered 404.")
	descFallback = desc("agent_fallbacks_total",
		"Metadata documents of metad's own in place of the ECS agent's, "+
			"by reason: the agent is away, or does not know the id.", "reason")
	descPanics = desc("panics_total", "Requests answered 500 because of "+
		"a bug; the first one's stack is in the log.")
)

func (s scraper) server(srv *server.Server) {
	c := srv.Counters()
	s.gauge(descOpen, c.Open)
	s.counter(descRefused, c.Refused)
	s.counter(descDelayed, c.Delayed)
	s.gauge(descWaiting, c.Waiting)
	s.counter(descFallback, c.AgentAway, "away")
	s.counter(descFallback, c.AgentDisowned, "unknown")
	s.counter(descPanics, c.Panics)
	s.counter(descUnnamed, c.Unnamed)
	s.counter(descReceived, c.Received)
	s.counter(descSent, c.Sent)
	for _, l := range srv.Limits() {
		s.limit(l.Name, l.Used, l.Max)
	}
	m := srv.Metrics()
	s.histogram(descAge, &m.SampleAge)
	for i := range m.Routes {
		s.route(&m.Routes[i])
	}
	s.agent("request", &m.Requests)
	s.agent("document", &m.Documents)
}

// route shows what is always there, so that a first error is an increase, and what there was.
func (s scraper) route(r *server.RouteMetrics) {
	for class := range r.Answers {
		n := r.Answers[class].Load()
		if n > 0 || class == 2 || class == 4 || class == 5 {
			s.counter(descRequests, n, r.Route, fmt.Sprintf("%dxx", class))
		}
	}
	if r.Took.Count() > 0 {
		s.histogram(descTook, &r.Took, r.Route)
	}
}

func (s scraper) agent(kind string, m *server.AgentMetrics) {
	for i, outcome := range server.AgentOutcomes {
		s.counter(descAgent, m.Outcomes[i].Load(), kind, outcome)
	}
	s.histogram(descAgentTook, &m.Took, kind)
}

var descSamples = desc("samples_total", "Statistics samples by outcome.", "outcome")

func (s scraper) sampler(m *stats.Metrics) {
	s.counter(descSamples, m.Samples.Load(), "rendered")
	s.counter(descSamples, m.Damaged.Load(), "damaged")
	s.counter(descSamples, m.Gone.Load(), "gone")
	s.counter(descSamples, m.Short.Load(), "no_descriptor")
	s.counter(descSamples, m.Failed.Load(), "failed")
}

var (
	descKept = desc("descriptors_kept",
		"File descriptors that statistics keep open to save work.")
	descRoom = desc("descriptors_room",
		"File descriptors that may be kept: what connections and namespaces leave.")
)

func (s scraper) descriptors(u fdbudget.Usage) {
	s.gauge(descKept, u.Kept)
	s.gauge(descRoom, u.Room)
	s.limit("descriptors", u.Open, u.Limit)
}

var (
	descDocker = desc("docker_connected", "1 while the Docker Engine's event stream is open.")
	descNRI    = desc("nri_connected",
		"1 while the Docker Engine asks metad by NRI what to put into new containers.")
	descEvents   = desc("docker_events_total", "Events received from the Docker Engine.")
	descInspects = desc("docker_inspects_total", "Containers inspected.")
	descStrays   = desc("addresses_not_believed_total",
		"Addresses that a container, mostly one with NET_ADMIN, gave itself beside the "+
			"one that its port had from the beginning; the log names its task.")
	descErrors = desc("docker_errors_total",
		"Inspects that failed, namespaces that could not be read, streams lost.")
)

func (s scraper) docker(f docker.Status, byNRI bool) {
	s.gauge(descDocker, number(f.Connected))
	s.gauge(descNRI, number(byNRI))
	s.counter(descEvents, f.Events)
	s.counter(descInspects, f.Inspects)
	s.counter(descErrors, f.Errors)
	s.counter(descStrays, f.Strays)
}

var descCreations = desc("creations_total",
	"Creations of containers that metad was asked about, by way and outcome; changed: has "+
		"what metad adds, without: lacks something, and the log says why, refused: by the "+
		"Engine.", "way", "outcome")

func (s scraper) creations(i *inject.Injector) {
	for _, c := range i.Creations() {
		s.counter(descCreations, c.Count, c.Way, c.Outcome.String())
	}
}

var descTakeovers = desc("takeovers_total",
	"Takeovers: completed, if this metad took over from another when it started; "+
		"abandoned, those that another began and did not finish.", "outcome")

func (s scraper) takeovers(tookOver bool, abandoned uint64) {
	s.counter(descTakeovers, uint64(number(tookOver)), "completed")
	s.counter(descTakeovers, abandoned, "abandoned")
}

// number is how a metric says yes or no.
func number(yes bool) int {
	if yes {
		return 1
	}
	return 0
}

var descFirstAnswer = desc("first_answer_seconds",
	"Time from a container's start to its first answer about itself or its task; containers "+
		"that started after metad.")

// firstAnswers measures how long after their start containers get their first answer.
type firstAnswers struct {
	since time.Time // of containers that started before, an earlier process may have answered

	seen []*task.Task // of changed's goroutine

	mu   sync.Mutex // held while tasks are looked at
	took histogram.Histogram
}

// changed takes in a new set: of the tasks that are no longer as they were it takes note.
func (f *firstAnswers) changed(tasks []*task.Task) {
	var before []*task.Task
	for was := range task.Diff(f.seen, tasks) {
		if was != nil {
			before = append(before, was)
		}
	}
	f.seen = tasks
	f.note(before)
}

// note takes note of the containers of tasks that have been answered for the first time.
func (f *firstAnswers) note(tasks []*task.Task) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range tasks {
		for _, c := range t.Containers {
			// Docker tells of a start after the program may have asked.
			if c.Stats == nil || c.StartedAt.IsZero() {
				continue
			}
			if at := c.Stats.TakeFirstAnswer(); at != 0 && c.StartedAt.After(f.since) {
				f.took.Observe(time.Unix(0, at).Sub(c.StartedAt))
			}
		}
	}
}
