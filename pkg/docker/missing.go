package docker

import (
	"net/netip"
	"slices"

	"github.com/docker/docker/api/types/container"
)

// missing has the containers of which no inspect was ever answered, by id, and the addresses that
// the Engine's list has of them.
type missing map[string][]netip.Addr

// add adds the container with the id, and reports whether it is new.
func (m missing) add(id string) bool {
	if _, is := m[id]; is {
		return false
	}
	m[id] = nil
	return true
}

// listed stores a container's addresses in the Engine's list.
func (m missing) listed(sum *container.Summary) {
	if _, is := m[sum.ID]; !is {
		return
	}
	m[sum.ID] = nil
	if listedRunning(sum) == 0 || sum.NetworkSettings == nil {
		return
	}
	for _, n := range sum.NetworkSettings.Networks {
		if n == nil {
			continue
		}
		if addr, err := netip.ParseAddr(n.IPAddress); err == nil && addr.Is4() {
			m[sum.ID] = append(m[sum.ID], addr)
		}
	}
}

// ended stores that the container no longer runs: another one may have its addresses.
func (m missing) ended(id string) {
	if _, is := m[id]; is {
		m[id] = nil
	}
}

// addrs returns the addresses of all, in order, each once.
func (m missing) addrs() (all []netip.Addr) {
	for _, addrs := range m {
		all = append(all, addrs...)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}
