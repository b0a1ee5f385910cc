package server

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/valyala/fasthttp"

	"metad/pkg/lookup"
	"metad/pkg/task"
)

// Only the agent knows tags, and its v2 path for them wants the task's own source address, which a
// request of ours does not have. Its v3 path wants a container's endpoint id instead, and answers the
// same document.

// maxTagged bounds a task document that the agent sends.
const maxTagged = 1 << 20

// tags answers with the task's document as the agent gives it, tags included, or without them if
// the agent cannot be asked: the agent, too, leaves out tags that it cannot get.
func (s *Server) tags(resp *fasthttp.Response, v *lookup.View) {
	if doc, err := s.taggedDocument(v.Task); err == nil {
		resp.SetBodyRaw(doc)
		return
	}
	resp.SetBodyRaw(v.Document)
}

var errNoTags = errors.New("the agent has no tags for the task")

func (s *Server) taggedDocument(t *task.Task) ([]byte, error) {
	id := endpointID(t)
	if s.agent == "" || id == "" {
		return nil, errNoTags
	}
	if !s.forwards.take() {
		return nil, errNoTags
	}
	defer s.forwards.give()
	up, f := s.dialAgent(time.Now().Add(s.cfg.AgentTimeout))
	if f != served {
		return nil, errNoTags
	}
	defer up.Close()
	if _, err := fmt.Fprintf(up, "GET /v3/%s/taskWithTags HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", id, s.agent); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(up), nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, errNoTags
	}
	doc, err := io.ReadAll(io.LimitReader(resp.Body, maxTagged+1))
	if err != nil {
		return nil, err
	}
	// A container chooses its own environment, and so the id: the answer must be its task's.
	var of struct{ TaskARN string }
	if err := json.Unmarshal(doc, &of); err != nil || len(doc) > maxTagged || of.TaskARN != t.ARN {
		return nil, errNoTags
	}
	return doc, nil
}

// endpointID returns the endpoint id of one of t's containers, "" if none has a usable one.
func endpointID(t *task.Task) string {
	for _, c := range t.Containers {
		if isToken([]byte(c.EndpointID)) {
			return c.EndpointID
		}
	}
	return ""
}
