package lookup

import (
	"net/netip"
	"slices"

	"go.uber.org/zap"
)

// settle gives each address that c mentions to its owner.
func (t *Table) settle(c *change) {
	for addr := range c.addrs {
		e, ok := t.owner(c, addr)
		had, has := c.next.byAddr(addr)
		switch {
		case !ok:
			c.next.addrs.delete(addrPart(addr), addr)
		case !has || had != e:
			c.next.addrs.set(addrPart(addr), addr, e)
		}
	}
}

// owner returns the claim that gets the address. If claims differ, it is the one that already has
// the address, or none, and each new dispute is logged. A container with NET_ADMIN can give itself
// any address, but not the port of the container that has it.
func (t *Table) owner(c *change, addr netip.Addr) (entry, bool) {
	var all []entry
	for _, k := range t.claims.addrs[addr] {
		if e := (entry{k.ep, c.next.byTag(k.tag)}); !t.gone[k.ep.Ifindex] &&
			!slices.Contains(all, e) {
			all = append(all, e)
		}
	}
	if len(all) < 2 {
		delete(t.dispute, addr)
		return append(all, entry{})[0], len(all) == 1
	}
	holder, ok := t.holder(addr, all)
	if !t.dispute[addr] {
		t.dispute[addr] = true
		t.conflicts.Add(1)
		for _, e := range all {
			if e != holder {
				t.log.Warn("address claimed twice", zap.Stringer("addr", addr),
					zap.Bool("keptByHolder", ok),
					zap.String("claimedBy", e.view.Task.ARN),
					zap.Int("ifindex", e.ep.Ifindex))
			}
		}
	}
	return holder, ok
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
