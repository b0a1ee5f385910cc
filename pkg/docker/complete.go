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

// extras is what a container's inspect says about its task and about networks that Docker did not make.
type extras struct {
	madeUp       bool   // ECS does not know the task
	service      string // Compose's
	nanoCPUs     int64  // limit, 1e9 to the CPU; 0: none
	cgroupParent string
	dns          task.NetworkDetails // the container's own, whatever the network
}

// describeExtras fills in those of c's fields that only v4 shows, and returns the rest.
func describeExtras(c *task.Container, config *container.Config, host *container.HostConfig) (x extras) {
	if config != nil && !strings.HasPrefix(c.ID, config.Hostname) { // the default is the short id
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
	// The Engine says null for none at one time and [] at another: that makes no new task.
	x.dns.DNSServers = append([]string(nil), host.DNS...)
	x.dns.DNSSearch = append([]string(nil), host.DNSSearch...)
	x.cgroupParent = host.CgroupParent
	x.nanoCPUs = host.NanoCPUs
	if x.nanoCPUs == 0 && host.CPUQuota > 0 {
		x.nanoCPUs = int64(float64(host.CPUQuota) / float64(cmp.Or(host.CPUPeriod, defaultPeriod)) * 1e9)
	}
	return x
}

const defaultPeriod = 100_000 // µs, of a CPU quota

// logging returns the log driver and its options. Clients take it for granted that awslogs has a group and a
// stream: where there is none it is left out. Options that hold secrets are left out too.
func logging(id string, cfg *container.LogConfig) (driver string, options map[string]string) {
	options = make(map[string]string, len(cfg.Config))
	for name, value := range cfg.Config {
		if !strings.Contains(name, "token") && !strings.Contains(name, "password") && !strings.Contains(name, "secret") {
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

// describeNetwork turns Docker's word of one network of a container into ours.
func describeNetwork(c *task.Container, name string, ep *network.EndpointSettings, dns task.NetworkDetails) task.DockerNetwork {
	dns.DNSName = ""
	if ep.IPAddress != "" && name != "bridge" {
		dns.DNSName = c.DockerName // which the others on a network of the user's own can look up
	}
	dns.MAC = ep.MacAddress
	dns.Subnet, dns.SubnetGateway = subnet(ep.IPAddress, ep.IPPrefixLen, ep.Gateway)
	dns.IPv6Subnet, dns.IPv6SubnetGateway = subnet(ep.GlobalIPv6Address, ep.GlobalIPv6PrefixLen, ep.IPv6Gateway)
	return task.DockerNetwork{Name: name, IPAddress: ep.IPAddress, IPv6Address: ep.GlobalIPv6Address,
		Gateway: ep.Gateway, IPv6Gateway: ep.IPv6Gateway, NetworkDetails: dns}
}

// connected returns the networks of a container that is being started with the address that Docker has not told
// yet, as the namespace has it. Of several networks nobody can tell which address is whose.
func connected(networks []task.DockerNetwork, ns *namespace) []task.DockerNetwork {
	if ns == nil || len(networks) != 1 || len(ns.endpoints) != 1 || networks[0].IPAddress != "" {
		return networks
	}
	n, ep := networks[0], ns.endpoints[0]
	n.IPAddress, n.MAC = ep.Addr.String(), net.HardwareAddr(ep.MAC[:]).String()
	return []task.DockerNetwork{n}
}

// subnet returns the block that addr is in and the gateway with the block's length, each empty if not known.
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

// complete adds to t what its containers say of it together.
func complete(t *task.Task, members []*tracked, cfg *Config) {
	t.LaunchType = cmp.Or(cfg.LaunchType, defaultLaunchType)
	// A container that shares another's network namespace is in that one's task.
	t.MadeUp = !slices.ContainsFunc(members, func(m *tracked) bool { return !m.desc.madeUp })
	if !t.MadeUp {
		for _, m := range members {
			if t.Limits == (task.TaskLimits{}) && m.desc.cgroupParent != "" && m.desc.container.Running() {
				t.Limits = cgroupLimits(cmp.Or(cfg.CgroupRoot, "/sys/fs/cgroup"), m.desc.cgroupParent, t.ID)
			}
		}
		return
	}
	t.AvailabilityZone = cmp.Or(t.AvailabilityZone, cfg.MadeUpZone)
	t.Limits = sum(members)
	// A project of several services has no service's name: whatever it were, it would be wrong for the
	// others' containers. A container's Name is its service in any case.
	t.ServiceName = members[0].desc.service
	for _, m := range members {
		if m.desc.service != t.ServiceName {
			t.ServiceName = ""
		}
	}
}

// defaultLaunchType is ECS's word for hosts that are not Amazon's.
const defaultLaunchType = "EXTERNAL"

// sum returns what all members together may use, each resource if all of them have a limit.
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

// cgroupLimits reads the limits of the task with the id from its cgroup, which is parent to its containers': the
// agent makes /ecs/<id>, or ecstasks-<id>.slice where systemd has the hierarchy. root is where version 2 or the
// controllers of version 1 are mounted. What cannot be read is no limit.
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
		cpu = append(read("cpu", parent, "cpu.cfs_quota_us"), read("cpu", parent, "cpu.cfs_period_us")...)
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
		// "max" is none, as is version 1's largest number of pages.
		if n, err := strconv.ParseInt(memory[0], 10, 64); err == nil && n < 1<<62 {
			l.Memory = n >> 20
		}
	}
	return l
}

// slicePath returns where systemd puts a slice: a dash in a name separates it from its parent's.
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
