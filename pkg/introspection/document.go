package introspection

import (
	"time"

	"metad/pkg/task"
)

// {"Arn": ARN, "DesiredStatus": status, "KnownStatus": status, "Family": text, "Version": "7",
// "Containers": […]}
type taskDocument struct {
	Arn           string
	DesiredStatus string `json:",omitempty"`
	KnownStatus   string
	Family        string
	Version       string
	Containers    []containerDocument
}

// {"DockerId": 64 hex digits, "DockerName": text, "Name": text, "Image": text, "ImageID": text, …}
type containerDocument struct {
	DockerId     string //nolint:staticcheck // the name on the wire
	DockerName   string
	Name         string
	Image        string
	ImageID      string
	CreatedAt    *time.Time        `json:",omitempty"`
	StartedAt    *time.Time        `json:",omitempty"`
	Ports        []portDocument    `json:",omitempty"`
	Networks     []networkDocument `json:",omitempty"`
	Volumes      []volumeDocument  `json:",omitempty"`
	RestartCount int               `json:",omitempty"`
}

type portDocument struct {
	ContainerPort uint16
	Protocol      string
	HostPort      uint16 `json:",omitempty"`
}

type networkDocument struct {
	NetworkMode   string   `json:",omitempty"`
	IPv4Addresses []string `json:",omitempty"`
	IPv6Addresses []string `json:",omitempty"`
}

type volumeDocument struct {
	DockerName  string `json:",omitempty"`
	Source      string `json:",omitempty"`
	Destination string `json:",omitempty"`
}

// newTask returns t as the agent's API shows it, without the agent's internal containers.
func newTask(t *task.Task) taskDocument {
	d := taskDocument{Arn: t.ARN, DesiredStatus: backendStatus(t.DesiredStatus),
		KnownStatus: backendStatus(t.KnownStatus),
		Family:      t.Family, Version: t.Revision, Containers: []containerDocument{}}
	for _, c := range t.Containers {
		if c.ID != "" && c.Type == task.TypeNormal {
			d.Containers = append(d.Containers, newContainer(c))
		}
	}
	return d
}

// backendStatus returns s as one of the three statuses of the ECS API.
func backendStatus(s task.Status) string {
	switch s {
	case task.StatusRunning, task.StatusStopped:
		return string(s)
	}
	return "PENDING"
}

func newContainer(c *task.Container) containerDocument {
	d := containerDocument{DockerId: c.ID, DockerName: c.DockerName, Name: c.Name,
		Image: c.Image, ImageID: c.ImageID,
		CreatedAt: shown(c.CreatedAt), StartedAt: shown(c.StartedAt),
		RestartCount: c.RestartCount}
	for _, p := range c.Ports {
		d.Ports = append(d.Ports, portDocument{p.ContainerPort, p.Protocol, p.HostPort})
	}
	for _, n := range c.Networks {
		d.Networks = append(d.Networks, networkDocument{n.Mode, n.IPv4Addresses,
			n.IPv6Addresses})
	}
	if len(c.Networks) == 0 {
		for _, n := range c.DockerNetworks {
			d.Networks = append(d.Networks, networkDocument{n.Name,
				addresses(n.IPAddress), addresses(n.IPv6Address)})
		}
	}
	for _, v := range c.Volumes {
		d.Volumes = append(d.Volumes, volumeDocument(v))
	}
	return d
}

// addresses is a list of addr, empty if there is none.
func addresses(addr string) []string {
	if addr == "" {
		return nil
	}
	return []string{addr}
}

// shown returns t in UTC; nil if t is zero or RFC 3339 has no form for it.
func shown(t time.Time) *time.Time {
	t = t.UTC()
	if t.IsZero() || t.Year() < 0 || t.Year() > 9999 {
		return nil
	}
	return &t
}
