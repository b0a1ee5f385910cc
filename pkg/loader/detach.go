package loader

import (
	"errors"
	"fmt"
	"os"

	"metad/pkg/netdump"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Detach removes metad's filters, links, metad0 and pins from the host's namespace and PinDir,
// whether metad exited cleanly, was killed, or still runs. It removes nothing of other programs.
// Calling it again does nothing.
func Detach(cfg Config) (err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return fmt.Errorf("loader config: %w", err)
	}
	if err := checkHost(); err != nil {
		return err
	}
	ns, err := hostNS(cfg.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	all, err := netdump.Whole(h.LinkList)
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, d := range all {
		errs = append(errs, detachClsact(h, d.Attrs().Index, netlink.HANDLE_MIN_INGRESS))
	}
	errs = append(errs, inNS(ns, func() error {
		var errs []error
		for _, d := range all {
			errs = append(errs, detachTCX(d.Attrs().Index))
		}
		return errors.Join(errs...)
	}))
	errs = append(errs, removeVeth(h), removePins(cfg.PinDir))
	return errors.Join(errs...)
}

// detachTCX takes our programs off the ingress hook of a device in the thread's namespace, also
// those whose links another process holds.
func detachTCX(ifindex int) error {
	q, err := link.QueryPrograms(link.QueryOptions{Target: ifindex,
		Attach: ebpf.AttachTCXIngress})
	if err != nil {
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) ||
			errors.Is(err, unix.ENODEV) ||
			errors.Is(err, os.ErrNotExist) {
			return nil // no TCX, nothing there, or the device is gone
		}
		return fmt.Errorf("query programs of ifindex %d: %w", ifindex, err)
	}
	var errs []error
	for _, a := range q.Programs {
		id, ok := a.LinkID()
		if !ok || !isOurs(a.ID) {
			continue
		}
		k, err := link.NewFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = errors.Join(k.Detach(), k.Close())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("detach from ifindex %d: %w", ifindex, err))
		}
	}
	return errors.Join(errs...)
}

func isOurs(id ebpf.ProgramID) bool {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return false
	}
	defer p.Close()
	info, err := p.Info()
	return err == nil && filterNames[info.Name]
}
