package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// Where our clsact filters are. Low enough a priority number to come before most, fixed so that a
// start finds and replaces what a killed process left.
const (
	filterPriority = 0xec5
	filterHandle   = 0xec5
)

// filterNames are our programs' names, by which a filter is known to be ours.
var filterNames = map[string]bool{
	bpf.MetadProgMetadPort: true, bpf.MetadProgMetadBridge: true, bpf.MetadProgMetadReply: true,
	bpf.MetadProgMetadCarry: true, bpf.MetadProgMetadHost: true,
}

// attachTCX puts p first on the device's hook. The link goes with its file descriptor.
func attachTCX(ns netns.NsHandle, ifindex int, p *ebpf.Program, at ebpf.AttachType) (l link.Link, err error) {
	err = inNS(ns, func() error {
		l, err = link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: at, Anchor: link.Head()})
		return err
	})
	return l, err
}

// attachClsact puts p on the device's hook, in the place of what an earlier process left there.
// The qdisc is made if there is none, and never removed: others may be using it by then.
func attachClsact(h *netlink.Handle, ifindex int, p *ebpf.Program, name string, parent uint32) error {
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
		return fmt.Errorf("priority %#x, handle %#x: %w", filterPriority, filterHandle, ErrForeignFilter)
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

// detachClsact removes our filter and nothing else. A device or filter that is gone is no error.
func detachClsact(h *netlink.Handle, ifindex int, parent uint32) error {
	f, err := filterInOurPlace(h, ifindex, parent)
	if err != nil || f == nil || !ours(f) {
		return err
	}
	if err := h.FilterDel(f); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove filter from ifindex %d: %w", ifindex, err)
	}
	return nil
}

func filterInOurPlace(h *netlink.Handle, ifindex int, parent uint32) (netlink.Filter, error) {
	fs, err := whole(func() ([]netlink.Filter, error) {
		return h.FilterList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}, parent)
	})
	if err != nil {
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
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
