package docker

import (
	"net/netip"
	"slices"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// setHome makes the endpoint's address the one that counts at its port.
func (found *namespace) setHome(ep task.Endpoint) {
	if found.homes == nil {
		found.homes = map[int]netip.Addr{}
	}
	found.homes[ep.Ifindex] = ep.Addr
}

// believe removes the addresses that do not count from found, which was read in c's namespace. If
// Docker has assigned addresses, found has only those. Otherwise, as in awsvpc mode, a network
// plugin gives a port one address, once: the first one that metad has seen there. A container with
// NET_ADMIN can add an address that the next task will get.
func (s *state) believe(c *tracked, found *namespace) {
	if found == nil || len(assigned(&c.desc.container)) > 0 {
		return
	}
	var known map[netip.Addr]bool
	if before := c.ns; before != nil {
		known = before.strays
		for _, ep := range before.endpoints {
			found.setHome(ep)
		}
		for ifindex, addr := range before.homes {
			found.setHome(task.Endpoint{Ifindex: ifindex, Addr: addr})
		}
	}
	found.endpoints = slices.DeleteFunc(found.endpoints, func(ep task.Endpoint) bool {
		home, has := found.homes[ep.Ifindex]
		if !has {
			found.setHome(ep)
			return false
		}
		if home != ep.Addr {
			s.stray(c, found, known, ep, home)
		}
		return home != ep.Addr
	})
}

// stray stores that the endpoint's address does not count, and logs it once.
func (s *state) stray(c *tracked, found *namespace, known map[netip.Addr]bool, ep task.Endpoint,
	home netip.Addr) {
	if found.strays == nil {
		found.strays = map[netip.Addr]bool{}
	}
	found.strays[ep.Addr] = true
	if known[ep.Addr] {
		return
	}
	s.strays.Add(1)
	s.cfg.Log.Warn("address not believed: its port has another one",
		zap.Stringer("addr", ep.Addr), zap.Stringer("portsAddr", home),
		zap.Int("ifindex", ep.Ifindex),
		zap.String("task", c.home.arn), zap.String("container", c.id))
}
