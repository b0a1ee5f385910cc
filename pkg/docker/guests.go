package docker

import "strings"

// sharesNetworkOf returns the id or the name of the container whose network namespace this one is
// in; "" if it has one of its own or the host's.
func (d *description) sharesNetworkOf() string {
	host, _ := strings.CutPrefix(d.container.NetworkMode, "container:")
	if host == d.container.NetworkMode {
		return ""
	}
	return host
}

// homeOf returns the task that c is in. A container whose labels name no task is in the task of
// the container whose namespace it shares. Its packets come from there, so it gets the answers of
// that task.
func (s *state) homeOf(c *tracked, depth int) identity {
	const deepest = 8 // a guest's guest's …; no circle keeps us
	host := c.desc.sharesNetworkOf()
	if host == "" || !c.desc.alone || depth == deepest {
		return c.desc.identity
	}
	if h := s.find(host); h != nil && h.desc != nil {
		return s.homeOf(h, depth+1)
	}
	return c.desc.identity
}

// find returns the container with the id or name, or nil.
func (s *state) find(idOrName string) *tracked {
	if c := s.containers[idOrName]; c != nil {
		return c
	}
	const idLength = 64
	if len(idOrName) == idLength { // Docker resolves names at creation, but for old clients'
		return nil
	}
	for _, c := range s.containers {
		if c.desc != nil && c.desc.container.DockerName == idOrName {
			return c
		}
	}
	return nil
}

// moveGuests puts the containers that share c's namespace into c's task, or into their own again if
// c is gone.
func (s *state) moveGuests(c *tracked) {
	for _, host := range []string{c.id, c.desc.container.DockerName} {
		for id := range s.guests[host] {
			if g := s.containers[id]; g != nil && g != c && g.home != s.homeOf(g, 0) {
				s.leave(g)
				s.enter(g)
			}
		}
	}
}
