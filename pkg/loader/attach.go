package loader

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"metad/bpf"
	"metad/pkg/netdump"
)

// The place of metad's clsact filters. The priority's number is low, so that the filter comes
// before most others. It is fixed, so that a start finds and replaces the filter of a killed
// process.
const (
	filterPriority = 0xec5
	filterHandle   = 0xec5
)

// filterNames are the names of metad's programs, by which metad recognises its filters.
var filterNames = map[string]bool{
	bpf.MetadProgMetadPort: true, bpf.MetadProgMetadBridge: true, bpf.MetadProgMetadReply: true,
	bpf.MetadProgMetadEnter: true, bpf.MetadProgMetadCarry: true, bpf.MetadProgMetadHost: true,
}

// maxLinks is the number of devices that get a TCX link with AttachAuto; the others get filters.
// The kernel waits for a grace period (16 ms at 250 ticks a second) to attach a link and another to
// detach it, for one link after the other. A killed process ends only after all its links are
// detached. A filter is added in half a millisecond, and removed in a tenth of one.
const maxLinks = 64

// tcAttacher attaches by tc: with TCX links or clsact filters.
type tcAttacher struct {
	mode  AttachMode // attachPair replaces AttachAuto
	mixed bool       // with AttachTCX: filters once there are maxLinks links
	host  netns.NsHandle
	nl    *netlink.Handle // in host
	fds   *lowFDs
	progs *bpf.Programs
}

// programFor returns the program of a bridge or a port, its name, and the end of the reserved
// descriptors from which its link gets one. The kernel releases bridge devices before their ports:
// the bridge's program must not take a packet that the port's program let pass.
func (a *tcAttacher) programFor(bridge bool) (*ebpf.Program, string, where) {
	if bridge {
		return a.progs.MetadBridge, bpf.MetadProgMetadBridge, highest
	}
	return a.progs.MetadPort, bpf.MetadProgMetadPort, lowest
}

// attach implements attacher.
func (a *tcAttacher) attach(ifindex int, bridge bool) (io.Closer, error) {
	switch {
	case a.mode == AttachClsact:
		return a.attachFilter(ifindex, bridge)
	case !a.mixed || a.fds.links() < maxLinks:
		return a.attachLink(ifindex, bridge)
	}
	on, err := a.attachFilter(ifindex, bridge)
	if err == nil || isGone(err) {
		return on, err
	}
	// Another program's filter has metad's place, or the kernel has no clsact. A link works
	// too, and is only slower to attach.
	return a.attachLink(ifindex, bridge)
}

func (a *tcAttacher) attachFilter(ifindex int, bridge bool) (io.Closer, error) {
	p, name, _ := a.programFor(bridge)
	if err := attachClsact(a.nl, ifindex, p, name, netlink.HANDLE_MIN_INGRESS); err != nil {
		return nil, err
	}
	return &clsactFilter{a.nl, ifindex}, nil
}

func (a *tcAttacher) attachLink(ifindex int, bridge bool) (io.Closer, error) {
	p, _, w := a.programFor(bridge)
	k, err := attachTCX(a.host, ifindex, p, ebpf.AttachTCXIngress)
	if err != nil {
		return nil, err
	}
	low, err := a.fds.place(k, w)
	if err != nil {
		return nil, err
	}
	// A killed process may have left a filter, which does nothing and would stay.
	if err := detachClsact(a.nl, ifindex, netlink.HANDLE_MIN_INGRESS); err != nil &&
		!errors.Is(err, unix.EOPNOTSUPP) {
		return nil, errors.Join(err, low.Close())
	}
	return low, nil
}

// clsactFilter is one of our filters on a device's ingress hook.
type clsactFilter struct {
	nl      *netlink.Handle
	ifindex int
}

// Close removes the filter.
func (f *clsactFilter) Close() error {
	return detachClsact(f.nl, f.ifindex, netlink.HANDLE_MIN_INGRESS)
}

// pairHook is the place of one of metad's programs on metad's own devices.
type pairHook struct {
	ns      netns.NsHandle
	ifindex int
	prog    *ebpf.Program
	name    string
	at      ebpf.AttachType
	parent  uint32
}

func (a *tcAttacher) pairHooks(e *endpoint) []pairHook {
	return []pairHook{
		{e.server, e.metad1, a.progs.MetadCarry, bpf.MetadProgMetadCarry,
			ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS},
		{e.server, e.metad1, a.progs.MetadEnter, bpf.MetadProgMetadEnter,
			ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS},
		{a.host, e.metad0, a.progs.MetadReply, bpf.MetadProgMetadReply,
			ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS},
		{a.host, e.metad0, a.progs.MetadHost, bpf.MetadProgMetadHost, ebpf.AttachTCXEgress,
			netlink.HANDLE_MIN_EGRESS},
	}
}

// attachPair attaches to metad's own devices. Its first success decides how to attach to all other
// devices. With an error it also returns the links that it has made. Filters end with the devices.
func (a *tcAttacher) attachPair(e *endpoint) (links []*fdLink, err error) {
	for _, d := range a.pairHooks(e) {
		if a.mode != AttachClsact {
			k, err := attachTCX(d.ns, d.ifindex, d.prog, d.at)
			switch {
			case err == nil:
				a.mode = AttachTCX
				low, err := a.fds.place(k, lowest)
				if err != nil {
					return links, err
				}
				links = append(links, low)
				continue
			case a.mode == AttachAuto && errors.Is(err, link.ErrNotSupported):
				a.mode = AttachClsact
			default:
				return links, fmt.Errorf("attach %s: %w", d.name, err)
			}
		}
		h, err := netlink.NewHandleAt(d.ns, unix.NETLINK_ROUTE)
		if err != nil {
			return links, fmt.Errorf("netlink: %w", err)
		}
		err = attachClsact(h, d.ifindex, d.prog, d.name, d.parent)
		h.Close()
		if err != nil {
			return links, fmt.Errorf("attach %s: %w", d.name, err)
		}
	}
	return links, nil
}

// attachTCX puts p first on the device's hook. The link ends with its last file descriptor.
func attachTCX(ns netns.NsHandle, ifindex int, p *ebpf.Program, at ebpf.AttachType) (l link.Link,
	err error) {
	err = inNS(ns, func() error {
		l, err = link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: at,
			Anchor: link.Head()})
		return err
	})
	return l, err
}

// attachClsact puts p on the device's hook, and replaces the filter of an earlier process. It
// makes the qdisc if there is none. metad never removes the qdisc, because other programs may use
// it.
func attachClsact(h *netlink.Handle, ifindex int, p *ebpf.Program, name string,
	parent uint32) error {
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}}
	if err := h.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact: %w", err)
	}
	had, err := filterInOurPlace(h, ifindex, parent)
	if err != nil {
		return err
	}
	if had != nil && !ours(had) {
		return fmt.Errorf("priority %#x, handle %#x: %w", filterPriority, filterHandle,
			ErrForeignFilter)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex,
			Parent:    parent,
			Handle:    filterHandle,
			Priority:  filterPriority,
			Protocol:  unix.ETH_P_ALL,
		},
		Fd:           p.FD(),
		Name:         name,
		DirectAction: true,
	}
	if err := h.FilterReplace(f); err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	return nil
}

// detachClsact removes only metad's filter. It is no error if the device or the filter is gone.
func detachClsact(h *netlink.Handle, ifindex int, parent uint32) error {
	f, err := filterInOurPlace(h, ifindex, parent)
	if err != nil || f == nil || !ours(f) {
		return err
	}
	if err := h.FilterDel(f); err != nil && !errors.Is(err, unix.ENODEV) &&
		!errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove filter from ifindex %d: %w", ifindex, err)
	}
	return nil
}

func filterInOurPlace(h *netlink.Handle, ifindex int, parent uint32) (netlink.Filter, error) {
	fs, err := netdump.Whole(func() ([]netlink.Filter, error) {
		return h.FilterList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}},
			parent)
	})
	if err != nil {
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) ||
			errors.Is(err, unix.ENOENT) {
			return nil, nil // no device, or no clsact on it
		}
		return nil, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range fs {
		if a := f.Attrs(); a.Priority == filterPriority && a.Handle == filterHandle {
			return f, nil
		}
	}
	return nil, nil
}

func ours(f netlink.Filter) bool {
	b, ok := f.(*netlink.BpfFilter)
	return ok && filterNames[b.Name]
}
