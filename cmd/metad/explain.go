package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"metad/bpf"
	"metad/pkg/doctor"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// situation is what metad knows at one moment of everything between a container and its answer.
type situation struct {
	docker  bool  // the Engine's events are followed
	packets error // why packets for the endpoint are not taken, else nil
	views   []*lookup.View
	entries map[netip.Addr]bpf.TaskValue
	ports   []loader.Port
	// bridge "": the device is no bridge's port
	device func(ifindex int) (name, bridge string)
	holder func(endpointID string) *lookup.ContainerView // nil: nobody's, or two hold it
	events []event                                       // of refused and unknown sources
	agent  agentState
	now    time.Time
}

// agentState is how the ECS agent's port was found.
type agentState string

// States of the ECS agent's port.
const (
	agentOff     agentState = "off"
	agentNone    agentState = "none"
	agentForeign agentState = "foreign"
	agentSilent  agentState = "silent"
	agentThere   agentState = "answers"
)

// explanation is made step by step.
type explanation struct {
	situation
	steps doctor.Report
}

func (e *explanation) ok(name, found string, args ...any) {
	e.steps = append(e.steps, doctor.Check{Name: name, Found: fmt.Sprintf(found, args...)})
}

func (e *explanation) bad(status doctor.Status, name, do, found string, args ...any) {
	e.steps = append(e.steps, doctor.Check{Name: name, Status: status, Found: fmt.Sprintf(found,
		args...), Do: do})
}

// explain returns everything between what and its answer. what is a container, by its id, the
// beginning of it, or a name; or an address.
func explain(what string, s situation) doctor.Report {
	e := &explanation{situation: s}
	if s.docker {
		e.ok("docker", "its events are followed")
	} else {
		e.bad(doctor.Warn, "docker",
			"start the Engine, or see its log; metad doctor says what it finds there",
			"the Engine is away: what metad knew before is answered, new containers "+
				"are not known")
	}
	if s.packets != nil {
		e.bad(doctor.Fail, "metad", "see metad's log, and metad doctor",
			"takes no packets: %v",
			s.packets)
	} else {
		e.ok("metad", "takes packets for the endpoint")
	}
	addr, err := netip.ParseAddr(what)
	if err == nil {
		e.address(addr)
		return e.steps
	}
	v, c := e.find(what)
	if c == nil {
		do := "see docker ps: it may have another name, or not run"
		if !s.docker {
			do = "it is known when the Docker Engine answers again"
		}
		e.bad(doctor.Fail, "container", do, "metad knows no container %q", what)
		return e.steps
	}
	e.container(v, c)
	return e.steps
}

// find returns the container that what names, a running one if there is one, and its task.
func (e *explanation) find(what string) (view *lookup.View, found *lookup.ContainerView) {
	const leastOfID = 4
	for _, v := range e.views {
		for i := range v.Containers {
			c := &v.Containers[i]
			named := c.DockerName == what || c.Name == what ||
				len(what) >= leastOfID && strings.HasPrefix(c.ID, what)
			if named && (found == nil || !found.Running() && c.Running()) {
				view, found = v, c
			}
		}
	}
	return view, found
}

// address explains an address.
func (e *explanation) address(addr netip.Addr) {
	for _, v := range e.views {
		for _, ep := range v.Task.Endpoints {
			if ep.Addr != addr {
				continue
			}
			c := v.Container([]byte(ep.Container))
			if c == nil {
				c = v.Only(addr)
			}
			if c != nil {
				e.container(v, c)
				return
			}
			e.ok("task", "%s (%s)", v.Task.ID, v.Task.Family)
			e.endpoint(v, ep)
			e.drops(ep)
			return
		}
	}
	const name = "address"
	seen := ""
	for _, d := range e.events {
		if d.Addr == addr.String() {
			seen = fmt.Sprintf("it asked at %s, at %s%s", d.Time.Format(time.TimeOnly),
				d.Device, of(d.Task))
		}
	}
	if seen == "" {
		seen = "metad does not remember that it asked"
	}
	e.bad(doctor.Fail, name, "see metad tasks for the addresses that are known",
		"%s is no task's; %s", addr, seen)
	e.refused(func(d event) bool { return d.Addr == addr.String() })
}

// container explains one of v's containers.
func (e *explanation) container(v *lookup.View, c *lookup.ContainerView) {
	e.ok("container", "%s %.12s of task %s (%s), %s", c.DockerName, c.ID, v.Task.ID,
		v.Task.Family,
		c.KnownStatus)
	if !c.Running() {
		e.bad(doctor.Fail, "container", "start it", "it does not run")
	}
	switch {
	case len(v.Task.Endpoints) > 0:
		for _, ep := range v.Task.Endpoints {
			if ep.Container == "" || ep.Container == c.ID ||
				len(v.Task.Endpoints) == 1 ||
				c.NetworkMode == "container:"+ep.Container {
				e.endpoint(v, ep)
				e.drops(ep)
			}
		}
	case c.NetworkMode == "host":
		e.ok("address",
			"the host's: it asks by the host's route, and is known by its cgroup")
	default:
		e.bad(doctor.Fail, "address", "give it a network of a bridge that metad watches",
			"none: network mode %q, or metad has not looked into it yet", c.NetworkMode)
	}
	e.endpointID(c)
	e.theAgent()
	e.answer(v, c)
}

// endpoint explains the way from one address of v's.
func (e *explanation) endpoint(v *lookup.View, ep task.Endpoint) {
	name, bridge := e.device(ep.Ifindex)
	e.ok("address", "%s, MAC %s", ep.Addr, macText(ep.MAC))
	var port *loader.Port
	for i := range e.ports {
		if e.ports[i].Ifindex == ep.Ifindex {
			port = &e.ports[i]
		}
	}
	switch {
	case name == "":
		e.bad(doctor.Fail, "port", "restart the container", "device %d is gone", ep.Ifindex)
	case bridge == "":
		e.bad(doctor.Fail, "port", "its requests go to the ECS agent, or are refused",
			"%s is no bridge's port", name)
	case port == nil:
		e.bad(doctor.Fail, "port", fmt.Sprintf("add %q to --bridges", bridge),
			"%s is a port of bridge %q, which metad does not watch: requests are "+
				"refused, or go to the ECS agent", name, bridge)
	case port.Err != nil:
		e.bad(doctor.Fail, "port", "see metad doctor", "%s of bridge %q has no program: %v",
			name,
			bridge, port.Err)
	default:
		e.ok("port", "%s of bridge %q, with metad's program", name, bridge)
	}
	entry, ok := e.entries[ep.Addr]
	switch {
	case !ok:
		e.bad(doctor.Fail, "map",
			"see metad's log: another task claims it, or the map is full",
			"the kernel's map has no entry for %s", ep.Addr)
	case entry.Tag != v.Tag || entry.Ifindex != uint32(ep.Ifindex) || entry.Mac != ep.MAC:
		e.bad(doctor.Fail, "map",
			"another task claims the address: see metad's log for which",
			"the kernel's map gives %s to tag %d at device %d, MAC %s", ep.Addr,
			entry.Tag, entry.Ifindex,
			macText(entry.Mac))
	default:
		e.ok("map", "%s → tag %d, device %d", ep.Addr, entry.Tag, entry.Ifindex)
	}
}

// drops explains what was dropped lately at an endpoint, or with its address elsewhere.
func (e *explanation) drops(ep task.Endpoint) {
	e.refused(func(d event) bool {
		return d.Ifindex == ep.Ifindex || d.Addr == ep.Addr.String()
	})
}

// refused explains the packets that were dropped lately and are meant, those of one kind together.
func (e *explanation) refused(meant func(event) bool) {
	type kind struct {
		verdict, addr, mac string
		ifindex            int
	}
	last, count := map[kind]event{}, map[kind]uint64{}
	var order []kind
	for _, d := range e.events {
		if !d.refused() || !meant(d) {
			continue
		}
		k := kind{d.Verdict, d.Addr, d.MAC, d.Ifindex}
		if count[k] == 0 {
			order = append(order, k)
		}
		last[k] = d
		count[k]++
	}
	for _, k := range order {
		d := last[k]
		e.bad(doctor.Warn, "dropped",
			"a container must send from its own address and MAC: look at what runs "+
				"in it",
			"from %s, MAC %s, at %s%s: %s (%d times noted, last at %s)", d.Addr, d.MAC,
			d.Device, of(d.Task),
			strings.TrimPrefix(meanings[d.Verdict], "DROPPED: "), count[k],
			d.Time.Format(time.TimeOnly))
	}
	if order == nil {
		e.ok("dropped", "nothing of it, as far as metad remembers")
	}
}

func of(task string) string {
	if task == "" {
		return ""
	}
	return " of task " + task
}

// endpointID explains the id in the variables of c.
func (e *explanation) endpointID(c *lookup.ContainerView) {
	const name = "endpoint id"
	if c.EndpointID == "" {
		e.ok(name, "none: it asks for /v2, /v3 or /v4 without an id")
		return
	}
	if h := e.holder(c.EndpointID); h != nil && h.ID == c.ID {
		e.ok(name, "%s, its own", c.EndpointID)
		return
	}
	var others []string
	for _, v := range e.views {
		for i := range v.Containers {
			if o := &v.Containers[i]; o.EndpointID == c.EndpointID && o.ID != c.ID {
				others = append(others, o.DockerName)
			}
		}
	}
	if others == nil {
		e.bad(doctor.Warn, name, "wait, or see metad's log", "%s is not answered",
			c.EndpointID)
		return
	}
	e.bad(doctor.Fail, name,
		"create one of them anew without ECS_CONTAINER_METADATA_URI and "+
			"ECS_CONTAINER_METADATA_URI_V4 in its environment",
		"%s is copied: %s has it too, and it is answered to neither", c.EndpointID,
		strings.Join(others,
			", "))
}

// theAgent explains what the ECS agent's port is like.
func (e *explanation) theAgent() {
	const name = "agent"
	switch e.agent {
	case agentOff:
		e.ok(name, "switched off (--agent-url)")
	case agentNone:
		e.ok(name, "none listens: what metad does not serve is answered 404")
	case agentForeign:
		e.bad(doctor.Warn, name, "end what listens there: ss -ltnp shows it",
			"the ECS agent's port belongs to another user of the host: nothing is "+
				"passed on, credentials are answered 404")
	case agentSilent:
		e.bad(doctor.Warn, name, "restart the ECS agent, or see its log",
			"it takes connections and does not answer: credentials are not "+
				"answered, metadata is metad's own")
	default:
		e.ok(name, "it answers: credentials, and metadata of the containers that it "+
			"started, are its own")
	}
}

// answer explains what c would get now.
func (e *explanation) answer(v *lookup.View, c *lookup.ContainerView) {
	e.ok("answer", "/v4/task: %d bytes of metad's own; its container: %d",
		v.Document(task.V4).Len(),
		c.Document(task.V4).Len())
	const name = "statistics"
	if c.Stats == nil {
		return
	}
	if s := c.Stats.Load(); s != nil {
		e.ok(name, "%d bytes, read %s ago", len(s.JSON),
			e.now.Sub(s.Read).Round(time.Millisecond))
	} else {
		e.bad(doctor.Warn, name, "see metad's log, if this lasts", "no sample yet")
	}
}

var errNothing = errors.New("want a container or an address")
