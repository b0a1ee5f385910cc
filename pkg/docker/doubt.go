package docker

import (
	"net/netip"
	"slices"
	"time"

	"metad/pkg/task"
)

// doubt says when a container may be looked at after an event of a wrong MAC. A container can send
// from made-up MACs without end, so each look in a row that finds nothing new makes the next one
// wait longer.
type doubt struct {
	until time.Time // no look for this reason before it
	pause time.Duration
}

const (
	firstDoubt = time.Second
	lastDoubt  = time.Minute
)

// begin reports whether a look is due.
func (d *doubt) begin(now time.Time) bool {
	if now.Before(d.until) {
		return false
	}
	if now.Sub(d.until) > lastDoubt { // it was quiet since
		d.pause = 0
	}
	d.pause = min(max(firstDoubt, 2*d.pause), lastDoubt)
	d.until = now.Add(d.pause)
	return true
}

// wrongMACs queues the containers that have one of the addresses, if a look is due.
func (s *state) wrongMACs(addrs map[netip.Addr]bool) {
	for _, c := range s.containers {
		switch {
		case !c.holds(addrs) || !c.doubt.begin(time.Now()):
		case c.newborn != 0:
			s.newborns.wantNamespace(c.id, priorityStarting)
		default:
			s.looks.wantNamespace(c.id, priorityEvent)
		}
	}
}

// holds reports whether one of the addresses is the container's.
func (c *tracked) holds(addrs map[netip.Addr]bool) bool {
	return c.ns != nil && slices.ContainsFunc(c.ns.endpoints, func(ep task.Endpoint) bool {
		return addrs[ep.Addr]
	})
}

// settleDoubt compares a finding with the last one: if it is new, the wait of the next doubt is
// again that of the first.
func (c *tracked) settleDoubt(found *namespace) {
	if c.ns == nil || found == nil || !slices.Equal(c.ns.endpoints, found.endpoints) {
		c.doubt = doubt{}
	}
}
