package server

import (
	"context"

	"metad/pkg/lookup"
)

// proven returns the task that c comes from, as the kernel proves it, and the container, nil if the
// proof does not go so far; nil, nil if the task is not known. It does not wait.
//
// A container is proven only where no other one can send from the task's address. This is the place
// for a better proof of the container.
func (s *Server) proven(c *conn) (*lookup.View, *lookup.ContainerView) {
	v := s.tasks.Resolve(c.tag, c.remote.Addr())
	if v == nil {
		return nil, nil
	}
	return v, v.Only(c.remote.Addr())
}

// find sets c's view and container to what its target names, after a bounded wait if need be, or
// returns what the client is told instead.
func (s *Server) find(c *conn) *failure {
	f := s.locate(c, &c.question)
	if (f != nil || c.view.Task.Settling && c.target.by != byEndpoint) && s.await(c) {
		f = s.locate(c, &c.question)
	}
	if f == nil && c.target.by != byEndpoint {
		c.arn = c.view.Task.ARN
	}
	return f
}

// await waits, for UnknownWait at most, if c's task is not known and never was, or if the client may
// be a container that the task does not show yet. It reports whether it waited.
func (s *Server) await(c *conn) bool {
	v := s.tasks.Resolve(c.tag, c.remote.Addr())
	if v != nil && !v.Task.Settling || c.arn != "" || s.cfg.UnknownWait == 0 || c.remote.Addr() == s.cfg.HostAddr {
		return false
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	ctx, cancel := context.WithTimeout(s.life, s.cfg.UnknownWait)
	defer cancel()
	s.tasks.Await(ctx, c.tag, c.remote.Addr())
	return true
}

// locate is find that does not wait, for a request of c's. It does not allocate.
func (s *Server) locate(c *conn, r *question) *failure {
	r.view, r.container = s.proven(c)
	lost := &r.target.lost
	if r.target.by == byEndpoint {
		return s.locateEndpoint(r)
	}
	switch {
	case r.view == nil && c.arn == "":
		return lost.source
	case r.view == nil:
		return lost.gone
	}
	switch r.target.by {
	case byDockerID:
		r.container = r.view.Container(r.target.name)
	case byName:
		r.container = r.view.Named(r.target.name)
	case theCaller:
		if r.container == nil && r.target.forms&ofContainer != 0 {
			return lost.several
		}
		return nil
	}
	if r.container == nil {
		return lost.container
	}
	return nil
}

// locateEndpoint is locate for an endpoint id. r has the client's task, if it is known.
func (s *Server) locateEndpoint(r *question) *failure {
	caller := r.view
	r.view, r.container = s.tasks.Endpoint(r.target.name)
	if r.view == nil {
		return r.target.lost.id
	}
	// An id is as good as a password, except where the operator or the path wants the proof too.
	if (s.cfg.OwnIDsOnly || r.target.forms&ofHost != 0) && (caller == nil || caller.Tag != r.view.Tag) {
		r.view, r.container = nil, nil
		return r.target.lost.id
	}
	return nil
}
