package mdfile

import (
	"cmp"
	"encoding/json"
	"net"
	"strconv"
	"strings"
	"time"

	"metad/pkg/task"
)

// StatusReady is the value of MetadataFileStatus once the file is complete. The key is absent
// before that; no other value exists.
const StatusReady = "READY"

// Document is the metadata file. The members are in the order of the file: first the ECS agent's
// keys in the agent's order, each left out while it is empty, then the keys that only the original
// proposal has, always there. Keys that both have (ContainerID, ImageName, …) stand once, with the
// agent's content.
//
// A key of one that is a key of the other in different letter case (TaskARN and TaskArn, BindIp and
// BindIP) always has the same value, because many decoders, Go's among them, do not tell them
// apart.
type Document struct {
	// name, or ARN if the agent was configured so
	Cluster                string `json:"Cluster,omitempty"`
	ContainerInstanceARN   string `json:"ContainerInstanceARN,omitempty"`
	TaskARN                string `json:"TaskARN,omitempty"`
	TaskDefinitionFamily   string `json:"TaskDefinitionFamily,omitempty"`
	TaskDefinitionRevision string `json:"TaskDefinitionRevision,omitempty"`
	ContainerID            string `json:"ContainerID,omitempty"`
	// in the task definition
	ContainerName string `json:"ContainerName,omitempty"`
	// with a leading slash
	DockerContainerName string        `json:"DockerContainerName,omitempty"`
	ImageID             string        `json:"ImageID,omitempty"` // "sha256:…"
	ImageName           string        `json:"ImageName,omitempty"`
	PortMappings        []PortMapping `json:"PortMappings,omitempty"`
	Networks            []Network     `json:"Networks,omitempty"`
	// StatusReady or absent
	MetadataFileStatus     string `json:"MetadataFileStatus,omitempty"`
	AvailabilityZone       string `json:"AvailabilityZone,omitempty"`
	HostPrivateIPv4Address string `json:"HostPrivateIPv4Address,omitempty"`
	HostPublicIPv4Address  string `json:"HostPublicIPv4Address,omitempty"`
	HostIPv6Address        string `json:"HostIPv6Address,omitempty"`

	Version string `json:"Version"` // "v1"
	// Docker's word: created, running, paused, exited, …
	Status            string `json:"Status"`
	ClusterARN        string `json:"ClusterArn"`
	ContainerInstance string `json:"Container_Instance"`
	TaskArn           string `json:"TaskArn"` // equals TaskARN
	NetworkMode       string `json:"NetworkMode"`
	Gateway           string `json:"Gateway"`
	IPAddress         string `json:"IPAddress"`
	IPv6Gateway       string `json:"IPv6Gateway"`
	LastUpdatedAt     string `json:"LastUpdatedAt"` // Unix seconds
}

// PortMapping is one port binding; no member is ever left out.
type PortMapping struct {
	ContainerPort      uint16
	ContainerPortRange string // always "": Docker reports ports one by one
	HostPort           uint16
	BindIP             string `json:"BindIp"`
	Protocol           string
	BindIPProposal     string `json:"BindIP"` // equals BindIp
}

// Network is one Docker network the container is in.
type Network struct {
	NetworkMode   string
	IPv4Addresses []string `json:",omitempty"`
	IPv6Addresses []string `json:",omitempty"`
}

// Host is the file's part about the host. Empty members are left out of the file.
type Host struct {
	Cluster              string // for containers whose task has none
	ContainerInstanceARN string // for containers whose task has none
	AvailabilityZone     string // for containers whose task has none
	PrivateIPv4Address   string
	PublicIPv4Address    string
	IPv6Address          string // only of a host without IPv4
}

// newDocument describes c, a container of t, on h. It holds everything that is known. Ports and
// networks are in it only while the container runs: an address that it had, or will have, is of no
// use to it. The document is READY exactly then.
func newDocument(t *task.Task, c *task.Container, h Host) *Document {
	d := &Document{
		Cluster:                cmp.Or(t.Cluster, h.Cluster),
		ContainerInstanceARN:   cmp.Or(t.ContainerInstanceARN, h.ContainerInstanceARN),
		TaskARN:                t.ARN,
		TaskDefinitionFamily:   t.Family,
		TaskDefinitionRevision: t.Revision,
		ContainerID:            c.ID,
		ContainerName:          cmp.Or(c.Name, c.DockerName),
		ImageID:                c.ImageID,
		ImageName:              c.Image,
		AvailabilityZone:       cmp.Or(t.AvailabilityZone, h.AvailabilityZone),
		HostPrivateIPv4Address: h.PrivateIPv4Address,
		HostPublicIPv4Address:  h.PublicIPv4Address,
		HostIPv6Address:        h.IPv6Address,
		Version:                "v1",
		Status:                 c.State,
		TaskArn:                t.ARN,
	}
	if c.ID != "" && c.DockerName != "" {
		d.DockerContainerName = "/" + c.DockerName
	}
	d.ClusterARN = clusterARN(t.ARN, d.Cluster)
	d.ContainerInstance = d.ContainerInstanceARN
	if !c.Running() {
		return d
	}

	for _, p := range c.Ports {
		d.PortMappings = append(d.PortMappings, PortMapping{
			ContainerPort:  p.ContainerPort,
			HostPort:       p.HostPort,
			BindIP:         p.HostIP,
			Protocol:       p.Protocol,
			BindIPProposal: p.HostIP,
		})
	}
	for _, n := range c.DockerNetworks {
		d.Networks = append(d.Networks, Network{
			NetworkMode:   n.Name,
			IPv4Addresses: []string{n.IPAddress},
			IPv6Addresses: list(n.IPv6Address),
		})
	}
	if d.Networks == nil {
		// The agent's way of saying that the container has no network of its own.
		d.Networks = []Network{{NetworkMode: c.NetworkMode, IPv4Addresses: []string{""}}}
	}
	d.setNetwork(t, c)
	d.MetadataFileStatus = StatusReady
	return d
}

// setNetwork fills the proposal's keys, which know one network only: the task's interface in an
// awsvpc task, otherwise the network that the container was created with, otherwise the first that
// gave it an address. A container in another container's namespace has that container's.
func (d *Document) setNetwork(t *task.Task, c *task.Container) {
	d.NetworkMode = networkName(c.NetworkMode)
	if len(c.Networks) > 0 {
		n := c.Networks[0]
		d.NetworkMode, d.IPAddress = n.Mode, cmp.Or(n.IPv4Addresses...)
		return
	}
	if id, ok := strings.CutPrefix(c.NetworkMode, "container:"); ok {
		if c = t.Container(id); c == nil {
			return
		}
	}
	var found *task.DockerNetwork
	for i := range c.DockerNetworks {
		n := &c.DockerNetworks[i]
		if n.Name == networkName(c.NetworkMode) {
			found = n
			break
		}
		if found == nil && n.IPAddress != "" {
			found = n
		}
	}
	if found != nil {
		d.Gateway, d.IPAddress, d.IPv6Gateway = found.Gateway, found.IPAddress,
			found.IPv6Gateway
	}
}

// networkName returns the name of the network that a HostConfig.NetworkMode means.
func networkName(mode string) string {
	if mode == "default" {
		return "bridge"
	}
	return mode
}

// append appends the file's text to dst: a tab per level, one key per line, no newline at the end.
func (d *Document) append(dst []byte, updated time.Time) []byte {
	d.LastUpdatedAt = ""
	if !updated.IsZero() {
		d.LastUpdatedAt = strconv.FormatInt(updated.Unix(), 10)
	}
	b, err := json.MarshalIndent(d, "", "\t")
	if err != nil {
		panic(err) // strings and numbers only
	}
	return append(dst, b...)
}

// clusterARN returns the ARN of the cluster named or addressed by cluster, from the task's ARN
// "arn:<partition>:ecs:<region>:<account>:task/…". Empty if that cannot be said.
func clusterARN(taskARN, cluster string) string {
	if strings.HasPrefix(cluster, "arn:") {
		return cluster
	}
	prefix, _, ok := strings.Cut(taskARN, ":task/")
	if !ok || cluster == "" {
		return ""
	}
	return prefix + ":cluster/" + cluster
}

func list(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

// LocalHost returns the facts about the host that metad runs on: the address it uses towards the
// world, which on EC2 is the instance's private one. No packet is sent for it.
func LocalHost(cluster, availabilityZone string) Host {
	h := Host{Cluster: cluster, AvailabilityZone: availabilityZone}
	h.PrivateIPv4Address = sourceAddr("udp4", "192.0.2.1:9") // TEST-NET-1, for documentation
	if h.PrivateIPv4Address == "" {
		h.IPv6Address = sourceAddr("udp6", "[2001:db8::1]:9")
	}
	return h
}

func sourceAddr(network, to string) string {
	conn, err := net.Dial(network, to)
	if err != nil {
		return "" // no route
	}
	defer conn.Close()
	host, _, _ := net.SplitHostPort(conn.LocalAddr().String())
	return host
}
