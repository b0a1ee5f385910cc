package docker

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"metad/pkg/netdump"
	"metad/pkg/task"
)

// Devices in an awsvpc task's namespace, as the agent's CNI plugins name them.
const (
	ecsDevice = "ecs-eth0" // veth to ecs-bridge
	eniDevice = "eth0"     // the task's network interface: the real one or a VLAN on it
)

// namespace is the result of reading a container's network namespace.
type namespace struct {
	endpoints []task.Endpoint // ordered by address
	ecs       bool            // ecs-eth0 is there, with an address
	eni4      []string        // addresses of the task's network interface
	eni6      []string
	details   task.NetworkDetails // of the task's network interface, DNS apart
	inode     uint64              // tells one namespace from the next

	// homes are the addresses that count, by ifindex of the port: the first one seen at each.
	// It is empty for a container to which Docker has assigned addresses.
	homes map[int]netip.Addr

	strays map[netip.Addr]bool // addresses of ports that have others for their own

	// unclaimed would be endpoints if Docker had given the container their addresses. Ordered
	// by address.
	unclaimed []task.Endpoint
}

// errNotIts means that the process is no longer the container's: it has ended and its id is
// another's.
var errNotIts = errors.New("process is not the container's")

// namespaces reads containers' network namespaces. Safe for concurrent use.
type namespaces struct {
	procRoot string         // "/proc"
	host     netns.NsHandle // of the bridges
}

func openNamespaces(procRoot, hostPath string) (*namespaces, error) {
	host, err := netns.GetFromPath(hostPath)
	if err != nil {
		return nil, fmt.Errorf("open the host's network namespace %s: %w", hostPath, err)
	}
	return &namespaces{procRoot: procRoot, host: host}, nil
}

func (n *namespaces) close() error { return n.host.Close() }

func (n *namespaces) path(pid int) string {
	return filepath.Join(n.procRoot, strconv.Itoa(pid), "ns/net")
}

// inode returns what identifies the network namespace of process pid; 0 when there is none.
func (n *namespaces) inode(pid int) uint64 {
	var st unix.Stat_t
	if unix.Stat(n.path(pid), &st) != nil {
		return 0
	}
	return st.Ino
}

// read enters the namespace of the running container c and returns its endpoints: the IPv4
// addresses of veths whose other end is in the host's namespace.
//
// If Docker has assigned addresses to the container, only those count: a container that may
// administer its network can also take its neighbour's address.
func (n *namespaces) read(c *task.Container) (*namespace, error) {
	ns, err := netns.GetFromPath(n.path(c.PID))
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	// The check comes after the opening. If the process is the container's now, it was before.
	cgroup, err := os.ReadFile(filepath.Join(n.procRoot, strconv.Itoa(c.PID), "cgroup"))
	if err != nil {
		return nil, fmt.Errorf("read cgroup: %w", err)
	}
	if !strings.Contains(string(cgroup), c.ID) {
		return nil, errNotIts
	}
	found := &namespace{}
	var st unix.Stat_t
	if err := unix.Fstat(int(ns), &st); err != nil {
		return nil, err
	}
	found.inode = st.Ino
	if ns.Equal(n.host) {
		return found, nil
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("enter network namespace: %w", err)
	}
	defer h.Close()
	// Read all lists again, because they must agree with each other.
	return netdump.Whole(func() (*namespace, error) {
		f := *found
		if err := f.fill(h, n.host, assigned(c)); err != nil {
			return nil, err
		}
		return &f, nil
	})
}

// assigned returns the IPv4 addresses that Docker has assigned to the container.
func assigned(c *task.Container) (addrs []netip.Addr) {
	for _, n := range c.DockerNetworks {
		if a, err := netip.ParseAddr(n.IPAddress); err == nil {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

func (found *namespace) fill(h *netlink.Handle, host netns.NsHandle, believed []netip.Addr) error {
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	// Listing a link whose peer is elsewhere gives that namespace its id here: ask after it.
	hostID, err := h.GetNetNsIdByFd(int(host))
	if err != nil {
		return fmt.Errorf("find the id of the host's namespace: %w", err)
	}
	// Only IPv4 unless there is a task's network interface: since Linux 6.9 that waits for
	// nobody, while a list of all waits for whoever changes a network anywhere on the host, as
	// long as half a second while containers come and go.
	addrs, err := h.AddrList(nil, netlink.FAMILY_V4)
	if err == nil && slices.ContainsFunc(links, isENI) {
		var v6 []netlink.Addr
		v6, err = h.AddrList(nil, netlink.FAMILY_V6)
		addrs = append(addrs, v6...)
	}
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, link := range links {
		attrs := link.Attrs()
		// An index is worth something only together with the namespace it is an index in.
		// No id (-1) means that the peer is in this very namespace.
		port := link.Type() == "veth" && attrs.NetNsID >= 0 && attrs.NetNsID == hostID &&
			len(attrs.HardwareAddr) == 6
		for _, a := range addrs {
			addr, ok := netip.AddrFromSlice(a.IP)
			if addr = addr.Unmap(); !ok || a.LinkIndex != attrs.Index {
				continue
			}
			switch {
			case port && addr.Is4():
				ep := task.Endpoint{Addr: addr, Ifindex: attrs.ParentIndex}
				copy(ep.MAC[:], attrs.HardwareAddr)
				if len(believed) > 0 && !slices.Contains(believed, addr) {
					found.unclaimed = append(found.unclaimed, ep)
					continue
				}
				if _, has := found.homes[ep.Ifindex]; !has && len(believed) == 0 {
					found.setHome(ep)
				}
				found.endpoints = append(found.endpoints, ep)
				found.ecs = found.ecs || attrs.Name == ecsDevice
			case isENI(link) && addr.Is4():
				found.eni4 = append(found.eni4, addr.String())
				found.describe(h, link, a.IPNet, netlink.FAMILY_V4)
			case isENI(link) && a.Scope == unix.RT_SCOPE_UNIVERSE:
				found.eni6 = append(found.eni6, addr.String())
				found.describe(h, link, a.IPNet, netlink.FAMILY_V6)
			}
		}
	}
	slices.SortFunc(found.endpoints, compareEndpoints)
	return nil
}

// describe notes the MAC, the block and the gateway of the task's network interface: of its first
// address of each family. A gateway that cannot be read is none: the addresses are what matters.
func (found *namespace) describe(h *netlink.Handle, link netlink.Link, block *net.IPNet,
	family int) {
	d := &found.details
	d.MAC = link.Attrs().HardwareAddr.String()
	subnet, gateway := &d.Subnet, &d.SubnetGateway
	if family == netlink.FAMILY_V6 {
		subnet, gateway = &d.IPv6Subnet, &d.IPv6SubnetGateway
	}
	if *subnet != "" {
		return
	}
	bits, _ := block.Mask.Size()
	*subnet = (&net.IPNet{IP: block.IP.Mask(block.Mask), Mask: block.Mask}).String()
	// the agent shows it where IPv6 is all there is
	if family == netlink.FAMILY_V6 && len(found.eni4) > 0 {
		return
	}
	routes, err := h.RouteList(link, family)
	if err != nil {
		return
	}
	for _, r := range routes {
		if r.Gw != nil && (r.Dst == nil || r.Dst.IP.IsUnspecified()) {
			*gateway = r.Gw.String() + "/" + strconv.Itoa(bits)
		}
	}
}

// isENI reports whether link is the task's network interface in an awsvpc task.
func isENI(link netlink.Link) bool {
	return link.Attrs().Name == eniDevice &&
		link.Type() != "veth"
}

func compareEndpoints(a, b task.Endpoint) int {
	return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Ifindex, b.Ifindex))
}
