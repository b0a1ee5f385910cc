package task

import (
	"maps"
	"math"
	"strings"
	"time"
)

// The members of the documents, with the agent's names and in its order
// (ecs-agent/tmds/handlers/v2/response.go and v4/state/response.go). A type has members that follow
// each other in all versions that have them. encoding/json writes them, as in the agent, so that
// escapes, numbers and times agree.

// {"Cluster": text, "TaskARN": ARN, "Family": text, "Revision": "7", "DesiredStatus": status,
// "KnownStatus": status}
type taskHead struct {
	Cluster       string
	TaskARN       string
	Family        string
	Revision      string
	DesiredStatus Status `json:",omitempty"`
	KnownStatus   Status
}

func newTaskHead(t *Task) taskHead {
	return taskHead{t.Cluster, t.ARN, t.Family, t.Revision, t.DesiredStatus, t.KnownStatus}
}

// {"Limits": {"CPU": vCPU, "Memory": MiB}, "PullStartedAt": time, …}
type taskRest struct {
	Limits             *taskLimits `json:",omitempty"`
	PullStartedAt      *time.Time  `json:",omitempty"`
	PullStoppedAt      *time.Time  `json:",omitempty"`
	ExecutionStoppedAt *time.Time  `json:",omitempty"`
	AvailabilityZone   string      `json:",omitempty"`
}

type taskLimits struct {
	CPU    float64 `json:",omitempty"`
	Memory int64   `json:",omitempty"`
}

func newTaskRest(t *Task) taskRest {
	r := taskRest{
		PullStartedAt:      shownTime(t.PullStartedAt),
		PullStoppedAt:      shownTime(t.PullStoppedAt),
		ExecutionStoppedAt: shownTime(t.ExecutionStoppedAt),
		AvailabilityZone:   t.AvailabilityZone,
	}
	limits := taskLimits(t.Limits)
	if math.IsNaN(limits.CPU) || math.IsInf(limits.CPU, 0) { // JSON has no such number
		limits.CPU = 0
	}
	if limits != (taskLimits{}) {
		r.Limits = &limits
	}
	return r
}

// v4, before the containers.
type taskLaunch struct {
	LaunchType string `json:",omitempty"`
}

// v4, after the containers. The agent's type has more members between ServiceName and
// FaultInjectionEnabled, which it does not fill.
type taskTail struct {
	VPCID                 string `json:",omitempty"`
	ServiceName           string `json:",omitempty"`
	FaultInjectionEnabled bool
	AvailabilityZoneID    string `json:",omitempty"`
}

func newTaskTail(t *Task) taskTail {
	return taskTail{t.VPCID, t.ServiceName, t.FaultInjectionEnabled, t.AvailabilityZoneID}
}

// {"DockerId": 64 hex digits, "Name": text, …}
type containerHead struct {
	DockerID   string `json:"DockerId"`
	Name       string
	DockerName string
	Image      string
	ImageID    string
}

func newContainerHead(c *Container) containerHead {
	return containerHead{c.ID, c.Name, c.DockerName, c.Image, c.ImageID}
}

type containerPorts struct {
	Ports []port `json:",omitempty"`
}

type port struct {
	ContainerPort uint16 `json:",omitempty"`
	Protocol      string `json:",omitempty"`
	HostPort      uint16 `json:",omitempty"`
	HostIP        string `json:"HostIp,omitempty"` // v4 only
}

func newPorts(c *Container, hostIP bool) (list []port) {
	for _, p := range c.Ports {
		if len(c.Networks) > 0 { // the task has an interface of its own: nothing is mapped
			p.HostPort = p.ContainerPort
		}
		if !hostIP {
			p.HostIP = ""
		}
		list = append(list, port(p))
	}
	return list
}

// {"Labels": {…}, "DesiredStatus": status, …, "Limits": {"CPU": units, "Memory": MiB}, …, "Type":
// type}
type containerBody struct {
	Labels        map[string]string `json:",omitempty"`
	DesiredStatus Status
	KnownStatus   Status
	ExitCode      *int `json:",omitempty"` // 0 is printed
	Limits        containerLimits
	CreatedAt     *time.Time `json:",omitempty"`
	StartedAt     *time.Time `json:",omitempty"`
	FinishedAt    *time.Time `json:",omitempty"`
	Type          ContainerType
}

// {"CPU": units, "Memory": MiB}: integers, and always both, or real clients choke.
type containerLimits struct {
	CPU    int64
	Memory int64
}

// minCPUUnits is the number that the agent prints for a CPU limit below it, or for none.
const minCPUUnits = 2

func newContainerBody(t *Task, c *Container) containerBody {
	return containerBody{
		Labels:        labels(t, c),
		DesiredStatus: c.DesiredStatus,
		KnownStatus:   c.KnownStatus,
		ExitCode:      c.ExitCode,
		Limits: containerLimits{CPU: max(c.Limits.CPU, minCPUUnits),
			Memory: c.Limits.Memory},
		CreatedAt:  shownTime(c.CreatedAt),
		StartedAt:  shownTime(c.StartedAt),
		FinishedAt: shownTime(c.FinishedAt),
		Type:       c.Type,
	}
}

// labels returns c's labels and, if ECS does not know t, those that the agent sets on every
// container and that real clients look for. The container's own labels win.
func labels(t *Task, c *Container) map[string]string {
	if !t.MadeUp {
		return c.Labels
	}
	all := map[string]string{
		LabelTaskARN:       t.ARN,
		LabelContainerName: c.Name,
		LabelFamily:        t.Family,
		LabelRevision:      t.Revision,
		LabelCluster:       t.Cluster,
	}
	maps.Copy(all, c.Labels)
	return all
}

// {"Health": {"status": "HEALTHY", …}, "Volumes": […]}
type containerRest struct {
	Health  *health  `json:",omitempty"` // {} before the first verdict
	Volumes []volume `json:",omitempty"`
}

type health struct {
	Status   string     `json:"status,omitempty"`
	Since    *time.Time `json:"statusSince,omitempty"`
	ExitCode int        `json:"exitCode,omitempty"`
	Output   string     `json:"output,omitempty"`
}

type volume struct {
	DockerName  string `json:",omitempty"`
	Source      string `json:",omitempty"`
	Destination string `json:",omitempty"`
}

func newContainerRest(c *Container) (r containerRest) {
	if h := c.Health; h != nil {
		r.Health = &health{h.Status, shownTime(h.Since), h.ExitCode, h.Output}
	}
	for _, v := range c.Volumes {
		r.Volumes = append(r.Volumes, volume(v))
	}
	return r
}

// v4, after the volumes. The agent's type has Snapshotter after Networks and does not fill it.
type containerTail struct {
	LogDriver    string            `json:",omitempty"`
	LogOptions   map[string]string `json:",omitempty"`
	ContainerARN string            `json:",omitempty"`
	Networks     []fullNetwork     `json:",omitempty"`
	// 0 is printed, where Docker has a restart policy
	RestartCount *int `json:",omitempty"`
}

func newContainerTail(t *Task, c *Container) containerTail {
	tail := containerTail{LogDriver: c.LogDriver, LogOptions: c.LogOptions,
		ContainerARN: containerARN(t, c), Networks: newFullNetworks(t, c)}
	if c.RestartPolicy {
		tail.RestartCount = &c.RestartCount
	}
	return tail
}

// containerARN returns c's ARN, "arn:…:container/<cluster>/<task id>/<id>": ECS's own, or one that
// is made of the task's ARN and the Docker id. A container without an id has none.
func containerARN(t *Task, c *Container) string {
	before, resource, ok := strings.Cut(t.ARN, ":task/")
	if c.ARN != "" || c.ID == "" || !ok {
		return c.ARN
	}
	if !strings.Contains(resource, "/") { // an ARN of before 2018 has no cluster
		resource = t.Cluster[strings.LastIndexByte(t.Cluster, '/')+1:] + "/" + resource
	}
	return before + ":container/" + resource + "/" + c.ID
}

type containerNetworks struct {
	Networks []network `json:",omitempty"`
}

// {"NetworkMode": "awsvpc" or the name of a Docker network, "IPv4Addresses": […], "IPv6Addresses":
// […]}
type network struct {
	NetworkMode   string   `json:",omitempty"`
	IPv4Addresses []string `json:",omitempty"`
	IPv6Addresses []string `json:",omitempty"`
}

// v4 only. The case of Ipv4 and Ipv6 at the end is the agent's.
type fullNetwork struct {
	network
	AttachmentIndex          *int     `json:",omitempty"` // 0 is printed: awsvpc has it
	MACAddress               string   `json:",omitempty"`
	IPv4SubnetCIDRBlock      string   `json:",omitempty"`
	IPv6SubnetCIDRBlock      string   `json:",omitempty"`
	DomainNameServers        []string `json:",omitempty"`
	DomainNameSearchList     []string `json:",omitempty"`
	PrivateDNSName           string   `json:",omitempty"`
	SubnetGatewayIpv4Address string   `json:",omitempty"`
	SubnetGatewayIpv6Address string   `json:",omitempty"`
}

func newNetworks(networks []Network) (list []network) {
	for _, n := range networks {
		list = append(list, network{n.Mode, n.IPv4Addresses, n.IPv6Addresses})
	}
	return list
}

// newDockerNetworks returns the networks that v3 shows if the task has no network interface of its
// own: without IPv6, and with one empty address where Docker has none, as in host mode.
func newDockerNetworks(t *Task, c *Container) (list []network) {
	for _, n := range dockerNetworks(t, c) {
		list = append(list, network{NetworkMode: n.Name,
			IPv4Addresses: []string{n.IPAddress}})
	}
	return list
}

func newFullNetworks(t *Task, c *Container) (list []fullNetwork) {
	for _, n := range c.Networks {
		list = append(list, newFullNetwork(n.Mode, n.IPv4Addresses, n.IPv6Addresses,
			&n.NetworkDetails))
		list[len(list)-1].AttachmentIndex = new(int)
	}
	if list != nil {
		return list
	}
	for _, n := range dockerNetworks(t, c) {
		var v6 []string
		if n.IPv6Address != "" {
			v6 = []string{n.IPv6Address}
		}
		list = append(list, newFullNetwork(n.Name, []string{n.IPAddress}, v6,
			&n.NetworkDetails))
	}
	return list
}

func newFullNetwork(mode string, v4, v6 []string, d *NetworkDetails) fullNetwork {
	return fullNetwork{
		network:                  network{mode, v4, v6},
		MACAddress:               d.MAC,
		IPv4SubnetCIDRBlock:      d.Subnet,
		IPv6SubnetCIDRBlock:      d.IPv6Subnet,
		DomainNameServers:        d.DNSServers,
		DomainNameSearchList:     d.DNSSearch,
		PrivateDNSName:           d.DNSName,
		SubnetGatewayIpv4Address: d.SubnetGateway,
		SubnetGatewayIpv6Address: d.IPv6SubnetGateway,
	}
}

// dockerNetworks returns c's networks in Docker. If c uses the network of another container of t,
// it returns that one's. Otherwise it returns one with the name of c's network mode and no address.
func dockerNetworks(t *Task, c *Container) []DockerNetwork {
	if len(c.DockerNetworks) > 0 {
		return c.DockerNetworks
	}
	if c.ID == "" || c.NetworkMode == "" {
		return nil
	}
	if of, ok := strings.CutPrefix(c.NetworkMode, "container:"); ok {
		for _, o := range t.Containers {
			if o.Is(of) && len(o.DockerNetworks) > 0 {
				return o.DockerNetworks
			}
		}
	}
	return []DockerNetwork{{Name: c.NetworkMode}}
}

// shownTime returns t in UTC, or nil if a document must not show it: a zero time, or one that
// RFC 3339 cannot write.
func shownTime(t time.Time) *time.Time {
	t = t.UTC()
	if t.IsZero() || t.Year() < 0 || t.Year() > 9999 {
		return nil
	}
	return &t
}
