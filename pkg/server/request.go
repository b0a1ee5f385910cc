package server

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"strconv"

	"github.com/valyala/fasthttp"

	"metad/pkg/agentproxy"
)

// handle answers one request. It allocates nothing for a path that metad serves itself, unless the
// request fails.
func (s *Server) handle(ctx *fasthttp.RequestCtx) {
	c := ctx.Conn().(*conn)
	// A panic must fail only its request: fasthttp would let it end the process.
	defer s.finish(ctx, c)
	if c.ahead {
		s.turns.await(c.peer, c.sent, s.clock(s.now(ctx)), &s.stopping)
	}
	if s.stopping.Load() {
		ctx.SetConnectionClose()
	}
	if f := s.answer(ctx, c); f != nil {
		fail(&ctx.Response, f, c)
	}
}

// answer makes the response, or returns the failure to answer with.
func (s *Server) answer(ctx *fasthttp.RequestCtx, c *conn) *failure {
	path, redirect, f := requested(ctx)
	switch {
	case f != nil:
		return f
	case redirect != "":
		ctx.Response.SetStatusCode(fasthttp.StatusMovedPermanently)
		ctx.Response.Header.Set(fasthttp.HeaderLocation, redirect)
		return finishBody(ctx)
	case hasNewline(path):
		return cmp.Or(finishBody(ctx), errNoRoute)
	}
	c.target = routes.match(path)
	if unanswered, ok := s.isAgents(c); ok {
		return s.forward(ctx, c, unanswered) // the agent has limits of its own
	}
	if f := finishBody(ctx); f != nil {
		return f
	}
	if f := s.admit(ctx, c); f != nil {
		return f
	}
	if c.target.route == nil {
		return errNoRoute
	}
	if f := s.find(c); f != nil {
		return f
	}
	return c.target.answer(s, ctx, c)
}

// isAgents reports whether the request is passed on to the agent, and returns the answer in case
// the agent does not listen.
func (s *Server) isAgents(c *conn) (unanswered *failure, ok bool) {
	t := &c.target
	switch {
	case s.agent == nil:
		return nil, false
	case t.route == nil:
		return errNoRoute, true
	case t.by != byEndpoint:
		return nil, false
	}
	f := s.find(c)
	if f != nil { // the agent may know the id, unless the operator also wants the proof
		return f, !s.cfg.OwnIDsOnly && f == t.lost.id && c.container == nil
	}
	// The agent may have statistics that metad does not collect.
	return errNoRoute, s.cfg.NoStats && t.forms&ofStats != 0 &&
		isAgentID(c.container.EndpointID)
}

// requested returns the decoded and clean path of the request. If the client should use another
// path instead, redirect is that path.
func requested(ctx *fasthttp.RequestCtx) (path []byte, redirect string, f *failure) {
	req := &ctx.Request.Header
	if !req.IsHTTP11() && string(req.Protocol()) != "HTTP/1.0" {
		return nil, "", errBadVersion
	}
	// fasthttp knows only one spelling of "close"
	if hasToken(req.Peek(fasthttp.HeaderConnection), tokenClose) {
		ctx.SetConnectionClose()
	}
	target := req.RequestURI()
	if path, ok := plainPath(target); ok {
		return path, "", nil
	}
	path, redirect, err := parsePath(target)
	if err != nil {
		return nil, "", errBadRequest
	}
	return path, redirect, nil
}

// admit sets the rate headers and takes a token from the bucket of c's source.
func (s *Server) admit(ctx *fasthttp.RequestCtx, c *conn) *failure {
	s.setRateHeaders(ctx, c)
	if s.cfg.Rate == (RateLimit{}) {
		return nil
	}
	wait := c.peer.bucket.take(s.clock(s.now(ctx)), s.cfg.Rate)
	if wait == 0 {
		return nil
	}
	ctx.Response.Header.Set(fasthttp.HeaderRetryAfter, strconv.FormatInt((wait+1e9-1)/1e9, 10))
	return errLimited
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

// maxSkippedBody is how many bytes of an unused body are read to keep the connection, as in
// net/http.
const maxSkippedBody = 256 << 10

// finishBody reads the request's body to its end. Otherwise fasthttp would take the rest of it for
// the next request. It fails if the request is malformed.
func finishBody(ctx *fasthttp.RequestCtx) *failure {
	h := &ctx.Request.Header
	if expect := h.Peek(fasthttp.HeaderExpect); len(expect) > 0 &&
		!bytes.EqualFold(expect, expectContinue) {
		return errBadExpectation
	}
	body := ctx.RequestBodyStream()
	if body == nil {
		return nil
	}
	if h.ContentLength() == -1 && agentproxy.HasContentLength(h.RawHeaders()) {
		return errBadRequest // two lengths would allow request smuggling
	}
	n, err := io.CopyN(io.Discard, body, maxSkippedBody+1)
	if err != nil && !errors.Is(err, io.EOF) {
		return readError(err)
	}
	if n > maxSkippedBody {
		ctx.SetConnectionClose()
	}
	return nil
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
