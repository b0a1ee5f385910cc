package server

import (
	"github.com/valyala/fasthttp"

	"metad/pkg/lookup"
	"metad/pkg/task"
)

// taskStats answers {"<id>": sample or null, …}, in the task's order.
func (s *Server) taskStats(ctx *fasthttp.RequestCtx, c *conn) *failure {
	v := c.view
	if v.Task.Containers == nil {
		return errNoTaskStats
	}
	asked := s.now(ctx).UnixNano()
	resp := &ctx.Response
	resp.Header.SetContentType(typeJSON)
	before := "{"
	for i := range v.Containers {
		cv := &v.Containers[i]
		if cv.ID == "" { // being created: nothing to key it by
			continue
		}
		resp.AppendBodyString(before)
		resp.AppendBody(cv.StatsKey)
		appendSample(resp, s.sampleOf(cv, asked))
		before = ","
	}
	if before == "{" {
		resp.AppendBodyString(before)
	}
	resp.AppendBodyString("}")
	return nil
}

// containerStats answers with the last sample of one container, or with each new one as it is taken.
func (s *Server) containerStats(ctx *fasthttp.RequestCtx, c *conn) *failure {
	cv := c.view.Container(c.asked)
	// A container that has just started may not be known to run yet, and may be the one that asks.
	if cv == nil || cv.KnownStatus == task.StatusStopped || s.cfg.NoStats {
		return errNoStats
	}
	if s.cfg.Samples != nil && !ctx.IsHead() && len(ctx.URI().QueryString()) > 0 && ctx.QueryArgs().GetBool("stream") {
		return s.stream(ctx, c, cv.ID)
	}
	ctx.Response.Header.SetContentType(typeJSON)
	appendSample(&ctx.Response, s.sampleOf(cv, s.now(ctx).UnixNano()))
	return nil
}

// sampleOf returns cv's last sample, nil if it has none, and tells the sampler that it was asked for.
func (s *Server) sampleOf(cv *lookup.ContainerView, now int64) *task.Sample {
	if cv.KnownStatus == task.StatusStopped || s.cfg.NoStats { // a sample that is there is an old one
		return nil
	}
	cv.Stats.Ask(now)
	return cv.Stats.Load()
}

// appendSample appends sample in the form of v2 to the body of resp, null if it is nil.
func appendSample(resp *fasthttp.Response, sample *task.Sample) {
	if sample == nil {
		resp.AppendBodyString("null")
		return
	}
	resp.AppendBody(sample.JSON[:sample.V2])
	resp.AppendBodyString("}")
}
