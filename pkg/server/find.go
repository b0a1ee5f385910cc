package server

import (
	"context"
	"net/netip"

	"metad/bpf"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// proven returns the task of c's client and the container, as the kernel proves them. The container
// is nil if there is no proof of it. If the task is not known, proven returns nil, nil. It does not
// wait.
//
// The container is the one in whose cgroup the socket was made, if the kernel says so by the mark
// or by the socket. Otherwise it is the one container that can send from the task's address, if
// there is only one.
func (s *Server) proven(c *conn) (*lookup.View, *lookup.ContainerView) {
	v := s.tasks.Resolve(c.tag, c.remote.Addr())
	if v == nil {
		return nil, nil
	}
	cv := v.Sender(c.tag, c.remote.Addr())
	switch {
	case !namesContainer(c.tag):
		if c.maker == "" {
			break
		}
		cv = nil
		for i := range v.Containers {
			if v.Containers[i].ID == c.maker {
				cv = &v.Containers[i]
			}
		}
	case cv == nil:
	case c.maker == "":
		c.maker = cv.ID
	case c.maker != cv.ID:
		// The container is gone, and another one has its number. A process to which it gave
		// the socket still sends requests.
		cv = nil
	}
	return v, cv
}

// namesContainer reports whether the mark tag of a connection names the container that made its
// socket.
func namesContainer(tag uint32) bool {
	return tag&bpf.TagPort == 0 && bpf.ContainerNumber(tag) != 0
}

// doubtful reports whether c's client may be another container than c.container, the only one that
// is known to have the address. If the kernel can name that one, the mark would have named it. So
// the client has been there before the container's cgroup was known, or it is a container in the
// same network that is not known yet.
func (s *Server) doubtful(c *conn) bool {
	return c.target.by == theCaller && c.target.forms&ofContainer != 0 && !c.searched &&
		c.container != nil && !namesContainer(c.tag) && c.view.Number(c.container) != 0
}

// findMaker finds the container of c's client by its socket, if the mark does not name it: the
// container's cgroup may not have been known when the connection was made. It reports whether it
// has found the container. It waits for a container that the task does not show as started. It does
// this once for each connection, whatever the result.
func (s *Server) findMaker(c *conn) bool {
	if s.cfg.SocketCgroup == nil || c.searched || c.view == nil || namesContainer(c.tag) {
		return false
	}
	c.searched = true
	pid := c.view.NamespaceOf(c.remote.Addr())
	local, ok := c.LocalAddr().(interface{ AddrPort() netip.AddrPort })
	if pid == 0 || !ok {
		return false
	}
	cgroup, err := s.cfg.SocketCgroup(pid, c.remote, local.AddrPort())
	if err != nil {
		return false
	}
	if cv := c.view.InCgroup(cgroup); cv != nil {
		c.maker = cv.ID
	} else if s.cfg.CgroupContainer != nil {
		c.maker = s.cfg.CgroupContainer(cgroup)
		s.awaitMaker(c)
	}
	return c.maker != ""
}

// awaitMaker waits, for MakerWait at most, until c's task shows that c.maker has been started.
func (s *Server) awaitMaker(c *conn) {
	if c.maker == "" || s.cfg.MakerWait == 0 {
		return
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	ctx, cancel := context.WithTimeout(s.life, s.cfg.MakerWait)
	defer cancel()
	for {
		v := s.tasks.Resolve(c.tag, c.remote.Addr())
		if v == nil {
			return
		}
		if cv := v.Container([]byte(c.maker)); cv != nil && started(cv.KnownStatus) {
			return
		}
		select {
		case <-s.tasks.Changed(v):
		case <-ctx.Done():
			return
		}
	}
}

func started(s task.Status) bool {
	return s == task.StatusRunning || s == task.StatusResourcesProvisioned
}

// find sets c's view and container to the objects that its target names, after a bounded wait if
// that is necessary. Otherwise it returns the answer to the client.
func (s *Server) find(c *conn) *failure {
	f := s.locate(c, &c.question)
	if (f != nil || c.view.Task.Settling && c.target.by != byEndpoint) && s.await(c) {
		f = s.locate(c, &c.question)
	}
	lacks := func() bool {
		return f != nil && c.target.by == theCaller && c.view != nil && c.container == nil
	}
	if (lacks() || f == nil && s.doubtful(c)) && s.findMaker(c) {
		f = s.locate(c, &c.question)
	}
	if f == nil && c.target.by != byEndpoint {
		c.arn = c.view.Task.ARN
	}
	if lacks() {
		s.unnamed.Add(1)
	}
	return f
}

// await waits, for UnknownWait at most, if c's task is not known and never was, or if the task may
// not have the client's container yet. It reports whether it waited.
func (s *Server) await(c *conn) bool {
	v := s.tasks.Resolve(c.tag, c.remote.Addr())
	ofHost := c.remote.Addr() == s.cfg.HostAddr && c.tag == bpf.TagNone // not of a container
	if v.Settled(c.tag) || c.arn != "" || s.cfg.UnknownWait == 0 || ofHost {
		return false
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	ctx, cancel := context.WithTimeout(s.life, s.cfg.UnknownWait)
	defer cancel()
	s.tasks.Await(ctx, c.tag, c.remote.Addr())
	return true
}

// locate is find without the wait. It sets r, a request of c's. It does not allocate.
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
	// The id alone is enough, unless the operator or the path also wants the proof.
	if (s.cfg.OwnIDsOnly || r.target.forms&ofHost != 0) &&
		(caller == nil || caller.Tag != r.view.Tag) {
		r.view, r.container = nil, nil
		return r.target.lost.id
	}
	return nil
}
