package task

import (
	"encoding/json"
	"math"
	"time"
)

// The documents are what the ECS agent's v2 handlers send (ecs-agent/tmds/handlers/v2/response.go),
// member by member and in that order. They are made by encoding/json, as the agent's are, so that
// escaping, numbers and times agree by construction; rendering happens when a task changes, never
// when it is asked for.

// {"Cluster": text, "TaskARN": ARN, "Family": text, "Revision": "7", "DesiredStatus": status, …}
type taskDocument struct {
	Cluster            string
	TaskARN            string
	Family             string
	Revision           string
	DesiredStatus      Status `json:",omitempty"`
	KnownStatus        Status
	Containers         []containerDocument `json:",omitempty"`
	Limits             *taskLimitsDocument `json:",omitempty"`
	PullStartedAt      *time.Time          `json:",omitempty"`
	PullStoppedAt      *time.Time          `json:",omitempty"`
	ExecutionStoppedAt *time.Time          `json:",omitempty"`
	AvailabilityZone   string              `json:",omitempty"`
}

// {"CPU": vCPU, "Memory": MiB}
type taskLimitsDocument struct {
	CPU    float64 `json:",omitempty"`
	Memory int64   `json:",omitempty"`
}

// {"DockerId": 64 hex digits, "Name": text, …, "Limits": {"CPU": units, "Memory": MiB}, …}
type containerDocument struct {
	DockerId      string //nolint:staticcheck // the name on the wire
	Name          string
	DockerName    string
	Image         string
	ImageID       string
	Ports         []portDocument    `json:",omitempty"`
	Labels        map[string]string `json:",omitempty"`
	DesiredStatus Status
	KnownStatus   Status
	ExitCode      *int `json:",omitempty"` // 0 is printed
	Limits        containerLimitsDocument
	CreatedAt     *time.Time `json:",omitempty"`
	StartedAt     *time.Time `json:",omitempty"`
	FinishedAt    *time.Time `json:",omitempty"`
	Type          ContainerType
	Networks      []networkDocument `json:",omitempty"`
	Health        *healthDocument   `json:",omitempty"` // {} before the first verdict
	Volumes       []volumeDocument  `json:",omitempty"`
}

// {"CPU": units, "Memory": MiB}: integers, and always both, or real clients choke.
type containerLimitsDocument struct {
	CPU    int64
	Memory int64
}

type portDocument struct {
	ContainerPort uint16 `json:",omitempty"`
	Protocol      string `json:",omitempty"`
	HostPort      uint16 `json:",omitempty"`
}

type networkDocument struct {
	NetworkMode   string   `json:",omitempty"`
	IPv4Addresses []string `json:",omitempty"`
	IPv6Addresses []string `json:",omitempty"`
}

type healthDocument struct {
	Status   string     `json:"status,omitempty"`
	Since    *time.Time `json:"statusSince,omitempty"`
	ExitCode int        `json:"exitCode,omitempty"`
	Output   string     `json:"output,omitempty"`
}

type volumeDocument struct {
	DockerName  string `json:",omitempty"`
	Source      string `json:",omitempty"`
	Destination string `json:",omitempty"`
}

// minCPUUnits is what the agent prints for a container whose CPU limit is below it, unset included.
const minCPUUnits = 2

// AppendTask appends t's v2 metadata document to dst, as GET /v2/metadata answers it. A container
// that is only pulled is not in it: Docker knows no such container yet.
func AppendTask(dst []byte, t *Task) []byte {
	d := taskDocument{
		Cluster:            t.Cluster,
		TaskARN:            t.ARN,
		Family:             t.Family,
		Revision:           t.Revision,
		DesiredStatus:      t.DesiredStatus,
		KnownStatus:        t.KnownStatus,
		PullStartedAt:      shownTime(t.PullStartedAt),
		PullStoppedAt:      shownTime(t.PullStoppedAt),
		ExecutionStoppedAt: shownTime(t.ExecutionStoppedAt),
		AvailabilityZone:   t.AvailabilityZone,
	}
	limits := taskLimitsDocument(t.Limits)
	if math.IsNaN(limits.CPU) || math.IsInf(limits.CPU, 0) { // no JSON number: as good as none
		limits.CPU = 0
	}
	if limits != (taskLimitsDocument{}) {
		d.Limits = &limits
	}
	for _, c := range t.Containers {
		if c.ID != "" || c.KnownStatus != StatusPulled {
			d.Containers = append(d.Containers, newContainerDocument(c))
		}
	}
	return appendJSON(dst, d)
}

// AppendContainer appends c's v2 metadata document to dst, as GET /v2/metadata/<id> answers it: the
// same bytes as c's element in its task's document.
func AppendContainer(dst []byte, c *Container) []byte {
	return appendJSON(dst, newContainerDocument(c))
}

func newContainerDocument(c *Container) containerDocument {
	d := containerDocument{
		DockerId:      c.ID,
		Name:          c.Name,
		DockerName:    c.DockerName,
		Image:         c.Image,
		ImageID:       c.ImageID,
		Labels:        c.Labels,
		DesiredStatus: c.DesiredStatus,
		KnownStatus:   c.KnownStatus,
		ExitCode:      c.ExitCode,
		Limits:        containerLimitsDocument{CPU: max(c.Limits.CPU, minCPUUnits), Memory: c.Limits.Memory},
		CreatedAt:     shownTime(c.CreatedAt),
		StartedAt:     shownTime(c.StartedAt),
		FinishedAt:    shownTime(c.FinishedAt),
		Type:          c.Type,
	}
	for _, p := range c.Ports {
		if len(c.Networks) > 0 { // the task has an interface of its own: nothing is mapped
			p.HostPort = p.ContainerPort
		}
		d.Ports = append(d.Ports, portDocument{p.ContainerPort, p.Protocol, p.HostPort})
	}
	for _, n := range c.Networks {
		d.Networks = append(d.Networks, networkDocument{n.Mode, n.IPv4Addresses, n.IPv6Addresses})
	}
	if h := c.Health; h != nil {
		d.Health = &healthDocument{h.Status, shownTime(h.Since), h.ExitCode, h.Output}
	}
	for _, v := range c.Volumes {
		d.Volumes = append(d.Volumes, volumeDocument(v))
	}
	return d
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

// appendJSON appends v, all of whose values have a JSON form.
func appendJSON(dst []byte, v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return append(dst, b...)
}
