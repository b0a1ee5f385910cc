package server

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"metad/bpf"
	"metad/pkg/agentproxy"
	"metad/pkg/histogram"
)

// Metrics are the server's counters. They can be read at any time.
type Metrics struct {
	// in the order of the table of routes, and one more for all other paths
	Routes []RouteMetrics
	// requests to the ECS agent: those passed on, and those for metadata documents
	Requests, Documents AgentMetrics
	// of each sample that was sent, at the time of the request
	SampleAge histogram.Histogram

	byRoute map[*route]*RouteMetrics // with nil for OtherRoute
}

// RouteMetrics count the answers to the requests for one path of the table of routes.
type RouteMetrics struct {
	Route   string              // the path in the table, or OtherRoute
	Answers [6]atomic.Uint64    // by the first digit of the status
	Took    histogram.Histogram // from the end of the request's header, without the writing
}

// OtherRoute stands for every path that metad does not serve.
const OtherRoute = "other"

// AgentMetrics count requests to the ECS agent by outcome.
type AgentMetrics struct {
	Outcomes [len(AgentOutcomes)]atomic.Uint64
	Took     histogram.Histogram // to the end of the answer, or to the error
}

// AgentOutcomes are the outcomes of requests to the agent: it answered; it did not listen; it did
// not answer in time; it sent no valid answer; the client's request could not be passed on; too
// many requests were in flight.
var AgentOutcomes = [...]string{"answered", "absent", "slow", "failed", "client_error", "busy"}

// asked counts a request to the agent that began at start and ended with err.
func (m *AgentMetrics) asked(start time.Time, err error) {
	outcome := 4
	switch {
	case err == nil:
		outcome = 0
	case errors.Is(err, agentproxy.ErrAbsent):
		outcome = 1
	case errors.Is(err, agentproxy.ErrSlow):
		outcome = 2
	case errors.Is(err, agentproxy.ErrFailed):
		outcome = 3
	}
	m.Outcomes[outcome].Add(1)
	m.Took.Observe(time.Since(start))
}

// busy counts a request that was not sent because too many were in flight.
func (m *AgentMetrics) busy() { m.Outcomes[5].Add(1) }

func newMetrics(t *routeTable) *Metrics {
	m := &Metrics{Routes: make([]RouteMetrics, len(t.all)+1),
		byRoute: map[*route]*RouteMetrics{}}
	for i := range t.all {
		m.Routes[i].Route = t.all[i].path
		m.byRoute[&t.all[i]] = &m.Routes[i]
	}
	other := &m.Routes[len(t.all)]
	other.Route = OtherRoute
	m.byRoute[nil] = other
	return m
}

// answered counts the answer to c's request. It takes no lock and does not allocate.
func (s *Server) answered(ctx *fasthttp.RequestCtx, c *conn) {
	status, now := ctx.Response.StatusCode(), time.Now()
	m := s.metrics.byRoute[c.target.route]
	m.count(status)
	m.Took.Observe(now.Sub(ctx.Time()))
	if status == fasthttp.StatusOK && c.container != nil && c.container.Stats != nil &&
		c.isOwn() {
		c.container.Stats.Answered(now.UnixNano())
	}
}

// isOwn reports whether c requests a container of its client's own task.
func (c *conn) isOwn() bool {
	return c.target.by != byEndpoint || c.tag&bpf.TagPort == 0 &&
		c.tag&bpf.TagTask == c.view.Tag
}

func (m *RouteMetrics) count(status int) {
	if class := status / 100; class < len(m.Answers) {
		m.Answers[class].Add(1)
	}
}

// Limit is a bound of the server's, and how much of it is used.
type Limit struct {
	Name      string
	Used, Max int
}

// Limits returns the server's limits as they are now.
func (s *Server) Limits() []Limit {
	open, most := s.conns.usage()
	return []Limit{
		{"connections", open, s.cfg.MaxConns},
		{"connections_of_one_task", most, s.cfg.MaxConnsPerTask},
		{"agent_exchanges", s.forwards.count(), s.cfg.MaxForwards},
		{"streams", s.streams.count(), s.cfg.MaxStreams},
	}
}

// Metrics returns the server's metrics.
func (s *Server) Metrics() *Metrics { return s.metrics }
