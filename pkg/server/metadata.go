package server

import (
	"github.com/valyala/fasthttp"

	"metad/pkg/task"
)

// versionPath is what a version's paths at the agent begin with. The agent's v2 goes by the task's
// own source address, which a request of metad's does not have; its v3 answers the same documents.
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
// else with metad's own. v2's are always metad's own, and so are streams, which the agent does not
// have.
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

// taskWithTags answers with the task's document as the agent gives it, tags included, or without
// them if the agent cannot be asked. The agent, too, leaves out tags that it cannot get.
func (s *Server) taskWithTags(ctx *fasthttp.RequestCtx, c *conn) *failure {
	if doc := s.fromAgent(s.tagged, c, versionPath[c.target.version],
		"/taskWithTags"); doc != nil {
		setBody(ctx, doc)
		return nil
	}
	setDocument(ctx, c.view.Document(c.target.version))
	return nil
}

// setBody makes doc, which is never written to again, the answer.
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
