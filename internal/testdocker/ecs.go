package testdocker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ECSBridge is the bridge that the agent's ecs-bridge CNI plugin makes.
const ECSBridge = "ecs-bridge"

// The plugin's subnet and gateway, the endpoint's address, and the half of the subnet that the
// Engine hands out here; ConnectAWSVPC uses the lower half.
var (
	ecsSubnet    = netip.MustParsePrefix("169.254.172.0/22")
	ecsGateway   = netip.MustParseAddr("169.254.172.1")
	ecsEndpoint  = netip.MustParseAddr("169.254.170.2")
	engineSubnet = netip.MustParsePrefix("169.254.174.0/23")
)

// Labels of the ECS agent.
const (
	labelTaskARN       = "com.amazonaws.ecs.task-arn"
	labelContainerName = "com.amazonaws.ecs.container-name"
	labelFamily        = "com.amazonaws.ecs.task-definition-family"
	labelRevision      = "com.amazonaws.ecs.task-definition-version"
	labelCluster       = "com.amazonaws.ecs.cluster"
)

// PauseName is the label container-name of a pause container.
const PauseName = "~internal~ecs~pause"

// CreateBridge makes a Docker network on a bridge device of the given name, both called name, which
// are removed when the test ends. The network's gateway is the subnet's first address.
func (h *Host) CreateBridge(t testing.TB, name string, subnet netip.Prefix) {
	t.Helper()
	if err := h.createBridge(name, network.IPAMConfig{Subnet: subnet.String(),
		Gateway: subnet.Addr().Next().String()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Client.NetworkRemove(context.Background(), name) })
}

// ECSNetwork returns the name of the Docker network on ecs-bridge, 169.254.172.0/22 with gateway
// .1. It is made at the first call and lives as long as the host.
func (h *Host) ECSNetwork(t testing.TB) string {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.ecsNetwork {
		if err := h.createBridge(ECSBridge, network.IPAMConfig{
			Subnet: ecsSubnet.String(), IPRange: engineSubnet.String(),
			Gateway: ecsGateway.String()}); err != nil {
			t.Fatal(err)
		}
		h.ecsNetwork = true
	}
	return ECSBridge
}

func (h *Host) createBridge(name string, ipam network.IPAMConfig) error {
	_, err := h.Client.NetworkCreate(context.Background(), name, network.CreateOptions{
		Driver:  "bridge",
		Options: map[string]string{"com.docker.network.bridge.name": name},
		IPAM:    &network.IPAM{Config: []network.IPAMConfig{ipam}},
	})
	if err != nil {
		return fmt.Errorf("create network %s: %w", name, err)
	}
	return nil
}

// Task describes an ECS task in awsvpc mode.
type Task struct {
	ID      string // last part of the ARN; "": made of the test's name
	Cluster string // "": default
	Family  string // "": test
	ENI     []netip.Prefix
	// Containers share the pause container's namespace; they need a Name, the one in the task
	// definition.
	Containers []Container
}

// RunningTask is what RunTask has started.
type RunningTask struct {
	ARN        string
	Pause      string // container id
	Containers []string
	Port       Port
}

// RunTask starts a task as the ECS agent does in awsvpc mode: a pause container without a network,
// whose namespace is then connected to ecs-bridge, and the task's containers in that namespace.
func (h *Host) RunTask(t testing.TB, task Task) RunningTask {
	t.Helper()
	if task.ID == "" {
		task.ID = strings.NewReplacer("/", "-", "#", "-").Replace(t.Name())
	}
	r := RunningTask{ARN: fmt.Sprintf("arn:aws:ecs:us-west-2:111122223333:task/%s/%s",
		or(task.Cluster, "default"), task.ID)}
	r.Pause = h.Run(t, Container{Network: "none", Labels: task.labels(r.ARN, PauseName)})
	r.Port = h.ConnectAWSVPC(t, r.Pause, task.ENI...)
	for _, c := range task.Containers {
		labels := task.labels(r.ARN, c.Name)
		for k, v := range c.Labels {
			labels[k] = v
		}
		c.Name, c.Labels, c.Network = "", labels, "container:"+r.Pause
		configure := c.Configure
		c.Configure = func(config *container.Config, host *container.HostConfig) {
			host.CgroupParent = h.dir.cgroupParent() + "/ecs/" + task.ID
			if configure != nil {
				configure(config, host)
			}
		}
		r.Containers = append(r.Containers, h.Run(t, c))
	}
	return r
}

func (task Task) labels(arn, name string) map[string]string {
	return map[string]string{
		labelTaskARN: arn, labelContainerName: name, labelFamily: or(task.Family, "test"),
		labelRevision: "1",
		labelCluster:  or(task.Cluster, "default"),
	}
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// Port is where a task's namespace meets ecs-bridge.
type Port struct {
	Addr    netip.Addr       // of ecs-eth0, the veth's end in the task
	MAC     net.HardwareAddr // of ecs-eth0
	Name    string           // of the end in the host's namespace
	Ifindex int              // of the same
}

// ConnectAWSVPC does to a running pause container what the agent's CNI plugins do: ecs-eth0, a veth
// to ecs-bridge with an address of 169.254.172.0/22 and the two routes over it; and, if eni is
// given, a device eth0 (a bridge) with those addresses in the place of the network interface. The
// veth goes with the namespace.
func (h *Host) ConnectAWSVPC(t testing.TB, id string, eni ...netip.Prefix) Port {
	t.Helper()
	h.ECSNetwork(t)
	port, err := h.connectAWSVPC(h.Inspect(t, id).State.Pid, eni)
	if err != nil {
		t.Fatalf("connect pause container: %v", err)
	}
	return port
}

func (h *Host) connectAWSVPC(pid int, eni []netip.Prefix) (port Port, err error) {
	h.mu.Lock()
	h.lastTask++
	n := h.lastTask + 1
	h.mu.Unlock()
	addr := netip.AddrFrom4([4]byte{169, 254, 172 + byte(n>>8), byte(n)})
	if !ecsSubnet.Contains(addr) || engineSubnet.Contains(addr) {
		return port, fmt.Errorf("no address left after %d tasks", n)
	}
	a4 := addr.As4()
	port = Port{Addr: addr, MAC: append(net.HardwareAddr{0x0a, 0x58}, a4[:]...),
		Name: fmt.Sprintf("vethecs%d", n)}

	taskNS, err := netns.GetFromPid(pid)
	if err != nil {
		return port, err
	}
	defer taskNS.Close()
	host, err := netlink.NewHandleAt(h.NS, unix.NETLINK_ROUTE)
	if err != nil {
		return port, err
	}
	defer host.Close()
	task, err := netlink.NewHandleAt(taskNS, unix.NETLINK_ROUTE)
	if err != nil {
		return port, err
	}
	defer task.Close()

	// The real network interface is there before ecs-bridge is called. A bridge without ports
	// stands in for it: wherever Docker works there are bridges, and not everywhere dummies.
	if len(eni) > 0 {
		eth0 := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}}
		if err := task.LinkAdd(eth0); err != nil {
			return port, fmt.Errorf("add eth0: %w", err)
		}
		if err := enableIPv6(taskNS); err != nil {
			return port, err
		}
		for _, p := range eni {
			a := &netlink.Addr{IPNet: ipNet(p)}
			if p.Addr().Is6() {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := task.AddrAdd(eth0, a); err != nil {
				return port, fmt.Errorf("add %s to eth0: %w", p, err)
			}
		}
		if err := task.LinkSetUp(eth0); err != nil {
			return port, err
		}
	}
	bridge, err := host.LinkByName(ECSBridge)
	if err != nil {
		return port, err
	}
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: port.Name,
			MasterIndex: bridge.Attrs().Index, MTU: 1500},
		PeerName:         "ecs-eth0",
		PeerHardwareAddr: port.MAC,
		PeerNamespace:    netlink.NsFd(taskNS),
	}
	if err := host.LinkAdd(veth); err != nil {
		return port, fmt.Errorf("add %s: %w", port.Name, err)
	}
	link, err := host.LinkByName(port.Name)
	if err != nil {
		return port, err
	}
	port.Ifindex = link.Attrs().Index
	if err := host.LinkSetUp(link); err != nil {
		return port, err
	}
	return port, configureTaskEnd(task, addr)
}

// enableIPv6 undoes what Docker does to a container without a network.
func enableIPv6(ns netns.NsHandle) error {
	return inNamespace(ns, func() error {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("0"), 0)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a kernel without IPv6
		}
		return err
	})
}

// configureTaskEnd gives ecs-eth0 its address and routes, as the plugin leaves them: the connected
// route is taken away, so tasks do not see each other.
func configureTaskEnd(task *netlink.Handle, addr netip.Addr) error {
	link, err := task.LinkByName("ecs-eth0")
	if err != nil {
		return err
	}
	if err := task.LinkSetUp(link); err != nil {
		return err
	}
	if err := task.AddrAdd(link,
		&netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, ecsSubnet.Bits()))}); err != nil {
		return fmt.Errorf("add %s: %w", addr, err)
	}
	for _, dst := range []netip.Addr{ecsEndpoint, ecsGateway} {
		err := task.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index,
			Dst: ipNet(netip.PrefixFrom(dst, 32)), Gw: ecsGateway.AsSlice()})
		if err != nil {
			return fmt.Errorf("add route to %s: %w", dst, err)
		}
	}
	err = task.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(ecsSubnet),
		Scope: netlink.SCOPE_LINK})
	if err != nil {
		return fmt.Errorf("delete the connected route: %w", err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
