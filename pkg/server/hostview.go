package server

import (
	"github.com/valyala/fasthttp"

	"metad/pkg/lookup"
	"metad/pkg/task"
)

// The host's view: every task, for a container that was given the right to it. The ECS agent's
// library has these paths for managed daemons; the agent itself does not serve them.

// LabelHostTasks is the label that, with the value "true", lets a container see all of the host's
// tasks. It must be set at the container's creation: package docker takes away one that comes from
// the image.
const LabelHostTasks = "metad.host-tasks"

// hostTasks returns every task's view if c may see them, else nil.
func (s *Server) hostTasks(c *conn) []*lookup.View {
	if c.container.Labels[LabelHostTasks] != "true" {
		return nil
	}
	return s.tasks.Views()
}

// hostMetadata answers with an array of the documents of all tasks, by ARN.
func (s *Server) hostMetadata(ctx *fasthttp.RequestCtx, c *conn) *failure {
	views := s.hostTasks(c)
	if views == nil {
		return errNoRoute
	}
	before := "["
	for _, v := range views {
		_, _ = ctx.WriteString(before)
		setDocument(ctx, v.Document(task.V4))
		before = ","
	}
	_, _ = ctx.WriteString("]")
	return nil
}

// hostStats answers {"<id>": sample, …} with the containers of all tasks.
func (s *Server) hostStats(ctx *fasthttp.RequestCtx, c *conn) *failure {
	views := s.hostTasks(c)
	if views == nil {
		return errNoRoute
	}
	now := s.now(ctx).UnixNano()
	ctx.Response.Header.SetContentType(typeJSON)
	_, _ = ctx.WriteString("{")
	others := false
	for _, v := range views {
		others = s.writeStats(ctx, task.V4, v, others, now)
	}
	_, _ = ctx.WriteString("}")
	return nil
}
