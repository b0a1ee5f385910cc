package docker

import (
	"net/netip"
	"slices"
	"time"

	"metad/pkg/task"
)

// doubt is when a container may be looked at because its MAC is said to be another. A container can
// send from made-up MACs as fast as it likes, so each look in a row that finds nothing new makes
// the next one wait longer.
type doubt struct {
	until time.Time // no look for this reason before
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

// wrongMACs looks at the containers that have one of the addresses.
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

// settleDoubt takes note of what a look has found: if that is something new, the next doubt is as
// good as the first.
func (c *tracked) settleDoubt(found *namespace) {
	if c.ns == nil || found == nil || !slices.Equal(c.ns.endpoints, found.endpoints) {
		c.doubt = doubt{}
	}
}
