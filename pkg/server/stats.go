package server

import (
	"io"
	"time"

	"github.com/valyala/fasthttp"

	"metad/pkg/lookup"
	"metad/pkg/task"
)

// noSample stands for the sample of a container that has none.
var noSample = [...]string{task.V2: "null", task.V3: "null", task.V4: "{}"}

// Answers if there are no statistics: an error of the request in v2 and v3, and of the server in
// v4.
var (
	noStats     = [...]*failure{task.V2: errNoStats, task.V3: errNoStats, task.V4: errNoStatsV4}
	noTaskStats = [...]*failure{task.V2: errNoTaskStats, task.V3: errNoTaskStats,
		task.V4: errNoTaskStatsV4}
)

// body is what an answer is written to: a fasthttp request, or a buffer.
type body interface {
	io.Writer
	io.StringWriter
}

// taskStats answers {"<id>": sample, …}, in the task's order, or again with each new sample.
func (s *Server) taskStats(ctx *fasthttp.RequestCtx, c *conn) *failure {
	if c.view.Task.Containers == nil {
		return noTaskStats[c.target.version]
	}
	if s.cfg.Samples != nil && !s.cfg.NoStats && wantsStream(ctx) {
		return s.stream(ctx, c, s.followTaskStats)
	}
	ctx.Response.Header.SetContentType(typeJSON)
	_, _ = ctx.WriteString("{")
	s.writeStats(ctx, c.target.version, c.view, false, s.now(ctx).UnixNano())
	_, _ = ctx.WriteString("}")
	return nil
}

// writeStats writes the members of v's statistics, with a comma before the first if there are
// others before it, and reports whether there are any now. now is in Unix nanoseconds.
func (s *Server) writeStats(to body, ver task.Version, v *lookup.View, others bool,
	now int64) bool {
	for i := range v.Containers {
		cv := &v.Containers[i]
		if cv.ID == "" { // being created: it has no key yet
			continue
		}
		if others {
			_, _ = to.WriteString(",")
		}
		_, _ = to.Write(cv.StatsKey)
		writeSample(to, ver, s.sampleOf(cv, now))
		others = true
	}
	return others
}

// containerStats answers with the last sample of one container, or with each new one as it is
// taken.
func (s *Server) containerStats(ctx *fasthttp.RequestCtx, c *conn) *failure {
	cv := c.container
	// metad may not know yet that the container runs, and it may be the client itself.
	if cv.KnownStatus == task.StatusStopped || s.cfg.NoStats {
		return noStats[c.target.version]
	}
	if s.cfg.Samples != nil && wantsStream(ctx) {
		return s.stream(ctx, c, s.followContainerStats)
	}
	ctx.Response.Header.SetContentType(typeJSON)
	writeSample(ctx, c.target.version, s.sampleOf(cv, s.now(ctx).UnixNano()))
	return nil
}

// sampleOf returns cv's last sample, or nil, and tells the sampler that a client has requested it.
func (s *Server) sampleOf(cv *lookup.ContainerView, now int64) *task.Sample {
	// a stopped container's sample is an old one
	if cv.KnownStatus == task.StatusStopped || s.cfg.NoStats {
		return nil
	}
	cv.Stats.Ask(now)
	sample := cv.Stats.Load()
	if sample != nil {
		s.metrics.SampleAge.Observe(time.Duration(now - sample.Read.UnixNano()))
	}
	return sample
}

// writeSample writes sample in ver's form, or noSample if it is nil.
func writeSample(to body, ver task.Version, sample *task.Sample) {
	switch {
	case sample == nil:
		_, _ = to.WriteString(noSample[ver])
	case ver == task.V4:
		_, _ = to.Write(sample.JSON)
	default:
		_, _ = to.Write(sample.JSON[:sample.V2])
		_, _ = to.WriteString("}")
	}
}
