package docker

import (
	"cmp"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"

	"metad/pkg/task"
)

// extras is what an inspect contains about the container's task and about networks that Docker did
// not make.
type extras struct {
	madeUp       bool   // ECS does not know the task
	service      string // Compose's
	nanoCPUs     int64  // limit, 1e9 to the CPU; 0: none
	cgroupParent string
	dns          task.NetworkDetails // the container's own, whatever the network
}

// describeExtras sets the fields of c that only v4 shows, and returns the rest.
func describeExtras(c *task.Container, config *container.Config,
	host *container.HostConfig) (x extras) {
	// the default is the short id
	if config != nil && !strings.HasPrefix(c.ID, config.Hostname) {
		x.dns.DNSName = config.Hostname
		if config.Domainname != "" {
			x.dns.DNSName += "." + config.Domainname
		}
	}
	if host == nil {
		return x
	}
	c.LogDriver, c.LogOptions = logging(c.ID, &host.LogConfig)
	c.RestartPolicy = !host.RestartPolicy.IsNone()
	// For none, the Engine answers null at one time and [] at another. That is no change of the
	// task.
	x.dns.DNSServers = append([]string(nil), host.DNS...)
	x.dns.DNSSearch = append([]string(nil), host.DNSSearch...)
	x.cgroupParent = host.CgroupParent
	x.nanoCPUs = host.NanoCPUs
	if x.nanoCPUs == 0 && host.CPUQuota > 0 {
		x.nanoCPUs = int64(float64(host.CPUQuota) / float64(cmp.Or(host.CPUPeriod,
			defaultPeriod)) * 1e9)
	}
	return x
}

const defaultPeriod = 100_000 // µs, of a CPU quota

// logging returns the log driver and its options. Clients rely on awslogs to have a group and a
// stream, so it is left out if one of them is missing. Options with secrets are left out too.
func logging(id string, cfg *container.LogConfig) (driver string, options map[string]string) {
	options = make(map[string]string, len(cfg.Config))
	for name, value := range cfg.Config {
		if !strings.Contains(name, "token") && !strings.Contains(name, "password") &&
			!strings.Contains(name, "secret") {
			options[name] = value
		}
	}
	if cfg.Type == "awslogs" {
		if options["awslogs-stream"] == "" && options["tag"] == "" {
			options["awslogs-stream"] = id // the driver's default
		}
		if options["awslogs-group"] == "" || options["awslogs-stream"] == "" {
			return "", nil
		}
	}
	if len(options) == 0 {
		options = nil
	}
	return cfg.Type, options
}

// describeNetwork converts Docker's description of one network of a container.
func describeNetwork(c *task.Container, name string, ep *network.EndpointSettings,
	dns task.NetworkDetails) task.DockerNetwork {
	dns.DNSName = ""
	if ep.IPAddress != "" && name != "bridge" {
		// which the others on a network of the user's own can look up
		dns.DNSName = c.DockerName
	}
	dns.MAC = ep.MacAddress
	dns.Subnet, dns.SubnetGateway = subnet(ep.IPAddress, ep.IPPrefixLen, ep.Gateway)
	dns.IPv6Subnet, dns.IPv6SubnetGateway = subnet(ep.GlobalIPv6Address, ep.GlobalIPv6PrefixLen,
		ep.IPv6Gateway)
	return task.DockerNetwork{Name: name, IPAddress: ep.IPAddress,
		IPv6Address: ep.GlobalIPv6Address,
		Gateway:     ep.Gateway, IPv6Gateway: ep.IPv6Gateway, NetworkDetails: dns}
}

// connected returns the networks of a container that is being started. Docker does not report the
// address yet, so it comes from the namespace. With several networks it is not known which address
// belongs to which.
func connected(networks []task.DockerNetwork, ns *namespace) []task.DockerNetwork {
	if ns == nil || len(networks) != 1 || len(ns.endpoints) != 1 ||
		networks[0].IPAddress != "" {
		return networks
	}
	n, ep := networks[0], ns.endpoints[0]
	n.IPAddress, n.MAC = ep.Addr.String(), net.HardwareAddr(ep.MAC[:]).String()
	return []task.DockerNetwork{n}
}

// subnet returns the block of addr, and the gateway with the block's length. Each is empty if not
// known.
func subnet(addr string, bits int, gateway string) (block, withBits string) {
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return "", ""
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return "", ""
	}
	if gateway != "" {
		withBits = gateway + "/" + strconv.Itoa(bits)
	}
	return p.String(), withBits
}

// complete adds to t the facts that come from all its containers together.
func complete(t *task.Task, members []*tracked, cfg *Config) {
	t.LaunchType = cmp.Or(cfg.LaunchType, defaultLaunchType)
	// A container that shares another's network namespace is in that one's task.
	t.MadeUp = !slices.ContainsFunc(members, func(m *tracked) bool { return !m.desc.madeUp })
	if !t.MadeUp {
		for _, m := range members {
			if t.Limits == (task.TaskLimits{}) && m.desc.cgroupParent != "" &&
				m.desc.container.Running() {
				t.Limits = cgroupLimits(cmp.Or(cfg.CgroupRoot, "/sys/fs/cgroup"),
					m.desc.cgroupParent, t.ID)
			}
		}
		return
	}
	t.AvailabilityZone = cmp.Or(t.AvailabilityZone, cfg.MadeUpZone)
	t.Limits = sum(members)
	// A project of several services has no ServiceName, because any name would be wrong for
	// the other services. A container's Name is always its service.
	t.ServiceName = members[0].desc.service
	for _, m := range members {
		if m.desc.service != t.ServiceName {
			t.ServiceName = ""
		}
	}
}

// defaultLaunchType is the launch type in ECS of hosts outside AWS.
const defaultLaunchType = "EXTERNAL"

// sum returns the limits of all members together. A resource has one only if each member has one.
func sum(members []*tracked) (l task.TaskLimits) {
	var nanoCPUs int64
	allCPU, allMemory := true, true
	for _, m := range members {
		nanoCPUs += m.desc.nanoCPUs
		l.Memory += m.desc.container.Limits.Memory
		allCPU = allCPU && m.desc.nanoCPUs > 0
		allMemory = allMemory && m.desc.container.Limits.Memory > 0
	}
	if allCPU {
		l.CPU = float64(nanoCPUs) / 1e9
	}
	if !allMemory {
		l.Memory = 0
	}
	return l
}

// cgroupLimits reads the limits of the task with the id from its cgroup, the parent of its
// containers' cgroups. The agent makes /ecs/<id>, or ecstasks-<id>.slice if systemd owns the
// hierarchy. root is the mount point of version 2, or of the controllers of version 1. A file that
// cannot be read means no limit.
func cgroupLimits(root, parent, id string) (l task.TaskLimits) {
	if !strings.Contains(parent, id) || strings.Contains(parent, "..") { // not the task's own
		return l
	}
	if strings.HasSuffix(parent, ".slice") {
		parent = slicePath(parent)
	}
	read := func(path ...string) []string {
		b, err := os.ReadFile(filepath.Join(append([]string{root}, path...)...))
		if err != nil {
			return nil
		}
		return strings.Fields(string(b))
	}
	cpu := read(parent, "cpu.max") // "50000 100000", "max 100000"
	memory := read(parent, "memory.max")
	if cpu == nil && memory == nil {
		cpu = append(read("cpu", parent, "cpu.cfs_quota_us"),
			read("cpu", parent, "cpu.cfs_period_us")...)
		memory = read("memory", parent, "memory.limit_in_bytes")
	}
	if len(cpu) == 2 {
		quota, _ := strconv.ParseFloat(cpu[0], 64) // "max": 0
		period, _ := strconv.ParseFloat(cpu[1], 64)
		if quota > 0 && period > 0 {
			l.CPU = quota / period
		}
	}
	if len(memory) == 1 {
		// "max" means no limit, and so does the largest number of pages in version 1.
		if n, err := strconv.ParseInt(memory[0], 10, 64); err == nil && n < 1<<62 {
			l.Memory = n >> 20
		}
	}
	return l
}

// slicePath returns the directory of a systemd slice. A dash in a slice's name separates it from
// the name of its parent.
func slicePath(name string) string {
	name = filepath.Base(name)
	path := ""
	for i, r := range name {
		if r == '-' {
			path += name[:i] + ".slice/"
		}
	}
	return path + name
}
