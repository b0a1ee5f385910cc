package server

import (
	"github.com/valyala/fasthttp"

	"metad/pkg/lookup"
)

func hasContentLength([]byte) bool { return false }

func (s *Server) forward(*fasthttp.RequestCtx, *conn) error { return errNoRoute }

// tags answers with the task's document and, if the agent tells them, its tags.
func (s *Server) tags(resp *fasthttp.Response, v *lookup.View) { resp.SetBodyRaw(v.Document) }

func (s *Server) stream(*fasthttp.RequestCtx, *conn, string) error { return errBusy }
