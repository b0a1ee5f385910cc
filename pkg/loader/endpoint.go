package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Endpoint is the address of the endpoint. It exists only in metad's own namespace.
var Endpoint = netip.MustParseAddrPort("169.254.170.2:80")

// HostAddr is metad0's address, the source address of the host's own processes. It belongs to no
// task.
var HostAddr = netip.MustParseAddr("169.254.170.1")

// Names of the veth pair between the host and metad's namespace.
const (
	hostVeth   = "metad0"
	serverVeth = "metad1"
)

// addrGenNone is IN6_ADDR_GEN_MODE_NONE (include/uapi/linux/if_link.h).
const addrGenNone = 1

// inNS runs f on a thread that is in ns. The thread ends with the goroutine, so that no other code
// can find itself in the wrong namespace.
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

// newServerNS makes the namespace of the listener. It has no name, so it ends with its last file
// descriptor and socket.
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

// serverSysctls sets up the calling thread's namespace. A missing file is an error only if metad
// cannot work without it.
func serverSysctls() error {
	for _, s := range []struct {
		path, value string
		must        bool
	}{
		// The accepted socket's mark is the SYN's, and so is the mark of all it sends.
		{"ipv4/tcp_fwmark_accept", "1", true},
		// What has no socket (a reset) is marked like what it answers.
		{"ipv4/fwmark_reflect", "1", true},
		// A socket that the server has closed must not keep the namespace, and with it
		// metad0, for long: neither with data that its client does not acknowledge nor
		// waiting for the client's FIN. A client that acknowledges and reads nothing is
		// userTimeout's.
		{"ipv4/tcp_orphan_retries", "1", true},
		{"ipv4/tcp_fin_timeout", "5", false},
		// A client is on this host. If it does not get the SYN-ACK after two repetitions,
		// it is gone, and the half-open connection can end after 7 s instead of a minute.
		{"ipv4/tcp_synack_retries", "2", false},
		// No data before the handshake: the handshake proves where answers go.
		{"ipv4/tcp_fastopen", "0", false},
		// The kernel buffers this much for a client that reads nothing: more than a
		// document, but not megabytes.
		{"ipv4/tcp_wmem", "4096 16384 131072", false},
		// Requests are small; a request's body on its way to the agent is read as fast as
		// the agent takes it.
		{"ipv4/tcp_rmem", "4096 65536 262144", false},
		{"ipv4/ip_unprivileged_port_start", "80", false},
		// Any container's address can be a source; only the default route leads back to it.
		{"ipv4/conf/all/rp_filter", "0", true},
		{"ipv4/conf/default/rp_filter", "0", true},
		// A flood of SYNs ends in cookies, which keep the mark, and not in refused clients.
		// A burst of a thousand tasks that start at once is no flood.
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

// endpoint is metad's own namespace, the veth pair that leads there, the host's route and the
// listener.
type endpoint struct {
	host   *netlink.Handle // in the host's namespace
	server netns.NsHandle  // metad's own
	metad0 int             // ifindexes: the host's end of the pair,
	metad1 int             // and metad's

	listener net.Listener // the caller's; for a takeover
}

// newEndpoint makes the namespace and the pair. It replaces those of an earlier process.
func newEndpoint(host *netlink.Handle) (_ *endpoint, err error) {
	e := &endpoint{host: host, server: netns.None()}
	if e.server, err = newServerNS(); err != nil {
		return nil, err
	}
	if err := e.makeVeth(); err != nil {
		return nil, errors.Join(err, e.server.Close())
	}
	return e, nil
}

// close deletes the pair, and the namespace with it unless sockets keep it.
func (e *endpoint) close() error { return errors.Join(removeVeth(e.host), e.letGo()) }

// letGo closes the descriptors, and leaves the devices to the process that has taken over.
func (e *endpoint) letGo() error {
	if !e.server.IsOpen() {
		return nil
	}
	return e.server.Close()
}

// netnsID returns the host's id for metad's namespace. The id ends with that namespace.
func (e *endpoint) netnsID() (int, error) {
	id, err := e.host.GetNetNsIdByFd(int(e.server))
	if err == nil && id < 0 { // none yet: any
		if err = e.host.SetNetNsIdByFd(int(e.server), -1); err == nil {
			id, err = e.host.GetNetNsIdByFd(int(e.server))
		}
	}
	if err != nil {
		return 0, fmt.Errorf("id of metad's namespace: %w", err)
	}
	return id, nil
}

// userTimeout is how long the kernel keeps data that a client does not read, also after the server
// has closed the connection. Without it the kernel probes a client that acknowledges and never
// reads for minutes. It is longer than the server's own write timeout.
const userTimeout = 6 * time.Second

// listen makes the listener. Accepted sockets have its options.
func (e *endpoint) listen() error {
	err := inNS(e.server, func() (err error) {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP,
					unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
			})
			return errors.Join(cerr, err)
		}}
		lc.SetMultipathTCP(false)
		e.listener, err = lc.Listen(context.Background(), "tcp4", Endpoint.String())
		return err
	})
	if err != nil {
		return fmt.Errorf("listen in metad's namespace: %w", err)
	}
	return nil
}

// makeVeth connects the host with the server.
func (e *endpoint) makeVeth() (err error) {
	if err := removeVeth(e.host); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = hostVeth
	attrs.Index = e.metad0 // the programs know it: a pair that is made anew has the old one
	v := &netlink.Veth{LinkAttrs: attrs, PeerName: serverVeth,
		PeerNamespace: netlink.NsFd(int(e.server))}
	if err := e.host.LinkAdd(v); err != nil {
		return fmt.Errorf("make %s: %w", hostVeth, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeVeth(e.host))
		}
	}()
	l0, err := e.host.LinkByName(hostVeth)
	if err != nil {
		return fmt.Errorf("find %s: %w", hostVeth, err)
	}
	e.metad0 = l0.Attrs().Index
	// The pair needs no IPv6. An error is ignored, because the kernel may have none.
	_ = e.host.LinkSetIP6AddrGenMode(l0, addrGenNone)
	if err := e.host.LinkSetUp(l0); err != nil {
		return fmt.Errorf("set %s up: %w", hostVeth, err)
	}
	return e.setUpServer()
}

// state returns nil if the pair is there and up at both ends.
func (e *endpoint) state() error {
	l, err := e.host.LinkByIndex(e.metad0)
	if err != nil {
		return fmt.Errorf("find %s: %w", hostVeth, err)
	}
	flags := l.Attrs().RawFlags
	switch {
	case flags&unix.IFF_UP == 0:
		return fmt.Errorf("%s is down", hostVeth)
	case flags&unix.IFF_LOWER_UP == 0:
		return fmt.Errorf("%s has no carrier: %s is down", hostVeth, serverVeth)
	}
	return nil
}

// setUpServer gives metad's end its address and the way back.
func (e *endpoint) setUpServer() error {
	h, err := netlink.NewHandleAt(e.server, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in metad's namespace: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	l1, err := h.LinkByName(serverVeth)
	if err != nil {
		return fmt.Errorf("find %s: %w", serverVeth, err)
	}
	e.metad1 = l1.Attrs().Index
	for _, step := range []struct {
		what string
		do   func() error
	}{
		// No ARP is needed: metad_reply writes the MAC.
		{"set arp off", func() error { return h.LinkSetARPOff(l1) }},
		{"add address", func() error {
			return h.AddrAdd(l1, &netlink.Addr{IPNet: single(Endpoint.Addr())})
		}},
		{"set up", func() error { return h.LinkSetUp(l1) }},
		{"add route", func() error {
			return h.RouteAdd(&netlink.Route{
				LinkIndex: e.metad1,
				Scope:     netlink.SCOPE_LINK,
				Dst:       &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)},
			})
		}},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %s: %w", serverVeth, step.what, err)
		}
	}
	return nil
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

// addRoute adds the route by which the host's own processes reach the endpoint. An existing route
// or rule stays: the agent's OUTPUT rule readdresses a packet before its route is looked up again.
func (e *endpoint) addRoute() error {
	h, err := netlink.NewHandleAt(e.server, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in metad's namespace: %w", err)
	}
	defer h.Close()
	l1, err := h.LinkByIndex(e.metad1)
	if err != nil {
		return fmt.Errorf("find %s: %w", serverVeth, err)
	}
	l0, err := e.host.LinkByIndex(e.metad0)
	if err != nil {
		return fmt.Errorf("find %s: %w", hostVeth, err)
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"address", func() error { return e.host.AddrReplace(l0, hostAddr()) }},
		// metad1 answers no ARP.
		{"neighbour", func() error {
			return e.host.NeighSet(&netlink.Neigh{
				LinkIndex: e.metad0, IP: Endpoint.Addr().AsSlice(),
				HardwareAddr: l1.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT,
			})
		}},
		{"route", func() error {
			err := e.host.RouteAdd(hostRoute(e.metad0))
			// ours from before a takeover, or another program's
			if errors.Is(err, unix.EEXIST) {
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

// removeRoute undoes addRoute. It is no error if the route is gone.
func (e *endpoint) removeRoute() error {
	for _, err := range []error{
		e.host.RouteDel(hostRoute(e.metad0)),
		e.host.AddrDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: e.metad0}},
			hostAddr()),
	} {
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) &&
			!errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove the host's route from %s: %w", hostVeth, err)
		}
	}
	return nil
}

func hostRoute(metad0 int) *netlink.Route {
	return &netlink.Route{LinkIndex: metad0, Scope: netlink.SCOPE_LINK,
		Dst: single(Endpoint.Addr()), Src: HostAddr.AsSlice()}
}

// hostAddr has a link's scope: the host does not use it to speak to others.
func hostAddr() *netlink.Addr {
	return &netlink.Addr{IPNet: single(HostAddr), Scope: int(netlink.SCOPE_LINK)}
}

// single is the network that has addr alone.
func single(addr netip.Addr) *net.IPNet {
	return &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
}
