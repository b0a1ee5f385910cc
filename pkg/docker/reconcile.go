package docker

import (
	"cmp"
	"slices"
	"strings"

	"github.com/docker/docker/api/types/container"

	"metad/pkg/task"
)

// list compares the Engine's list with the state.
func (s *state) list(l listing) {
	s.lists++
	if s.unseen == nil {
		s.unseen = map[string]bool{}
		for i := range l.containers {
			id := l.containers[i].ID
			s.unseen[id] = true
			if c := s.containers[id]; c == nil || c.desc == nil {
				s.missing.add(id)
			}
		}
	}
	// Running containers first: they may send requests.
	slices.SortStableFunc(l.containers, func(a, b container.Summary) int {
		return cmp.Compare(listedRunning(&b), listedRunning(&a))
	})
	ids := make(map[string]bool, len(l.containers))
	for i := range l.containers {
		ids[l.containers[i].ID] = true
		s.missing.listed(&l.containers[i])
		s.listed(&l.containers[i], l.connected || (i+s.lists)%s.recheck == 0)
	}
	for id, c := range s.containers {
		switch {
		case ids[id]:
		case c.restored != nil:
			s.forget(id)
		default:
			// it may be younger than the list: the Engine has the last word
			s.want(id, priorityRecheck)
		}
	}
}

// listed compares one container in the Engine's list with the state.
func (s *state) listed(sum *container.Summary, recheck bool) {
	c := s.containers[sum.ID]
	if c != nil && c.restored != nil && listedRunning(sum) == 0 {
		c.ns, c.cgroup = nil, task.Cgroup{} // another may have the address by now
		s.dirty[c.home.arn] = true
	}
	// At a low priority, so that a container that starts now does not wait for all of them.
	if recheck || c == nil || c.restored != nil || s.differs(c, sum) || s.moved(c) {
		s.want(sum.ID, priorityRecheck)
	}
}

// listedRunning returns 1 for a container that has processes according to the list, else 0.
func listedRunning(sum *container.Summary) int {
	switch sum.State {
	case "running", "paused", "restarting":
		return 1
	}
	return 0
}

// differs reports whether a line of the list shows that an event was lost.
func (s *state) differs(c *tracked, sum *container.Summary) bool {
	if c.desc == nil {
		return !s.looks.busy(c.id) // else it is being inspected anyway
	}
	return c.desc.differs(sum)
}

// differs reports whether a line of the list shows something other than d.
func (d *description) differs(sum *container.Summary) bool {
	known := &d.container
	if known.State != sum.State || !slices.Contains(sum.Names, "/"+known.DockerName) {
		return true
	}
	if !known.Running() {
		return false
	}
	if shown := listedHealth(sum.Status); known.Health != nil && shown != "" &&
		shown != known.Health.Status {
		return true
	}
	if sum.NetworkSettings == nil {
		return false
	}
	if len(sum.NetworkSettings.Networks) != len(known.DockerNetworks) {
		return true
	}
	for _, n := range known.DockerNetworks {
		if ep := sum.NetworkSettings.Networks[n.Name]; ep == nil ||
			ep.IPAddress != n.IPAddress {
			return true
		}
	}
	return false
}

// listedHealth returns the verdict in the status that a list shows, "Up 2 hours (healthy)"; "" if
// there is none.
func listedHealth(status string) string {
	switch {
	case strings.Contains(status, "(healthy)"):
		return "HEALTHY"
	case strings.Contains(status, "(unhealthy)"):
		return "UNHEALTHY"
	}
	return ""
}

// moved reports whether the container has another namespace than the one that was read.
func (s *state) moved(c *tracked) bool {
	return c.ns != nil && c.restored == nil &&
		s.inode(max(c.desc.container.PID, c.newborn)) != c.ns.inode
}
