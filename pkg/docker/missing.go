package docker

import (
	"net/netip"
	"slices"

	"github.com/docker/docker/api/types/container"
)

// missing is the containers that the Engine has not answered for, not once, by id, and the
// addresses that it lists of them.
type missing map[string][]netip.Addr

// add notes that nothing is known of the container with the id, and reports whether that is new.
func (m missing) add(id string) bool {
	if _, is := m[id]; is {
		return false
	}
	m[id] = nil
	return true
}

// listed takes in what the Engine lists of a container.
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

// ended takes note that the container does not run any more: its addresses may be another's.
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
