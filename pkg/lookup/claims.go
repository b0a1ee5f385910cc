package lookup

import (
	"net/netip"
	"slices"

	"metad/pkg/task"
)

// claims are what all tasks claim, granted or not. It is changed task by task, and says what is
// left of the others' claims where one ends.
type claims struct {
	addrs map[netip.Addr][]claim
	ports map[int][]netip.Addr // by ifindex: the addresses that are claimed behind it
	// by endpoint id: the tags of the tasks of the containers that hold it
	ids map[string][]uint32
	// by container id: the tag of its task
	containers map[string]uint32
	// by what Docker names a container by: the tags of other tasks that have a container in its
	// network
	guests map[string][]uint32
}

// claim is one task's claim of an address.
type claim struct {
	tag uint32
	ep  task.Endpoint
}

func newClaims() claims {
	return claims{addrs: map[netip.Addr][]claim{}, ports: map[int][]netip.Addr{},
		ids: map[string][]uint32{}, containers: map[string]uint32{},
		guests: map[string][]uint32{}}
}

// add adds what the task with the tag claims.
func (cs *claims) add(tag uint32, t *task.Task) {
	for _, ep := range t.Endpoints {
		cs.addrs[ep.Addr] = append(cs.addrs[ep.Addr], claim{tag, ep})
		cs.ports[ep.Ifindex] = append(cs.ports[ep.Ifindex], ep.Addr)
	}
	for _, c := range t.Containers {
		if holdsEndpoint(c) {
			cs.ids[c.EndpointID] = append(cs.ids[c.EndpointID], tag)
		}
		if c.ID != "" {
			cs.containers[c.ID] = tag
		}
	}
	for of := range strangers(t) {
		cs.guests[of] = append(cs.guests[of], tag)
	}
}

// remove ends what add began with the same task.
func (cs *claims) remove(tag uint32, t *task.Task) {
	for _, ep := range t.Endpoints {
		without(cs.addrs, ep.Addr, claim{tag, ep})
		without(cs.ports, ep.Ifindex, ep.Addr)
	}
	for _, c := range t.Containers {
		if holdsEndpoint(c) {
			without(cs.ids, c.EndpointID, tag)
		}
		if cs.containers[c.ID] == tag { // else it is another task's by now
			delete(cs.containers, c.ID)
		}
	}
	for of := range strangers(t) {
		without(cs.guests, of, tag)
	}
}

// without removes v, once, from the list at k.
func without[K, V comparable](m map[K][]V, k K, v V) {
	list := m[k]
	i := slices.Index(list, v)
	switch {
	case i < 0:
	case len(list) == 1:
		delete(m, k)
	default:
		m[k] = slices.Delete(list, i, i+1)
	}
}

// holdsEndpoint reports whether the container answers to its endpoint id.
func holdsEndpoint(c *task.Container) bool {
	return c.EndpointID != "" && c.ID != "" && c.KnownStatus != task.StatusStopped
}
