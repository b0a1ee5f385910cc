package docker

import (
	"cmp"
	"maps"
	"reflect"
	"slices"
	"time"

	"metad/pkg/task"
)

// changed builds the tasks that may have changed, and reports whether any has.
func (s *state) changed() (changed bool) {
	for arn := range s.dirty {
		old := s.tasks[arn]
		if group := s.groups[arn]; len(group) == 0 {
			delete(s.tasks, arn)
		} else {
			s.tasks[arn] = keep(old, s.task(arn, group))
		}
		if s.tasks[arn] != old {
			s.renewed = append(s.renewed, arn)
		}
	}
	clear(s.dirty)
	return len(s.renewed) > 0
}

// set returns all tasks, ordered by ARN. It copies the last set, which others may still be reading,
// but for what has changed since.
func (s *state) set() []*task.Task {
	slices.Sort(s.renewed)
	set := make([]*task.Task, 0, len(s.tasks))
	rest := s.published
	for _, arn := range slices.Compact(s.renewed) {
		i, had := slices.BinarySearchFunc(rest, arn, func(t *task.Task, arn string) int {
			return cmp.Compare(t.ARN, arn)
		})
		set = append(set, rest[:i]...)
		if rest = rest[i:]; had {
			rest = rest[1:]
		}
		if t := s.tasks[arn]; t != nil {
			set = append(set, t)
		}
	}
	s.renewed, s.published = s.renewed[:0], append(set, rest...)
	return s.published
}

// task returns the task of the containers of one group.
func (s *state) task(arn string, group map[string]*tracked) *task.Task {
	if t := s.asRestored(group); t != nil && s.announced[arn] == 0 {
		return t
	}
	return s.build(group)
}

// build makes the task of the containers of one group, none of which is nil.
func (s *state) build(group map[string]*tracked) *task.Task {
	members := slices.SortedFunc(maps.Values(group), func(a, b *tracked) int {
		return cmp.Or(a.desc.container.CreatedAt.Compare(b.desc.container.CreatedAt),
			cmp.Compare(a.id, b.id))
	})
	who := members[0].home
	t := &task.Task{ID: who.id, ARN: who.arn, Cluster: who.cluster, Family: who.family,
		Revision:         who.revision,
		AvailabilityZone: s.cfg.AvailabilityZone, Settling: s.announced[who.arn] > 0}
	var eni *namespace
	// the agent gives the pause container those of the network interface
	var dns task.NetworkDetails
	for _, m := range members {
		c := m.desc.container
		c.Stats, c.Cgroup = m.stats, m.cgroup
		if m.ns != nil {
			for _, ep := range m.ns.endpoints {
				ep.Container = c.ID
				t.Endpoints = append(t.Endpoints, ep)
			}
			if c.Type == task.TypeCNIPause && c.NetworkMode == "none" &&
				len(m.ns.eni4)+len(m.ns.eni6) > 0 {
				eni = m.ns
				dns = m.desc.dns
			}
		}
		// it is being started: by the time that it asks, it runs
		if (m.ns != nil || m.cgroup != task.Cgroup{}) && !c.Running() {
			c.KnownStatus, c.DesiredStatus = task.StatusRunning, task.StatusRunning
			c.StartedAt, c.FinishedAt, c.ExitCode = time.Time{}, time.Time{}, nil
			c.DockerNetworks = connected(c.DockerNetworks, m.ns)
		}
		if c.Type == task.TypeCNIPause && c.KnownStatus == task.StatusRunning &&
			(c.NetworkMode != "none" || m.ns != nil && m.ns.ecs) {
			c.KnownStatus = task.StatusResourcesProvisioned
		}
		t.Containers = append(t.Containers, &c)
	}
	slices.SortFunc(t.Endpoints, compareEndpoints)
	t.Endpoints = slices.Compact(t.Endpoints)
	if eni != nil {
		showENI(t, eni, dns)
	}
	complete(t, members, s.cfg)
	t.KnownStatus = taskStatus(t.Containers)
	t.DesiredStatus = task.StatusRunning
	if t.KnownStatus == task.StatusStopped {
		t.DesiredStatus = task.StatusStopped
	}
	if s.cfg.Enrich != nil {
		s.cfg.Enrich(t)
	}
	return t
}

// showENI gives every container the addresses of the task's network interface, and ports that are
// those of the container: nothing translates them.
func showENI(t *task.Task, eni *namespace, dns task.NetworkDetails) {
	details := eni.details
	details.DNSName, details.DNSServers, details.DNSSearch = dns.DNSName, dns.DNSServers,
		dns.DNSSearch
	for _, c := range t.Containers {
		c.Networks = []task.Network{{Mode: "awsvpc", IPv4Addresses: eni.eni4,
			IPv6Addresses: eni.eni6, NetworkDetails: details}}
		c.Ports = slices.Clone(c.Ports)
		for i := range c.Ports {
			c.Ports[i].HostPort = c.Ports[i].ContainerPort
		}
	}
}

// taskStatus is that of the least advanced of the containers that do the task's work. As long as
// there are only pause containers, nothing of it has begun.
func taskStatus(containers []*task.Container) task.Status {
	rank := []task.Status{task.StatusNone, task.StatusCreated, task.StatusRunning,
		task.StatusStopped}
	least := len(rank) - 1
	pausing := 0 // pause containers that have not stopped
	working := 0
	for _, c := range containers {
		switch c.Type {
		case task.TypeCNIPause, task.TypeNamespacePause:
			if c.KnownStatus != task.StatusStopped {
				pausing++
			}
		default:
			working++
			least = min(least, slices.Index(rank, c.KnownStatus))
		}
	}
	if working == 0 && pausing > 0 {
		return task.StatusNone
	}
	return rank[least]
}

// keep returns old if t says nothing new; else t, with those of old's containers that are the same.
func keep(old, t *task.Task) *task.Task {
	if old == nil {
		return t
	}
	if !t.MadeUp && t.Limits == (task.TaskLimits{}) {
		t.Limits = old.Limits // they end with the task's cgroup
	}
	for i, c := range t.Containers {
		if o := old.Container(c.ID); o != nil && reflect.DeepEqual(o, c) {
			t.Containers[i] = o
		}
	}
	if reflect.DeepEqual(old, t) {
		return old
	}
	return t
}
