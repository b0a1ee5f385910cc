package server

import (
	"errors"
	"net"
	"time"

	"github.com/valyala/fasthttp"

	"metad/pkg/agentproxy"
)

// forward passes the request on to the agent and its answer back. It returns unanswered if the
// agent does not listen.
func (s *Server) forward(ctx *fasthttp.RequestCtx, c *conn, unanswered *failure) *failure {
	start := time.Now()
	x, err := s.agent.Prepare(&ctx.Request.Header, ctx.RequestBodyStream())
	if err != nil {
		s.metrics.Requests.asked(start, err)
		return answerTo(err)
	}
	if !s.forwards.take(c.src) {
		s.metrics.Requests.busy()
		return s.unforwarded(ctx, c, errBusy)
	}
	if err := s.agent.Connect(s.life, standIn(c.tag), x); err != nil {
		s.forwards.give(c.src)
		s.metrics.Requests.asked(start, err)
		if errors.Is(err, agentproxy.ErrAbsent) {
			return s.unforwarded(ctx, c, unanswered)
		}
		return s.unforwarded(ctx, c, answerTo(err))
	}
	x.Guard = s.guard
	x.Failed = func(err error) []byte { return answerTo(err).raw() }
	// Not in the handler below: fasthttp does not promise to call it.
	c.onClose(func() {
		_ = x.Close()
		s.forwards.give(c.src)
	})
	// Answers to pipelined requests before this one may still be in fasthttp's buffer. It
	// writes them before it calls the handler, which is why the exchange has to wait for it.
	c.passedOn = true
	s.hijack(ctx, func(net.Conn) { s.metrics.Requests.asked(start, x.Run(c)) })
	return nil
}

// unforwarded prepares an answer of metad's own to a request that did not reach the agent.
func (s *Server) unforwarded(ctx *fasthttp.RequestCtx, c *conn, why *failure) *failure {
	if f := finishBody(ctx); f != nil {
		return f
	}
	s.setRateHeaders(ctx, c)
	return why
}
