package server

import (
	"encoding/json"
	"errors"
	"net/http"

	"github.com/valyala/fasthttp"

	"metad/pkg/agentproxy"
	"metad/pkg/task"
)

// taskMetadata answers with the task's document.
func (s *Server) taskMetadata(ctx *fasthttp.RequestCtx, c *conn) *failure {
	document(ctx, c.view.Document(task.V2))
	return nil
}

// containerMetadata answers with the document of one container of the task.
func (s *Server) containerMetadata(ctx *fasthttp.RequestCtx, c *conn) *failure {
	cv := c.view.Container(c.asked)
	if cv == nil {
		return errNoContainer
	}
	document(ctx, cv.Document(task.V2))
	return nil
}

// document makes doc the answer.
func document(ctx *fasthttp.RequestCtx, doc task.Document) {
	ctx.Response.Header.SetContentType(typeJSON)
	for _, segment := range doc.Segments() {
		ctx.Response.AppendBody(segment)
	}
}

// taskWithTags answers with the task's document as the agent gives it, tags included, or without
// them if the agent cannot be asked. The agent, too, leaves out tags that it cannot get.
//
// Only the agent knows tags. Its v2 path for them wants the task's own source address, which a
// request of metad's does not have. Its v3 path wants a container's endpoint id instead, and answers
// the same document.
func (s *Server) taskWithTags(ctx *fasthttp.RequestCtx, c *conn) *failure {
	doc, err := s.taggedDocument(c.view.Task)
	if err != nil {
		document(ctx, c.view.Document(task.V2))
		return nil
	}
	ctx.Response.Header.SetContentType(typeJSON)
	ctx.Response.SetBodyRaw(doc)
	return nil
}

var errNoTags = errors.New("the agent has no tags for the task")

func (s *Server) taggedDocument(t *task.Task) ([]byte, error) {
	id := endpointID(t)
	if s.agent == nil || id == "" || !s.forwards.take() {
		return nil, errNoTags
	}
	defer s.forwards.give()
	status, doc, err := s.agent.Get(s.life, "/v3/"+id+"/taskWithTags", s.agent.Timeout)
	if err != nil {
		return nil, err
	}
	// A container chooses its own environment, and so the id: the answer must be its task's.
	var of struct{ TaskARN string }
	if err := json.Unmarshal(doc, &of); err != nil || status != http.StatusOK || of.TaskARN != t.ARN {
		return nil, errNoTags
	}
	return doc, nil
}

// endpointID returns the endpoint id of one of t's containers, "" if none has a usable one.
func endpointID(t *task.Task) string {
	for _, c := range t.Containers {
		if agentproxy.IsToken([]byte(c.EndpointID)) {
			return c.EndpointID
		}
	}
	return ""
}
