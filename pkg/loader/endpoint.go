package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Endpoint is the address containers ask, of which metad's namespace has the only one it answers on.
var Endpoint = netip.MustParseAddrPort("169.254.170.2:80")

// HostAddr is metad0's address, from which the host's own processes ask. It belongs to no task.
var HostAddr = netip.MustParseAddr("169.254.170.1")

// Names of the veth pair between the host and metad's namespace.
const (
	hostVeth   = "metad0"
	serverVeth = "metad1"
)

// addrGenNone is IN6_ADDR_GEN_MODE_NONE (include/uapi/linux/if_link.h).
const addrGenNone = 1

// inNS runs f on a thread that is in ns. The thread is never given back: it ends with the goroutine,
// so no other code can find itself in the wrong namespace.
func inNS(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// netnsID returns the number by which ns is known in the handle's namespace; it goes with ns.
func netnsID(h *netlink.Handle, ns netns.NsHandle) (int, error) {
	id, err := h.GetNetNsIdByFd(int(ns))
	if err == nil && id < 0 { // none yet: any
		if err = h.SetNetNsIdByFd(int(ns), -1); err == nil {
			id, err = h.GetNetNsIdByFd(int(ns))
		}
	}
	if err != nil {
		return 0, fmt.Errorf("id of metad's namespace: %w", err)
	}
	return id, nil
}

// newServerNS makes the namespace that the listener lives in, without a name: it goes with the last
// file descriptor and socket.
func newServerNS() (ns netns.NsHandle, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // as in inNS
		if ns, err = netns.New(); err != nil {
			err = fmt.Errorf("make network namespace: %w", err)
			return
		}
		if err = serverSysctls(); err != nil {
			ns.Close()
		}
	}()
	<-done
	return ns, err
}

// serverSysctls sets up the calling thread's namespace. A missing file is an error only where
// nothing works without it.
func serverSysctls() error {
	for _, s := range []struct {
		path, value string
		must        bool
	}{
		// The accepted socket's mark is the SYN's, and so is the mark of all it sends.
		{"ipv4/tcp_fwmark_accept", "1", true},
		// What has no socket (a reset) is marked like what it answers.
		{"ipv4/fwmark_reflect", "1", true},
		// An orphan must not keep the namespace, and with it metad0, for long.
		{"ipv4/tcp_orphan_retries", "1", true},
		{"ipv4/ip_unprivileged_port_start", "80", false},
		// Sources are any container's; no route leads back to them but the default.
		{"ipv4/conf/all/rp_filter", "0", true},
		{"ipv4/conf/default/rp_filter", "0", true},
		{"ipv4/tcp_syncookies", "1", false},
		{"ipv4/tcp_max_syn_backlog", "4096", false},
		{"core/somaxconn", "4096", false},
		{"ipv6/conf/all/disable_ipv6", "1", false},
		{"ipv6/conf/default/disable_ipv6", "1", false},
	} {
		err := os.WriteFile("/proc/sys/net/"+s.path, []byte(s.value), 0)
		if err != nil && (s.must || !errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("sysctl in metad's namespace: %w", err)
		}
	}
	return nil
}

// makeVeth connects host with server and returns the ifindexes of metad0 and metad1.
func makeVeth(host *netlink.Handle, server netns.NsHandle) (host0, server1 int, err error) {
	if err := removeVeth(host); err != nil {
		return 0, 0, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = hostVeth
	v := &netlink.Veth{LinkAttrs: attrs, PeerName: serverVeth, PeerNamespace: netlink.NsFd(int(server))}
	if err := host.LinkAdd(v); err != nil {
		return 0, 0, fmt.Errorf("make %s: %w", hostVeth, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeVeth(host))
		}
	}()
	l0, err := host.LinkByName(hostVeth)
	if err != nil {
		return 0, 0, fmt.Errorf("find %s: %w", hostVeth, err)
	}
	// IPv6 has no business there; best effort, the kernel may be without.
	_ = host.LinkSetIP6AddrGenMode(l0, addrGenNone)
	if err := host.LinkSetUp(l0); err != nil {
		return 0, 0, fmt.Errorf("set %s up: %w", hostVeth, err)
	}
	h, err := netlink.NewHandleAt(server, unix.NETLINK_ROUTE)
	if err != nil {
		return 0, 0, fmt.Errorf("netlink in metad's namespace: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("set lo up: %w", err)
	}
	l1, err := h.LinkByName(serverVeth)
	if err != nil {
		return 0, 0, fmt.Errorf("find %s: %w", serverVeth, err)
	}
	addr := &netlink.Addr{IPNet: single(Endpoint.Addr())}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		// No neighbour is ever asked for: metad_reply writes the MAC.
		{"set arp off", func() error { return h.LinkSetARPOff(l1) }},
		{"add address", func() error { return h.AddrAdd(l1, addr) }},
		{"set up", func() error { return h.LinkSetUp(l1) }},
		{"add route", func() error {
			return h.RouteAdd(&netlink.Route{
				LinkIndex: l1.Attrs().Index,
				Scope:     netlink.SCOPE_LINK,
				Dst:       &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)},
			})
		}},
	} {
		if err := step.do(); err != nil {
			return 0, 0, fmt.Errorf("%s: %s: %w", serverVeth, step.what, err)
		}
	}
	return l0.Attrs().Index, l1.Attrs().Index, nil
}

// removeVeth deletes metad0, and with it metad1, if there is one.
func removeVeth(host *netlink.Handle) error {
	l, err := host.LinkByName(hostVeth)
	if err != nil {
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil
		}
		return fmt.Errorf("find %s: %w", hostVeth, err)
	}
	if l.Type() != "veth" {
		return fmt.Errorf("%s is a %s, not ours", hostVeth, l.Type())
	}
	if err := host.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete %s: %w", hostVeth, err)
	}
	return nil
}

// addHostRoute leads the host's own processes to the endpoint. Whoever has a route or a rule for it keeps it:
// the agent's OUTPUT rule readdresses a packet before any route is looked at again.
func addHostRoute(host *netlink.Handle, metad0 int, server netns.NsHandle, metad1 int) error {
	h, err := netlink.NewHandleAt(server, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in metad's namespace: %w", err)
	}
	defer h.Close()
	l1, err := h.LinkByIndex(metad1)
	if err != nil {
		return fmt.Errorf("find %s: %w", serverVeth, err)
	}
	l0, err := host.LinkByIndex(metad0)
	if err != nil {
		return fmt.Errorf("find %s: %w", hostVeth, err)
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"address", func() error { return host.AddrReplace(l0, hostAddr()) }},
		// metad1 answers no ARP.
		{"neighbour", func() error {
			return host.NeighSet(&netlink.Neigh{
				LinkIndex: metad0, IP: Endpoint.Addr().AsSlice(), HardwareAddr: l1.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT,
			})
		}},
		{"route", func() error {
			err := host.RouteAdd(hostRoute(metad0))
			if errors.Is(err, unix.EEXIST) { // ours, of before a takeover, or somebody's
				return nil
			}
			return err
		}},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: add %s: %w", hostVeth, step.what, err)
		}
	}
	return nil
}

// removeHostRoute undoes addHostRoute. What is gone already is no error.
func removeHostRoute(host *netlink.Handle, metad0 int) error {
	for _, err := range []error{
		host.RouteDel(hostRoute(metad0)),
		host.AddrDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: metad0}}, hostAddr()),
	} {
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove the host's route from %s: %w", hostVeth, err)
		}
	}
	return nil
}

func hostRoute(metad0 int) *netlink.Route {
	return &netlink.Route{LinkIndex: metad0, Scope: netlink.SCOPE_LINK, Dst: single(Endpoint.Addr()), Src: HostAddr.AsSlice()}
}

// hostAddr has a link's scope: the host does not use it to speak to others.
func hostAddr() *netlink.Addr {
	return &netlink.Addr{IPNet: single(HostAddr), Scope: int(netlink.SCOPE_LINK)}
}

// single is the network that has addr alone.
func single(addr netip.Addr) *net.IPNet {
	return &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
}
