package lookup

import (
	"net/netip"

	"go.uber.org/zap"
)

// settle decides who of those that claim an address has it in next, and tells each new dispute. A container with
// NET_ADMIN can give itself any address, but not the port of the container that has it.
func (t *Table) settle(disputed map[netip.Addr][]entry, next *snapshot) {
	now := make(map[netip.Addr]bool, len(disputed))
	for addr, claims := range disputed {
		now[addr] = true
		holder, ok := t.holder(addr, claims)
		if ok {
			next.byAddr[addr] = holder
		} else {
			delete(next.byAddr, addr)
		}
		if t.dispute[addr] {
			continue
		}
		t.conflicts.Add(1)
		for _, c := range claims {
			if c != holder {
				t.log.Warn("address claimed twice", zap.Stringer("addr", addr), zap.Bool("keptByHolder", ok),
					zap.String("claimedBy", c.view.Task.ARN), zap.Int("ifindex", c.ep.Ifindex))
			}
		}
	}
	t.dispute = now
}

// holder returns the claim of the task that the kernel's map has at addr, behind the same port.
func (t *Table) holder(addr netip.Addr, claims []entry) (entry, bool) {
	w, ok := t.written[addr]
	for _, c := range claims {
		if ok && c.view.Tag == w.Tag && uint32(c.ep.Ifindex) == w.Ifindex {
			return c, true
		}
	}
	return entry{}, false
}
