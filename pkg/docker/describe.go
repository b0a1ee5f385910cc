package docker

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/docker/docker/api/types/container"

	"metad/pkg/task"
)

// Labels that Docker Compose sets on every container of a project.
const (
	labelComposeProject = "com.docker.compose.project"
	labelComposeService = "com.docker.compose.service"
)

// Names that the agent gives the containers it adds to a task, found in the label container-name.
const (
	// holds shared PID and IPC namespaces
	namespacePauseName = task.PauseName + "~namespace"
	// Service Connect in bridge mode: one for each container
	bridgePausePrefix   = task.PauseName + "-"
	emptyHostVolumeName = "~internal~ecs-emptyvolume-source" // owns the task's empty volumes
)

// maxHealthOutput is how much of a health check's output is kept, in bytes; the agent's limit.
const maxHealthOutput = 1024

// identity is the task that a container belongs to, as far as its own inspect shows.
type identity struct {
	arn      string // what makes two containers one task
	id       string
	cluster  string
	family   string
	revision string
}

// description is the converted inspect of one container. Shared and immutable.
type description struct {
	identity
	// Stats and Networks not filled in; statuses as without a look into the namespace
	container task.Container
	labelErr  error // why its labels were not believed
	alone     bool  // no label says which task it belongs to
	extras
}

// ownNetwork reports whether the container has a network namespace that is neither the host's nor
// another container's.
func (d *description) ownNetwork() bool {
	mode := d.container.NetworkMode
	return d.container.Running() && mode != "host" && !strings.HasPrefix(mode, "container:")
}

// startsWithNetwork reports whether the container does not run and will be connected by Docker when
// it is started.
func (d *description) startsWithNetwork() bool {
	mode := d.container.NetworkMode
	return !d.container.Running() && mode != "host" && mode != "none" &&
		!strings.HasPrefix(mode, "container:")
}

// awaitsCNI reports whether another program than Docker connects the container's namespace: it is
// the pause container of a task in awsvpc mode.
func (d *description) awaitsCNI() bool {
	return d.ownNetwork() && d.container.NetworkMode == "none" &&
		d.container.Type == task.TypeCNIPause
}

// describe converts an inspect into a description. health is that of the container's last
// description, nil if there was none. now is the time of a change of it.
func describe(inspect *container.InspectResponse, names *naming, health *task.Health,
	now time.Time) (*description, error) {
	base := inspect.ContainerJSONBase
	if base == nil || base.ID == "" || base.State == nil {
		return nil, fmt.Errorf("inspect answered without an id or a state")
	}
	state := base.State
	d := &description{}
	c := &d.container
	*c = task.Container{
		ID:           base.ID,
		DockerName:   strings.TrimPrefix(base.Name, "/"),
		ImageID:      base.Image,
		KnownStatus:  knownStatus(state),
		Limits:       task.ContainerLimits{CPU: 2},
		CreatedAt:    parseTime(base.Created),
		StartedAt:    parseTime(state.StartedAt),
		Type:         task.TypeNormal,
		Health:       healthAfter(health, state.Health, now),
		State:        state.Status,
		RestartCount: base.RestartCount,
	}
	if inspect.Config != nil {
		c.Image = inspect.Config.Image
		c.Labels = inspect.Config.Labels
		c.EndpointID = endpointID(inspect.Config.Env)
		for _, v := range inspect.Config.Env {
			if strings.HasPrefix(v, metadataPrefix) {
				c.MetadataEnv = append(c.MetadataEnv, v)
			}
		}
	}
	if host := base.HostConfig; host != nil {
		// The agent shows the container definition's value, and 2 for any value below 2.
		c.Limits = task.ContainerLimits{CPU: max(host.CPUShares, 2),
			Memory: host.Memory >> 20}
		c.NetworkMode = string(host.NetworkMode)
	}
	if state.Running {
		c.PID = state.Pid
	} else if finished := parseTime(state.FinishedAt); !finished.IsZero() {
		code := state.ExitCode
		c.FinishedAt, c.ExitCode = finished, &code
	}
	d.extras = describeExtras(c, inspect.Config, base.HostConfig)
	if n := inspect.NetworkSettings; n != nil {
		c.Ports = ports(n)
		for _, name := range slices.Sorted(maps.Keys(n.Networks)) {
			if ep := n.Networks[name]; ep != nil {
				c.DockerNetworks = append(c.DockerNetworks,
					describeNetwork(c, name, ep, d.dns))
			}
		}
	}
	for _, m := range inspect.Mounts {
		c.Volumes = append(c.Volumes, task.Volume{DockerName: m.Name, Source: m.Source,
			Destination: m.Destination})
	}
	// Docker keeps mounts in a map: their order differs from one inspect to the next.
	slices.SortFunc(c.Volumes, func(a, b task.Volume) int {
		return cmp.Or(cmp.Compare(a.Destination, b.Destination),
			cmp.Compare(a.Source, b.Source))
	})
	d.identify(names)
	if c.Type == task.TypeCNIPause || c.Type == task.TypeNamespacePause {
		c.ImageID = "" // the agent never pulls its image
	}
	c.DesiredStatus = task.StatusRunning
	switch {
	case c.KnownStatus == task.StatusStopped:
		c.DesiredStatus = task.StatusStopped
	case c.Type == task.TypeCNIPause:
		c.DesiredStatus = task.StatusResourcesProvisioned
	}
	return d, nil
}

// endpointID returns the id that the agent gave the container for versions 3 and 4 of the
// endpoint, the last part of both addresses.
func endpointID(env []string) string {
	for _, v := range env {
		for _, name := range []string{"ECS_CONTAINER_METADATA_URI=",
			"ECS_CONTAINER_METADATA_URI_V4="} {
			if uri, ok := strings.CutPrefix(v, name); ok {
				if id := uri[strings.LastIndexByte(uri, '/')+1:]; id != "self" &&
					idPattern.MatchString(id) {
					return id
				}
			}
		}
	}
	return ""
}

// identify returns the container's task and its name in it. The first of these that applies: the
// agent's labels, Compose's labels, a task of its own.
func (d *description) identify(names *naming) {
	c := &d.container
	if arn, ok := c.Labels[task.LabelTaskARN]; ok {
		id, err := parseTaskARN(arn)
		name := c.Labels[task.LabelContainerName]
		if err == nil && !printable(name) {
			err = fmt.Errorf("container name %s", quote(name))
		}
		if err == nil {
			d.identity = identity{arn: arn, id: id,
				cluster:  cmp.Or(c.Labels[task.LabelCluster], names.cluster),
				family:   c.Labels[task.LabelFamily],
				revision: revision(c.Labels[task.LabelRevision])}
			c.Name = name
			c.Type = containerType(name)
			return
		}
		d.labelErr = err
	} else if project, ok := c.Labels[labelComposeProject]; ok {
		service := c.Labels[labelComposeService]
		if idPattern.MatchString(project) && printable(service) {
			d.identity = names.made(project, project)
			d.madeUp, d.service = true, service
			c.Name = service
			return
		}
		d.labelErr = fmt.Errorf("project %s of Compose, service %s", quote(project),
			quote(service))
	}
	d.alone = true
	// an ECS task's id is 32 hex digits too
	d.identity = names.made(c.ID[:min(32, len(c.ID))], c.DockerName)
	d.madeUp = true
	c.Name = c.DockerName
}

// naming makes the ARNs of tasks that ECS does not know.
type naming struct {
	cluster string
	prefix  string // "arn:aws:ecs:<region>:<account>:task/<cluster name>/"
}

func newNaming(region, account, cluster string) *naming {
	// the agent takes a cluster's ARN as well as its name
	name := cluster[strings.LastIndexByte(cluster, '/')+1:]
	return &naming{cluster: cluster, prefix: fmt.Sprintf("arn:aws:ecs:%s:%s:task/%s/", region,
		account, name)}
}

func (n *naming) made(id, family string) identity {
	return identity{arn: n.prefix + id, id: id, cluster: n.cluster,
		family: unsafeInFamily.ReplaceAllString(family, "_"), revision: "1"}
}

var (
	// idPattern is the form of a task's id or an endpoint id, which become part of paths and of
	// logs.
	idPattern      = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
	arnPartPattern = regexp.MustCompile(`^[A-Za-z0-9_./-]*$`)
	unsafeInFamily = regexp.MustCompile(`[^A-Za-z0-9_-]`)
)

// parseTaskARN returns the last part of
// "arn:<partition>:ecs:<region>:<account>:task/[<cluster>/]<id>".
func parseTaskARN(arn string) (id string, err error) {
	parts := strings.Split(arn, ":")
	if len(parts) != 6 || parts[0] != "arn" || parts[2] != "ecs" {
		return "", fmt.Errorf("task ARN %s: not an ARN of ECS", quote(arn))
	}
	for _, part := range parts {
		if !arnPartPattern.MatchString(part) {
			return "", fmt.Errorf("task ARN %s: unexpected characters", quote(arn))
		}
	}
	resource := strings.Split(parts[5], "/")
	if resource[0] != "task" || len(resource) < 2 || len(resource) > 3 {
		return "", fmt.Errorf("task ARN %s: not a task's", quote(arn))
	}
	for _, part := range resource[1:] {
		if !idPattern.MatchString(part) {
			return "", fmt.Errorf("task ARN %s: unexpected id or cluster", quote(arn))
		}
	}
	return resource[len(resource)-1], nil
}

// quote makes any label safe for a log line.
func quote(label string) string {
	const most = 100
	if len(label) > most {
		return fmt.Sprintf("%q… (%d bytes)", label[:most], len(label))
	}
	return strconv.Quote(label)
}

// printable reports whether a container name from a label is a plausible one.
func printable(name string) bool {
	return name != "" && len(name) <= 255 && utf8.ValidString(name) &&
		!strings.ContainsFunc(name, func(r rune) bool {
			return r < ' ' || r == 0x7f || r == utf8.RuneError
		})
}

// revision returns text if it is a number: clients read it as one.
func revision(text string) string {
	if _, err := strconv.ParseUint(text, 10, 32); err != nil {
		return "1"
	}
	return text
}

func containerType(name string) task.ContainerType {
	switch {
	case name == namespacePauseName:
		return task.TypeNamespacePause
	case name == task.PauseName, strings.HasPrefix(name, bridgePausePrefix):
		return task.TypeCNIPause
	case name == emptyHostVolumeName:
		return task.TypeEmptyHostVolume
	}
	return task.TypeNormal
}

// knownStatus reads Docker's state as the agent does. A pause container's running is not decided
// here.
func knownStatus(s *container.State) task.Status {
	switch {
	case s.Running: // paused and restarting included
		return task.StatusRunning
	case !s.Dead && s.Error == "" && parseTime(s.StartedAt).IsZero():
		return task.StatusCreated
	}
	return task.StatusStopped
}

// healthAfter returns the health to show after the one that was shown before. Like the agent it
// takes a verdict when the verdict changes, with the time of its own clock, and none while
// Docker's status is "starting".
func healthAfter(before *task.Health, h *container.Health, now time.Time) *task.Health {
	if h == nil || h.Status == "" || h.Status == container.NoHealthcheck {
		return nil
	}
	if before == nil {
		before = &task.Health{}
	}
	status := map[string]string{container.Healthy: "HEALTHY",
		container.Unhealthy: "UNHEALTHY"}[h.Status]
	if status == "" || status == before.Status {
		return before
	}
	after := &task.Health{Status: status, Since: now.UTC().Round(0)}
	if since := loggedSince(h, status); before.Status == "" && !since.IsZero() {
		after.Since = since // a verdict from before metad was started, perhaps
	}
	if n := len(h.Log); n > 0 && h.Log[n-1] != nil {
		last := h.Log[n-1]
		after.Output = truncate(last.Output, maxHealthOutput)
		if status == "UNHEALTHY" {
			after.ExitCode = last.ExitCode
		}
	}
	return after
}

// loggedSince returns the end of the first check of the last row of equal results; zero if the log
// does not show it. Docker keeps five checks.
func loggedSince(h *container.Health, status string) (since time.Time) {
	for _, check := range slices.Backward(h.Log) {
		if check == nil || (check.ExitCode == 0) != (status == "HEALTHY") {
			break
		}
		since = check.End.UTC().Round(0)
	}
	return since
}

// truncate returns at most n bytes of s, and no part of a character.
func truncate(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// ports lists the bindings that exist, one for each host address.
func ports(n *container.NetworkSettings) (list []task.Port) {
	for port, bindings := range n.Ports {
		for _, b := range bindings {
			host, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil {
				continue
			}
			list = append(list, task.Port{ContainerPort: uint16(port.Int()),
				Protocol: port.Proto(), HostPort: uint16(host), HostIP: b.HostIP})
		}
	}
	slices.SortFunc(list, func(a, b task.Port) int {
		return cmp.Or(cmp.Compare(a.ContainerPort, b.ContainerPort),
			cmp.Compare(a.Protocol, b.Protocol),
			cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.HostIP, b.HostIP))
	})
	return list
}

// parseTime returns the zero time for Docker's forms of no time: empty text or the year 1.
func parseTime(text string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil || t.Year() <= 1 {
		return time.Time{}
	}
	return t.UTC()
}
