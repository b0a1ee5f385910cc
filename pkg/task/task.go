// Package task describes tasks and their containers, and renders their documents. It imports no
// other package of metad, so that every package can use it.
//
// A *Task and everything reached from it is immutable once published; only a StatsCell changes. A
// change builds a new Task. An unchanged task keeps its pointer, so that consumers of a complete
// set (see Apply in the packages that have it) find changes by comparing pointers.
package task

import (
	"net/netip"
	"strings"
	"time"
)

// Status is a task's or container's state in the ECS agent's words.
type Status string

// The agent's status texts that follow from Docker's state.
const (
	StatusNone    Status = "NONE"
	StatusPulled  Status = "PULLED"
	StatusCreated Status = "CREATED"
	StatusRunning Status = "RUNNING"
	// a running pause container's steady state
	StatusResourcesProvisioned Status = "RESOURCES_PROVISIONED"
	StatusStopped              Status = "STOPPED"
)

// ContainerType is the agent's word for the purpose of a container.
type ContainerType string

// Container types. A container that metad does not recognise is TypeNormal.
const (
	TypeNormal          ContainerType = "NORMAL"
	TypeEmptyHostVolume ContainerType = "EMPTY_HOST_VOLUME"
	TypeCNIPause        ContainerType = "CNI_PAUSE"
	TypeNamespacePause  ContainerType = "NAMESPACE_PAUSE"
	TypeManagedDaemon   ContainerType = "MANAGED_DAEMON"
)

// PauseName is the container name the agent gives the container that holds an awsvpc task's
// network namespace.
const PauseName = "~internal~ecs~pause"

// Docker labels the ECS agent sets on every container it creates.
const (
	LabelTaskARN       = "com.amazonaws.ecs.task-arn"
	LabelContainerName = "com.amazonaws.ecs.container-name"
	LabelFamily        = "com.amazonaws.ecs.task-definition-family"
	LabelRevision      = "com.amazonaws.ecs.task-definition-version"
	LabelCluster       = "com.amazonaws.ecs.cluster"
)

// Task is one task: the unit that a source address identifies.
type Task struct {
	ID       string // last part of ARN; for bpftool, logs and directories
	ARN      string // six colon-separated parts, "…:task/<cluster>/<id>"
	Cluster  string // name or ARN, as the agent was configured
	Family   string
	Revision string // a number in text

	DesiredStatus Status
	KnownStatus   Status

	// Containers in a stable order: by creation time, then id. Nil when none was created yet.
	Containers []*Container

	Limits TaskLimits

	// Zero times are left out of every document.
	PullStartedAt, PullStoppedAt, ExecutionStoppedAt time.Time

	AvailabilityZone     string // left out when empty
	ContainerInstanceARN string // metadata file only

	// v4 only; left out when empty.
	LaunchType         string // "EC2", "EXTERNAL", …
	ServiceName        string
	VPCID              string
	AvailabilityZoneID string

	FaultInjectionEnabled bool // v4 only, always shown

	// ECS does not know it: its containers are shown with the labels that the agent would set
	MadeUp bool

	// Settling: a container of the task is being created or started, and has not been inspected
	// yet. A request may come from that container.
	Settling bool `json:"-"`

	// Endpoints are the places at which this task's packets enter the host, one per address.
	// Empty for a task without a network of its own (host network, or stopped).
	Endpoints []Endpoint
}

// TaskLimits are the task-level limits; a zero member is left out.
type TaskLimits struct {
	CPU    float64 // vCPU
	Memory int64   // MiB
}

// Endpoint is one address of a task and the bridge port it lives behind.
type Endpoint struct {
	Addr    netip.Addr // IPv4, as seen by the endpoint
	Ifindex int        // host end of the veth, in the host's network namespace
	MAC     [6]byte    // the container's end

	// Docker id of the container that the namespace was made for; "": not known
	Container string
}

// Container is one container of a task.
type Container struct {
	ID         string // full Docker id; "" while it is being created
	Name       string // in the task definition
	DockerName string // no leading slash
	Image      string // as in the request to create the container
	ImageID    string // "sha256:…"; empty for a pause container

	Ports  []Port
	Labels map[string]string

	DesiredStatus Status
	KnownStatus   Status
	ExitCode      *int // nil while it runs or when unknown

	Limits ContainerLimits

	// Zero times are left out of every document.
	CreatedAt, StartedAt, FinishedAt time.Time

	Type     ContainerType
	Networks []Network // what v2 shows: one element in awsvpc, else none
	Health   *Health   // nil: no Docker health check
	Volumes  []Volume

	// v2 documents do not show the following fields.

	ARN            string // "": made of the task's ARN and ID
	LogDriver      string
	LogOptions     map[string]string
	DockerNetworks []DockerNetwork
	RestartPolicy  bool // Docker restarts it
	RestartCount   int  // shown if RestartPolicy

	// No document shows the following fields.

	PID int // init process, 0 unless running
	// Docker's word: created, running, paused, restarting, removing, exited, dead
	State       string
	NetworkMode string // HostConfig.NetworkMode
	Cgroup      Cgroup // its own while it runs, zero: not known
	// last part of ECS_CONTAINER_METADATA_URI(_V4) in its environment; "": none
	EndpointID string

	// MetadataEnv are the variables of its environment that say where its metadata is, as
	// KEY=value.
	MetadataEnv []string

	// Stats is the cell that the sampler fills and the server reads. It belongs to the
	// container, not to this version of its description: every version carries the same
	// pointer. Never nil for a container with an ID.
	Stats *StatsCell
}

// Cgroup is a cgroup of version 2 of exactly one container.
type Cgroup struct {
	ID    uint64 // inode number of its directory; the kernel uses none twice before a reboot
	Level uint8  // depth below the root, which has level 0
}

// ContainerLimits are always printed, both members.
type ContainerLimits struct {
	CPU    int64 // CPU units, 1024 to the core; the agent prints 2 for anything below 2
	Memory int64 // MiB, 0: none
}

// Port is one port binding. In an awsvpc task HostPort equals ContainerPort.
type Port struct {
	ContainerPort uint16
	Protocol      string // "tcp", "udp"
	HostPort      uint16
	HostIP        string // v4 and metadata file only
}

// Network is a network interface of the task.
type Network struct {
	Mode          string // "awsvpc"
	IPv4Addresses []string
	IPv6Addresses []string
	NetworkDetails
}

// NetworkDetails are the members of a network that only v4 shows. An empty member is left out.
type NetworkDetails struct {
	MAC                              string
	Subnet, IPv6Subnet               string // "10.0.0.0/24"
	SubnetGateway, IPv6SubnetGateway string // "10.0.0.1/24"
	DNSServers, DNSSearch            []string
	DNSName                          string // of the container there
}

// DockerNetwork is one network as Docker's inspect lists it, in the order of the names.
type DockerNetwork struct {
	Name        string
	IPAddress   string
	IPv6Address string
	Gateway     string
	IPv6Gateway string
	NetworkDetails
}

// Health is the state of a Docker health check. All members zero until the first verdict.
type Health struct {
	Status   string // "HEALTHY", "UNHEALTHY", "" before the first verdict
	Since    time.Time
	ExitCode int
	Output   string // last log entry, at most 1024 bytes
}

// Volume is one mount.
type Volume struct {
	DockerName  string // the volume's name; "" for a bind mount
	Source      string
	Destination string
}

// Running reports whether the container has processes: it is up, paused included.
func (c *Container) Running() bool { return c.PID != 0 }

// Is reports whether ref, as in the network mode "container:<ref>", names the container: by its
// full or short id or by its Docker name.
func (c *Container) Is(ref string) bool {
	return ref != "" && (ref == c.ID || ref == c.DockerName || len(ref) == shortID &&
		strings.HasPrefix(c.ID, ref))
}

const shortID = 12

// Pause returns the container that holds the awsvpc task's network namespace, or nil.
func (t *Task) Pause() *Container {
	for _, c := range t.Containers {
		if c.Type == TypeCNIPause {
			return c
		}
	}
	return nil
}

// Container returns the container with the full Docker id, or nil.
func (t *Task) Container(id string) *Container {
	for _, c := range t.Containers {
		if c.ID == id && id != "" {
			return c
		}
	}
	return nil
}
