// Package server answers the ECS task metadata endpoint. It answers metadata and statistics, v2 to
// v4, from documents that were rendered before the request, and passes everything else on to the
// ECS agent.
package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"
	"go.uber.org/zap"

	"metad/pkg/agentproxy"
	"metad/pkg/lookup"
)

// Tasks finds tasks and containers; *lookup.Table does.
type Tasks interface {
	// Resolve returns the task that a connection comes from, nil if there is none now. It must
	// not wait nor allocate.
	Resolve(tag uint32, addr netip.Addr) *lookup.View
	// Endpoint returns the container with the endpoint id and its task, or nil, nil. It must
	// not wait nor allocate.
	Endpoint(id []byte) (*lookup.View, *lookup.ContainerView)
	// Changed returns a channel that is closed when v is out of date.
	Changed(v *lookup.View) <-chan struct{}
	// Views returns every task.
	Views() []*lookup.View
	// Await is Resolve that waits until there is a task that is not Settling, or ctx ends. It
	// does not wait if too many callers wait already.
	Await(ctx context.Context, tag uint32, addr netip.Addr) *lookup.View
}

// Server serves listeners until Shutdown. All methods are safe for concurrent use.
type Server struct {
	cfg   Config
	tasks Tasks
	agent *agentproxy.Agent // nil: none, and so are the next two
	// documents and tagged get metadata from the agent: tags, which the agent has to get from
	// ECS first, with a patience of their own.
	documents, tagged *agentDocuments
	start             time.Time
	// of the request; tests have their own
	now func(*fasthttp.RequestCtx) time.Time

	http      *fasthttp.Server
	conns     *conns
	forwards  *shares // exchanges with the agent
	streams   *shares
	turns     turns
	rateLimit []byte // the value of X-Rate-Limit-Limit
	metrics   *Metrics

	waiting atomic.Int64
	panics  atomic.Uint64
	unnamed atomic.Uint64

	stopping atomic.Bool
	stopped  chan struct{} // closed by the first Shutdown
	life     context.Context
	end      context.CancelFunc // ends life, when no connection is left to wait for

	mu        sync.Mutex // guards what follows
	listeners []*listener
	serving   sync.WaitGroup // Serve calls; Add only while not stopping
}

// ErrStopped is what Serve returns after Shutdown was called.
var ErrStopped = errors.New("server: stopped")

// New returns a server that finds callers' tasks in tasks. An error names the field of cfg.
func New(cfg Config, tasks Tasks) (*Server, error) {
	agent, err := cfg.validate()
	if err != nil {
		return nil, err
	}
	shown := cfg.Rate
	if shown == (RateLimit{}) {
		// Without a limit, this much is true: a client that keeps to the agent's is never
		// refused.
		shown = agentRate
	}
	s := &Server{
		cfg:       cfg,
		tasks:     tasks,
		start:     time.Now(),
		now:       (*fasthttp.RequestCtx).Time,
		conns:     newConns(&cfg),
		metrics:   newMetrics(routes),
		forwards:  newShares(cfg.MaxForwards),
		streams:   newShares(cfg.MaxStreams),
		turns:     turns{pause: time.Sleep},
		rateLimit: strconv.AppendFloat(nil, float64(shown.PerSecond), 'f', 2, 64),
		stopped:   make(chan struct{}),
	}
	if agent != "" {
		s.agent = &agentproxy.Agent{Addr: agent, Timeout: cfg.AgentTimeout,
			MaxBodyBytes: cfg.MaxBodyBytes,
			Dial:         s.dialAgent}
		s.documents = &agentDocuments{agent: s.agent, patience: cfg.AgentPatience,
			now:     time.Now,
			metrics: &s.metrics.Documents,
			log:     cfg.Log.With(zap.String("documents", "metadata"))}
		s.tagged = &agentDocuments{agent: s.agent, patience: cfg.AgentTimeout,
			now:     time.Now,
			metrics: &s.metrics.Documents,
			log:     cfg.Log.With(zap.String("documents", "tags"))}
	}
	s.life, s.end = context.WithCancel(context.Background())
	s.http = &fasthttp.Server{
		Handler: s.handle,
		// a goroutine and its stack for each connection of the last peak
		MaxIdleWorkerDuration: time.Second,
		ErrorHandler:          s.handleReadError,
		Concurrency:           cfg.MaxConns + 1, // conns has the limit
		ReadBufferSize:        cfg.MaxHeaderBytes,
		ReadTimeout:           cfg.ReadTimeout,
		WriteTimeout:          cfg.WriteTimeout,
		IdleTimeout:           cfg.IdleTimeout,
		// or a body would be read before it is known whether it is wanted
		StreamRequestBody:            true,
		NoDefaultServerHeader:        true,
		NoDefaultContentType:         true,
		SecureErrorLogMessage:        true, // no client's bytes in logs
		Logger:                       silent{},
		DisablePreParseMultipartForm: true,
	}
	return s, nil
}

// silent drops fasthttp's log lines: one for each broken request.
type silent struct{}

func (silent) Printf(string, ...any) {}

// Serve answers the connections of ln until Shutdown, and returns ErrStopped then, or the error
// that ln ended with. It does not close ln.
func (s *Server) Serve(ln net.Listener) error {
	l := &listener{Listener: ln, s: s}
	s.mu.Lock()
	if s.stopping.Load() {
		s.mu.Unlock()
		return ErrStopped
	}
	s.listeners = append(s.listeners, l)
	s.serving.Add(1)
	s.mu.Unlock()
	defer s.serving.Done()
	if err := s.http.Serve(l); err != nil {
		return err
	}
	if l.err != nil {
		return fmt.Errorf("accept: %w", l.err)
	}
	return ErrStopped
}

// Shutdown stops accepting and answers the requests on open connections, with "Connection: close".
// It returns nil when the last connection has been closed: at the latest after the longest answer
// and IdleTimeout. If ctx ends first, it closes the remaining connections and returns ctx's error.
//
// It does not close a listener that it can stop by a deadline, such as those of package net:
// another process may have a copy of the socket, and go on accepting from it. The caller closes it.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.stopping.Swap(true) {
		close(s.stopped)
	}
	listeners := s.listeners
	s.listeners = nil
	s.mu.Unlock()
	for _, l := range listeners {
		if d, ok := l.Listener.(interface{ SetDeadline(time.Time) error }); ok {
			if d.SetDeadline(time.Unix(1, 0)) == nil {
				continue
			}
		}
		_ = l.Listener.Close()
	}
	defer s.end()
	s.serving.Wait() // after which no connection is added
	// Not fasthttp's Shutdown: it closes connections without a request for 5 s, and those
	// between two requests, although the next one may be on its way.
	select {
	case <-s.conns.drained():
		return nil
	case <-ctx.Done():
		s.conns.closeAll()
		return ctx.Err()
	}
}

// Counters are totals since New, except that Open and Waiting are current numbers.
type Counters struct {
	Open           int    // connections
	Refused        uint64 // connections over MaxConns or MaxConnsPerTask
	Waiting        int    // requests from unknown sources
	Delayed        uint64 // requests that were sent before their turn
	Panics         uint64 // requests answered 500
	Received, Sent uint64 // bytes from and to containers, HTTP headers included
	// requests about the client's own container, of which nothing said which it is
	Unnamed uint64
	// Documents that metad sent in place of the agent's, although the id has the agent's form:
	// the agent was away, or does not know the id.
	AgentAway, AgentDisowned uint64
}

// Counters returns the server's counters.
func (s *Server) Counters() Counters {
	away, disowned := s.documents.counts()
	return Counters{
		AgentAway: away, AgentDisowned: disowned,
		Open:     s.conns.count(),
		Refused:  s.conns.refused.Load(),
		Waiting:  int(s.waiting.Load()),
		Delayed:  s.turns.delayed.Load(),
		Panics:   s.panics.Load(),
		Unnamed:  s.unnamed.Load(),
		Received: s.conns.received.Load(),
		Sent:     s.conns.sent.Load(),
	}
}

// clock turns a time into nanoseconds since the server was made. A change of the wall clock does
// not affect it.
func (s *Server) clock(t time.Time) int64 { return int64(t.Sub(s.start)) }

// finish, deferred, ends a request, also by a panic.
func (s *Server) finish(ctx *fasthttp.RequestCtx, c *conn) {
	if r := recover(); r != nil {
		s.logPanic(r)
		ctx.Response.ResetBody()
		fail(&ctx.Response, errPanicked, nil)
	}
	if !c.passedOn { // a request that is passed on has not ended yet, and is counted then
		s.answered(ctx, c)
	}
	// If the next request is not read after this, the client sent it before this answer.
	c.ahead, c.sent = true, 0
	c.question = question{} // an idle connection keeps nothing of a task that may be gone
}

func (s *Server) logPanic(r any) {
	// The counter shows how often; one stack is enough to find the cause.
	if s.panics.Add(1) == 1 {
		s.cfg.Log.Error("panic while answering a request; more are only counted",
			zap.Any("panic", r), zap.ByteString("stack", debug.Stack()))
	}
}

// hijack lets f have the connection to itself, once everything before has been written.
func (s *Server) hijack(ctx *fasthttp.RequestCtx, f func(net.Conn)) {
	ctx.HijackSetNoResponse(true)
	ctx.Hijack(func(nc net.Conn) {
		defer s.guard()
		f(nc)
	})
}

// guard, deferred, makes a panic end the connection and not the process.
func (s *Server) guard() {
	if r := recover(); r != nil {
		s.logPanic(r)
	}
}

// handleReadError answers a request that could not be read.
func (s *Server) handleReadError(ctx *fasthttp.RequestCtx, err error) {
	f := readError(err)
	s.metrics.byRoute[nil].count(f.status)
	fail(&ctx.Response, f, nil)
}
