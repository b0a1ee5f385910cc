package server

import (
	"github.com/valyala/fasthttp"

	"metad/pkg/task"
)

// versionPath is the beginning of a version's paths at the agent. The agent's v2 needs the task's
// own source address, which a request of metad's does not have. Its v3 sends the same documents.
var versionPath = [...]string{task.V2: "/v3/", task.V3: "/v3/", task.V4: "/v4/"}

// taskMetadata answers with the task's document.
func (s *Server) taskMetadata(ctx *fasthttp.RequestCtx, c *conn) *failure {
	return s.metadata(ctx, c, "/task")
}

// containerMetadata answers with the document of one container.
func (s *Server) containerMetadata(ctx *fasthttp.RequestCtx, c *conn) *failure {
	return s.metadata(ctx, c, "")
}

// metadata answers with the agent's document if the container is the agent's and the agent answers,
// else with metad's own. v2 documents are always metad's own. So are streams, because the agent has
// none.
func (s *Server) metadata(ctx *fasthttp.RequestCtx, c *conn, form string) *failure {
	if wantsStream(ctx) {
		return s.stream(ctx, c, s.followDocument)
	}
	if c.target.version != task.V2 {
		if doc := s.fromAgent(s.documents, c, versionPath[c.target.version],
			form); doc != nil {
			setBody(ctx, doc)
			return nil
		}
	}
	setDocument(ctx, c.document())
	return nil
}

// taskWithTags answers with the agent's document of the task, with tags, or without them if the
// agent does not answer. The agent, too, leaves out tags that it cannot get.
func (s *Server) taskWithTags(ctx *fasthttp.RequestCtx, c *conn) *failure {
	if doc := s.fromAgent(s.tagged, c, versionPath[c.target.version],
		"/taskWithTags"); doc != nil {
		setBody(ctx, doc)
		return nil
	}
	setDocument(ctx, c.view.Document(c.target.version))
	return nil
}

// setBody makes doc the answer. doc must not change after that.
func setBody(ctx *fasthttp.RequestCtx, doc []byte) {
	ctx.Response.Header.SetContentType(typeJSON)
	ctx.Response.SetBodyRaw(doc)
}

// setDocument makes d the answer.
func setDocument(ctx *fasthttp.RequestCtx, d task.Document) {
	ctx.Response.Header.SetContentType(typeJSON)
	for _, segment := range d.Segments() {
		ctx.Response.AppendBody(segment)
	}
}
