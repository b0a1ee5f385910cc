package docker

import (
	"slices"

	"metad/pkg/task"
)

// restore sets the initial state to the tasks of an earlier process. A container of them that the
// Engine lists stays as it was until it has been inspected.
func (s *state) restore(tasks []*task.Task) {
	for _, t := range tasks {
		if len(t.Containers) == 0 {
			continue
		}
		s.restored = true
		s.tasks[t.ARN], s.renewed = t, append(s.renewed, t.ARN)
		owners := endpointOwners(t)
		for _, tc := range t.Containers {
			c := s.container(tc.ID)
			c.restored, c.cgroup = t, tc.Cgroup
			if tc.Stats != nil {
				c.stats = tc.Stats
			}
			d := &description{container: *tc, identity: identity{arn: t.ARN, id: t.ID,
				cluster: t.Cluster, family: t.Family, revision: t.Revision}}
			d.madeUp = t.MadeUp
			if eps := owners[tc.ID]; len(eps) > 0 {
				c.ns = &namespace{endpoints: eps}
			}
			s.place(c, d)
		}
	}
}

// endpointOwners returns the endpoints of t by the id of their container: the one to which Docker
// has assigned the address, else the one that holds the task's namespace.
func endpointOwners(t *task.Task) map[string][]task.Endpoint {
	owners := map[string][]task.Endpoint{}
	for _, ep := range t.Endpoints {
		var owner *task.Container
		for _, c := range t.Containers {
			d := description{container: *c}
			for _, n := range c.DockerNetworks {
				if n.IPAddress == ep.Addr.String() {
					owner = c
				}
			}
			if owner == nil && d.ownNetwork() && d.sharesNetworkOf() == "" {
				owner = c
			}
			if c.Type == task.TypeCNIPause && c.Running() {
				owner = c
				break
			}
		}
		if owner == nil {
			owner = t.Containers[0]
		}
		owners[owner.ID] = append(owners[owner.ID], ep)
	}
	return owners
}

// asRestored returns the task of an earlier process if it is still up to date: the task has the
// same containers, and none of them has been inspected since.
func (s *state) asRestored(group map[string]*tracked) *task.Task {
	var t *task.Task
	for _, c := range group {
		if c.restored == nil || t != nil && c.restored != t {
			return nil
		}
		t = c.restored
	}
	if len(group) != len(t.Containers) {
		return nil
	}
	for _, ep := range t.Endpoints {
		owned := false
		for _, c := range group {
			owned = owned || c.ns != nil && slices.Contains(c.ns.endpoints, ep)
		}
		if !owned {
			return nil
		}
	}
	return t
}
