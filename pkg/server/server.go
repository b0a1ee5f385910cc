// Package server answers the ECS task metadata endpoint: the v2 paths from documents that were rendered
// before the question was asked, everything else by asking the ECS agent.
package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"
	"go.uber.org/zap"

	"metad/pkg/lookup"
	"metad/pkg/task"
)

// Tasks finds the task that a connection comes from; *lookup.Table does.
type Tasks interface {
	// Resolve returns nil if there is none now. It must not wait nor allocate.
	Resolve(tag uint32, addr netip.Addr) *lookup.View
	// Await waits until there is one that is not Settling or ctx ends, and not at all when too many wait already.
	Await(ctx context.Context, tag uint32, addr netip.Addr) *lookup.View
}

// Server serves listeners until Shutdown. All methods are safe for concurrent use.
type Server struct {
	cfg   Config
	tasks Tasks
	agent string // host:port; empty: none
	start time.Time
	now   func(*fasthttp.RequestCtx) time.Time // of the request; tests have their own
	dial  func(ctx context.Context, network, address string) (net.Conn, error)

	http      *fasthttp.Server
	conns     *conns
	forwards  slots
	streams   slots
	rateLimit []byte // what X-Rate-Limit-Limit says

	waiting atomic.Int64
	panics  atomic.Uint64

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
		// Who keeps to the agent's own limit is never refused; that much is true without one.
		shown = agentRate
	}
	s := &Server{
		cfg:       cfg,
		tasks:     tasks,
		agent:     agent,
		start:     time.Now(),
		now:       (*fasthttp.RequestCtx).Time,
		dial:      (&net.Dialer{KeepAlive: -1}).DialContext,
		conns:     newConns(&cfg),
		forwards:  make(slots, cfg.MaxForwards),
		streams:   make(slots, cfg.MaxStreams),
		rateLimit: strconv.AppendFloat(nil, float64(shown.PerSecond), 'f', 2, 64),
		stopped:   make(chan struct{}),
	}
	s.life, s.end = context.WithCancel(context.Background())
	s.http = &fasthttp.Server{
		Handler:                      s.handle,
		MaxIdleWorkerDuration:        time.Second, // a goroutine and its stack for each connection of the last peak
		ErrorHandler:                 s.handleReadError,
		Concurrency:                  cfg.MaxConns + 1, // conns has the limit
		ReadBufferSize:               cfg.MaxHeaderBytes,
		ReadTimeout:                  cfg.ReadTimeout,
		WriteTimeout:                 cfg.WriteTimeout,
		IdleTimeout:                  cfg.IdleTimeout,
		StreamRequestBody:            true, // or a body would be read before anybody knows whether it is wanted
		NoDefaultServerHeader:        true,
		NoDefaultContentType:         true,
		SecureErrorLogMessage:        true, // no client's bytes in logs
		Logger:                       silent{},
		DisablePreParseMultipartForm: true,
	}
	return s, nil
}

// silent drops what fasthttp would log: for each broken request a line.
type silent struct{}

func (silent) Printf(string, ...any) {}

// Serve answers the connections of ln until Shutdown, and returns ErrStopped then, or the error that ln
// ended with. It does not close ln.
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

// Shutdown stops accepting, answers what is asked on the connections that are open, telling each
// client that its connection ends there, and returns nil when the last one has been closed: at the
// latest after the longest answer and IdleTimeout. When ctx ends first, it closes the remaining ones
// and returns ctx's error.
//
// It does not close a listener that it can stop by a deadline, as those of package net: the socket
// may have been handed to another process, which goes on accepting from it. Who made it closes it.
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
	// Not fasthttp's Shutdown: it closes connections on which nothing was asked for 5 s, and those
	// between two requests, whose next one may be on its way.
	select {
	case <-s.conns.drained():
		return nil
	case <-ctx.Done():
		s.conns.closeAll()
		return ctx.Err()
	}
}

// Counters are totals since New and, for those in the present tense, numbers of now.
type Counters struct {
	Open    int    // connections
	Refused uint64 // connections over MaxConns or MaxConnsPerTask
	Waiting int    // requests from unknown sources
	Panics  uint64 // requests answered 500
}

// Counters returns the server's counters.
func (s *Server) Counters() Counters {
	return Counters{
		Open:    s.conns.count(),
		Refused: s.conns.refused.Load(),
		Waiting: int(s.waiting.Load()),
		Panics:  s.panics.Load(),
	}
}

// clock turns a time into nanoseconds since the server was made, whatever was done to the wall
// clock in between.
func (s *Server) clock(t time.Time) int64 { return int64(t.Sub(s.start)) }

// handle answers one request. For the paths that metad serves itself it allocates nothing when all
// goes well.
func (s *Server) handle(ctx *fasthttp.RequestCtx) {
	c := ctx.Conn().(*conn)
	// A panic costs its request, not everybody's endpoint: fasthttp would let it end the process.
	defer s.recovered(ctx)
	if s.stopping.Load() {
		ctx.SetConnectionClose()
	}
	a := asked{}
	if f := s.answer(ctx, c, &a); f != served {
		a.addr, a.arn = c.remote.Addr().String(), c.arn
		fail(&ctx.Response, f, a)
	}
}

func (s *Server) recovered(ctx *fasthttp.RequestCtx) {
	if r := recover(); r != nil {
		s.logPanic(r)
		ctx.Response.ResetBody()
		fail(&ctx.Response, panicked, asked{})
	}
}

func (s *Server) logPanic(r any) {
	// The counter tells how often; one stack is enough to find out why.
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

// guard, deferred, makes a panic the end of the connection instead of the process.
func (s *Server) guard() {
	if r := recover(); r != nil {
		s.logPanic(r)
	}
}

// handleReadError answers what could not be read as a request.
func (s *Server) handleReadError(ctx *fasthttp.RequestCtx, err error) {
	fail(&ctx.Response, readError(err), asked{})
}

// answer makes the response, unless it returns a failure; a.id is set to the container asked for.
func (s *Server) answer(ctx *fasthttp.RequestCtx, c *conn, a *asked) failure {
	req := &ctx.Request.Header
	if !req.IsHTTP11() && string(req.Protocol()) != "HTTP/1.0" {
		return badVersion
	}
	if hasToken(req.Peek(fasthttp.HeaderConnection), tokenClose) { // fasthttp knows one spelling of it
		ctx.SetConnectionClose()
	}
	target := req.RequestURI()
	path, ok := plainPath(target)
	if !ok {
		var redirect string
		var err error
		if path, redirect, err = parsePath(target); err != nil {
			return badRequest
		}
		if redirect != "" {
			ctx.Response.SetStatusCode(fasthttp.StatusMovedPermanently)
			ctx.Response.Header.Set(fasthttp.HeaderLocation, redirect)
			return s.finishBody(ctx)
		}
		if hasNewline(path) {
			if f := s.finishBody(ctx); f != served {
				return f
			}
			return noRoute
		}
	}
	r, id := routeOf(path)
	if r == routeOther && s.agent != "" {
		return s.forward(ctx, c) // the agent has limits of its own
	}
	if f := s.finishBody(ctx); f != served {
		return f
	}
	s.setRateHeaders(ctx, c)
	if s.cfg.Rate != (RateLimit{}) {
		if wait := c.peer.bucket.take(s.clock(s.now(ctx)), s.cfg.Rate); wait > 0 {
			ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, strconv.FormatInt((wait+1e9-1)/1e9, 10))
			return limited
		}
	}
	if r == routeOther {
		return noRoute
	}
	a.id = id
	view := s.resolve(c)
	if view == nil {
		return goneOrUnknown(r, c)
	}
	c.arn = view.Task.ARN
	resp := &ctx.Response
	resp.Header.SetContentType(typeJSON)
	switch r {
	case routeTask:
		resp.SetBodyRaw(view.Document)
	case routeContainer:
		cv := view.Container(id)
		if cv == nil {
			return noContainer
		}
		resp.SetBodyRaw(cv.Document)
	case routeTags:
		s.tags(resp, view)
	case routeTaskStats:
		return s.taskStats(ctx, view)
	case routeContainerStats:
		return s.containerStats(ctx, c, view, id)
	}
	return served
}

// resolve returns the task that c belongs to, nil if it is not known, after a bounded wait if it
// never was, or if the asker may be a container that the task does not show yet.
func (s *Server) resolve(c *conn) *lookup.View {
	v := s.tasks.Resolve(c.tag, c.remote.Addr())
	if v != nil && !v.Task.Settling || c.arn != "" || s.cfg.UnknownWait == 0 || c.remote.Addr() == s.cfg.HostAddr {
		return v
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	ctx, cancel := context.WithTimeout(s.life, s.cfg.UnknownWait)
	defer cancel()
	return s.tasks.Await(ctx, c.tag, c.remote.Addr())
}

// goneOrUnknown tells a source that never had a task from one whose task was there a request ago.
func goneOrUnknown(r route, c *conn) failure {
	if c.arn == "" {
		return unknownSource
	}
	switch r {
	case routeContainer:
		return noContainer
	case routeContainerStats:
		return noStats
	case routeTaskStats:
		return noTaskStats
	}
	return noTask
}

var jsonNull = []byte("null")

// taskStats answers {"<id>": sample or null, …}, in the task's order.
func (s *Server) taskStats(ctx *fasthttp.RequestCtx, v *lookup.View) failure {
	if v.Task.Containers == nil {
		return noTaskStats
	}
	asked := s.now(ctx).UnixNano()
	resp := &ctx.Response
	before := "{"
	for i := range v.Containers {
		cv := &v.Containers[i]
		if cv.ID == "" { // being created: nothing to key it by
			continue
		}
		resp.AppendBodyString(before)
		resp.AppendBody(cv.StatsKey)
		resp.AppendBody(s.sampleOf(cv, asked))
		before = ","
	}
	if before == "{" {
		resp.AppendBodyString(before)
	}
	resp.AppendBodyString("}")
	return served
}

func (s *Server) containerStats(ctx *fasthttp.RequestCtx, c *conn, v *lookup.View, id []byte) failure {
	cv := v.Container(id)
	// Not asked whether it runs: one that was just started may not be known to, and it is the one that asks.
	if cv == nil || cv.KnownStatus == task.StatusStopped || s.cfg.NoStats {
		return noStats
	}
	if s.cfg.Samples != nil && !ctx.IsHead() && len(ctx.URI().QueryString()) > 0 && ctx.QueryArgs().GetBool("stream") {
		return s.stream(ctx, c, cv.ID)
	}
	ctx.Response.SetBodyRaw(s.sampleOf(cv, s.now(ctx).UnixNano()))
	return served
}

// sampleOf returns cv's last sample, null if it has none, and tells the sampler that somebody asked.
func (s *Server) sampleOf(cv *lookup.ContainerView, now int64) []byte {
	if cv.KnownStatus == task.StatusStopped || s.cfg.NoStats { // one that is there is of before
		return jsonNull
	}
	cv.Stats.Ask(now)
	if sample := cv.Stats.Load(); sample != nil {
		return sample.JSON
	}
	return jsonNull
}

// Names of headers as the agent's limiter writes them.
var (
	headerRateLimit    = []byte("X-Rate-Limit-Limit")
	headerRateDuration = []byte("X-Rate-Limit-Duration")
	headerRateFor      = []byte("X-Rate-Limit-Request-Forwarded-For")
	headerRateAddr     = []byte("X-Rate-Limit-Request-Remote-Addr")
	rateDuration       = []byte("1") // second
)

// setRateHeaders sets the four headers that the agent's limiter puts on every answer.
func (s *Server) setRateHeaders(ctx *fasthttp.RequestCtx, c *conn) {
	h := &ctx.Response.Header
	h.SetCanonical(headerRateLimit, s.rateLimit)
	h.SetCanonical(headerRateDuration, rateDuration)
	h.SetCanonical(headerRateFor, ctx.Request.Header.Peek(fasthttp.HeaderXForwardedFor))
	h.SetCanonical(headerRateAddr, c.remoteText)
}

// maxSkippedBody is how much of a body that nobody wants is read to keep the connection, as by net/http.
const maxSkippedBody = 256 << 10

// finishBody reads past the request's body: fasthttp would take the rest of it for the next request.
// It fails if the request is malformed.
func (s *Server) finishBody(ctx *fasthttp.RequestCtx) failure {
	h := &ctx.Request.Header
	if expect := h.Peek(fasthttp.HeaderExpect); len(expect) > 0 && !bytes.EqualFold(expect, expectContinue) {
		return badExpectation
	}
	body := ctx.RequestBodyStream()
	if body == nil {
		return served
	}
	if h.ContentLength() == -1 && hasContentLength(h.RawHeaders()) {
		return badRequest // two lengths: which one counts is how requests get smuggled
	}
	n, err := io.CopyN(io.Discard, body, maxSkippedBody+1)
	if err != nil && !errors.Is(err, io.EOF) {
		return readError(err)
	}
	if n > maxSkippedBody {
		ctx.SetConnectionClose()
	}
	return served
}

var (
	expectContinue = []byte("100-continue")
	tokenClose     = []byte("close")
)

// hasToken reports whether a comma-separated list has the token, in any case. It does not allocate.
func hasToken(list, token []byte) bool {
	for len(list) >= len(token) {
		item, rest, _ := bytes.Cut(list, []byte(","))
		if bytes.EqualFold(bytes.TrimSpace(item), token) {
			return true
		}
		list = rest
	}
	return false
}
