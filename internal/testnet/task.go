package testnet

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Task is a namespace with one end of a veth, eth0, whose other end is a port of the bridge.
type Task struct {
	NS      netns.NsHandle
	Addr    netip.Addr
	MAC     [6]byte // of eth0
	Ifindex int     // of the port, in the host
	Port    string  // its name
	Bridge  *Bridge

	t  testing.TB
	nl *netlink.Handle // in NS
}

// AddTask adds a task with the address; "" is the next one after the bridge's.
func (b *Bridge) AddTask(addr string) *Task {
	t := b.Host.t
	t.Helper()
	n := b.Host.next.Add(1)
	a := b.Gateway.Addr()
	if addr != "" {
		a = netip.MustParseAddr(addr)
	} else {
		for range n {
			a = a.Next()
		}
	}
	ns := NewNS(t)
	task := &Task{NS: ns, Addr: a, Port: fmt.Sprintf("veth%d", n), Bridge: b, t: t,
		nl: handle(t, ns)}
	task.addVeth(nil)
	return task
}

// ReplaceVeth gives the task a new veth pair with the same address and MAC, as a restarted pause
// container has.
func (k *Task) ReplaceVeth() {
	k.t.Helper()
	if err := k.Bridge.Host.NL.LinkDel(k.Bridge.Host.Link(k.Port)); err != nil {
		k.t.Fatalf("delete %s: %v", k.Port, err)
	}
	k.addVeth(k.MAC[:])
}

// Netstat returns one of the TCP counters of the task's namespace, by its name in
// /proc/net/netstat.
func (k *Task) Netstat(name string) (value int) {
	k.t.Helper()
	err := In(k.NS, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		for i := 0; i+1 < len(lines); i += 2 {
			names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
			if n := slices.Index(names, name); n >= 0 && n < len(values) {
				value, err = strconv.Atoi(values[n])
				return err
			}
		}
		return fmt.Errorf("no %s", name)
	})
	if err != nil {
		k.t.Fatalf("netstat: %v", err)
	}
	return value
}

// SetGateway makes b the task's gateway, with b's MAC.
func (k *Task) SetGateway(b *Bridge) {
	k.t.Helper()
	k.Bridge = b
	eth0, err := k.nl.LinkByName("eth0")
	if err == nil {
		err = k.nl.NeighSet(k.gateway(eth0))
	}
	if err != nil {
		k.t.Fatalf("set gateway of %s: %v", k, err)
	}
}

// gateway is a neighbour entry for the bridge's address, so that no frame waits for ARP.
func (k *Task) gateway(eth0 netlink.Link) *netlink.Neigh {
	return &netlink.Neigh{
		LinkIndex:    eth0.Attrs().Index,
		IP:           k.Bridge.Gateway.Addr().AsSlice(),
		HardwareAddr: k.Bridge.MAC[:],
		State:        netlink.NUD_PERMANENT,
	}
}

// Remove deletes the task's veth.
func (k *Task) Remove() {
	k.t.Helper()
	if err := k.Bridge.Host.NL.LinkDel(k.Bridge.Host.Link(k.Port)); err != nil {
		k.t.Fatalf("delete %s: %v", k.Port, err)
	}
}

func (k *Task) addVeth(mac net.HardwareAddr) {
	k.t.Helper()
	b, nl := k.Bridge, k.Bridge.Host.NL
	attrs := netlink.NewLinkAttrs()
	attrs.Name = k.Port
	v := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0",
		PeerNamespace: netlink.NsFd(int(k.NS)), PeerHardwareAddr: mac}
	if err := nl.LinkAdd(v); err != nil {
		k.t.Fatalf("add %s: %v", k.Port, err)
	}
	port := b.Host.Link(k.Port)
	k.Ifindex = port.Attrs().Index
	br := b.Host.Link(b.Name)
	eth0, err := k.nl.LinkByName("eth0")
	if err != nil {
		k.t.Fatalf("eth0: %v", err)
	}
	copy(k.MAC[:], eth0.Attrs().HardwareAddr)
	for _, err := range []error{
		nl.LinkSetMaster(port, br),
		nl.LinkSetUp(port),
		k.nl.LinkSetUp(eth0),
		k.nl.NeighSet(k.gateway(eth0)),
	} {
		if err != nil {
			k.t.Fatalf("set up task %s: %v", k.Addr, err)
		}
	}
	k.TakeAddr(k.Addr)
	// Until the kernel has noticed the carrier at both ends, the sender's queue and the bridge
	// drop what is sent: a client would lose its first SYN.
	Until(k.t, "the task's link is up", func() bool {
		inside, err := k.nl.LinkByName("eth0")
		outside, err2 := nl.LinkByIndex(k.Ifindex)
		return err == nil && err2 == nil && inside.Attrs().OperState == netlink.OperUp &&
			outside.Attrs().OperState == netlink.OperUp
	})
}

// Blackhole drops what the kernel of the task's namespace sends to the address of an endpoint. Raw
// frames still go out.
func (k *Task) Blackhole(endpoint string) error {
	a := netip.MustParseAddrPort(endpoint).Addr()
	h, err := netlink.NewHandleAt(k.NS, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	dst := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}
	return h.RouteReplace(&netlink.Route{Dst: dst, Type: unix.RTN_BLACKHOLE})
}

// TakeAddr gives eth0 an address, and the route that goes with it.
func (k *Task) TakeAddr(addr netip.Addr) {
	k.t.Helper()
	eth0, err := k.nl.LinkByName("eth0")
	if err == nil {
		err = k.nl.AddrAdd(eth0, k.ipNet(addr))
	}
	if err == nil {
		err = k.nl.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index,
			Gw: k.Bridge.Gateway.Addr().AsSlice()})
	}
	if err != nil {
		k.t.Fatalf("give %s to %s: %v", addr, k, err)
	}
	k.Addr = addr
}

// DropAddr takes the address from eth0, and with it the route.
func (k *Task) DropAddr() {
	k.t.Helper()
	eth0, err := k.nl.LinkByName("eth0")
	if err == nil {
		err = k.nl.AddrDel(eth0, k.ipNet(k.Addr))
	}
	if err != nil {
		k.t.Fatalf("take the address from %s: %v", k, err)
	}
}

func (k *Task) ipNet(addr netip.Addr) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(),
		Mask: net.CIDRMask(k.Bridge.Gateway.Bits(), 32)}}
}

// String is for messages.
func (k *Task) String() string {
	return k.Addr.String() + " on " + k.Port + "(" + strconv.Itoa(k.Ifindex) + ")"
}

// Dial connects the task to the endpoint.
func (k *Task) Dial(timeout time.Duration) (net.Conn, error) {
	return Dial(k.NS, "", Endpoint, timeout)
}

// Get asks the endpoint on a connection of its own, as the task, and returns status and body.
func (k *Task) Get(path string, timeout time.Duration) (int, string, error) {
	c, err := k.Dial(timeout)
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	return GetOn(c, path, timeout)
}
