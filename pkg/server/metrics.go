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

// Metrics count what the server does. They go on counting, and can be read at any time.
type Metrics struct {
	// in the order of the table, and one more for what is no path of metad's
	Routes []RouteMetrics
	// What the ECS agent was asked for: requests passed on, and metadata documents.
	Requests, Documents AgentMetrics
	// of each sample that was sent, when it was asked for
	SampleAge histogram.Histogram

	byRoute map[*route]*RouteMetrics // with nil for OtherRoute
}

// RouteMetrics count the answers to the requests for one path of the table of routes.
type RouteMetrics struct {
	Route   string              // the path as the table has it, or OtherRoute
	Answers [6]atomic.Uint64    // by the first digit of the status
	Took    histogram.Histogram // from the end of the request's header, without the writing
}

// OtherRoute stands for every path that is none of metad's.
const OtherRoute = "other"

// AgentMetrics count what the ECS agent was asked, by outcome.
type AgentMetrics struct {
	Outcomes [len(AgentOutcomes)]atomic.Uint64
	Took     histogram.Histogram // to the end of the answer, or to the error
}

// AgentOutcomes are the outcomes of asking the agent: it answered; nothing listened; it did not
// answer in time; it sent no valid answer; what the client sent could not be passed on; too many
// were under way.
var AgentOutcomes = [...]string{"answered", "absent", "slow", "failed", "client_error", "busy"}

// asked counts a question to the agent that was begun at start and ended with err.
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

// busy counts a question that was not asked.
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

// isOwn reports whether the container that c asks about is of the task that asks.
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
