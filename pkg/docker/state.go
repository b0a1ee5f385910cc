package docker

import (
	"errors"
	"maps"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/events"
	"go.uber.org/zap"

	"metad/pkg/task"
)

// recheckShare: after a list, one in recheckShare of the containers that seem unchanged is
// inspected.
const recheckShare = 16

// state stores the containers and the tasks that they make. It processes events, lists and
// findings, and queues containers at the inspector. Its methods belong to one goroutine.
type state struct {
	cfg   *Config
	names *naming
	looks *inspector
	// newborns reads the namespaces of containers that are being started. It does not ask the
	// Engine, which would not answer yet, and does not wait for an inspect that does.
	newborns *inspector
	inode    func(pid int) uint64
	recheck  int // recheckShare

	containers map[string]*tracked
	groups     map[string]map[string]*tracked // by ARN, then container id
	// by ARN: number of created containers that have not been inspected
	announced map[string]int
	dirty     map[string]bool // ARNs to build again
	tasks     map[string]*task.Task
	published []*task.Task // the last set
	renewed   []string     // ARNs of tasks that have changed since, or are gone
	// by id or name of a container: the containers that share its namespace
	guests   map[string]map[string]bool
	unseen   map[string]bool // ids of the first list without a finding yet; nil before the list
	missing  missing
	lists    int
	relist   bool // a list is wanted, for the address of a container that is missing
	restored bool // the state has begun with tasks of an earlier process
	strays   atomic.Uint64
}

// tracked is one container.
type tracked struct {
	id    string
	stats *task.StatsCell
	desc  *description // nil before the first inspect
	// announced is the ARN of the task that it will belong to, until desc says so.
	announced string
	// the task that it is in: its own, or that of the container whose namespace it shares
	home   identity
	ns     *namespace // nil unless it runs in a namespace of its own
	cgroup task.Cgroup
	// process of a container that is being started; 0 once the Engine says that it runs
	newborn  int
	ended    ending     // of its last life
	doubt    doubt      // of its MAC
	restored *task.Task // of an earlier process, which made desc; nil after the first inspect
	warned   bool
}

// ending is the end of one life of a container. An inspect from before the end still shows the
// container as running.
type ending struct {
	startedAt time.Time // identifies the life
	at        time.Time
	code      *int
}

func newState(cfg *Config, names *naming) *state {
	return &state{
		cfg:        cfg,
		names:      names,
		recheck:    recheckShare,
		containers: map[string]*tracked{},
		groups:     map[string]map[string]*tracked{},
		announced:  map[string]int{},
		dirty:      map[string]bool{},
		tasks:      map[string]*task.Task{},
		guests:     map[string]map[string]bool{},
		missing:    missing{},
	}
}

// known returns the input of a look at a container.
func (s *state) known(id string) (*description, int) { return s.containers[id].desc, 0 }

// knownNewborn returns the input of a look at a container that is being started.
func (s *state) knownNewborn(id string) (*description, int) {
	c := s.containers[id]
	return c.desc, c.newborn
}

// container returns the container with the id, new or known.
func (s *state) container(id string) *tracked {
	c := s.containers[id]
	if c == nil {
		c = &tracked{id: id, stats: &task.StatsCell{}}
		s.containers[id] = c
	}
	return c
}

// want queues the container for a look.
func (s *state) want(id string, p priority) *tracked {
	c := s.container(id)
	s.looks.want(id, p)
	return c
}

// event processes an event.
func (s *state) event(m events.Message) {
	if m.Type == events.NetworkEventType {
		id := m.Actor.Attributes["container"]
		// While the Engine starts a container, it connects the networks one by one and
		// answers no inspect. The start event that follows is soon enough.
		if c := s.containers[id]; c != nil && c.desc != nil &&
			(c.desc.container.Running() || c.ns != nil) {
			s.want(id, priorityEvent)
		}
		return
	}
	id := m.Actor.ID
	if id == "" {
		return
	}
	switch m.Action {
	case events.ActionDestroy:
		s.forget(id)
	case events.ActionCreate:
		s.announce(s.want(id, priorityCreated), m.Actor.Attributes)
	case events.ActionDie:
		s.missing.ended(id)
		s.die(id, time.Unix(0, m.TimeNano), m.Actor.Attributes["exitCode"])
		s.want(id, priorityEvent)
	default:
		s.want(id, priorityEvent)
	}
}

// die stores that a container has ended. Another container may have its addresses, or it may start
// again, before an inspect is answered. An old event that comes again says nothing about a
// container that has been started since.
func (s *state) die(id string, at time.Time, code string) {
	c := s.containers[id]
	if c == nil || c.desc == nil || c.desc.container.StartedAt.After(at) {
		return
	}
	c.ended = ending{startedAt: c.desc.container.StartedAt, at: at}
	if n, err := strconv.Atoi(code); err == nil {
		c.ended.code = &n
	}
	c.ns, c.newborn, c.cgroup = nil, 0, task.Cgroup{}
	s.looks.hasEnded(id)
	s.newborns.hasEnded(id)
	s.place(c, c.desc)
}

// after returns d as it is after the end e. d describes the container before it.
func (d *description) after(e ending) *description {
	c := &d.container
	if e.startedAt.IsZero() || !c.StartedAt.Equal(e.startedAt) || !c.Running() {
		return d
	}
	now := *d
	c = &now.container
	c.PID, c.State = 0, "exited"
	c.KnownStatus, c.DesiredStatus = task.StatusStopped, task.StatusStopped
	c.FinishedAt, c.ExitCode = e.at.UTC(), e.code
	// At its next start it may get other addresses.
	c.DockerNetworks = slices.Clone(c.DockerNetworks)
	for i := range c.DockerNetworks {
		c.DockerNetworks[i] = task.DockerNetwork{Name: c.DockerNetworks[i].Name}
	}
	return &now
}

// announce stores that a container of a task was created, by the labels in the event. The inspect
// of the container may be answered only when its program already runs.
func (s *state) announce(c *tracked, attributes map[string]string) {
	if c.desc != nil || c.announced != "" { // a repeated event
		return
	}
	if t, _ := s.names.expect(attributes, attributes["name"]); t != nil {
		c.announced = t.ARN
		s.announced[t.ARN]++
		s.dirty[t.ARN] = true
	}
}

// arrived undoes announce: c is described now, or its inspect has failed.
func (s *state) arrived(c *tracked) {
	if c.announced == "" {
		return
	}
	if s.announced[c.announced]--; s.announced[c.announced] == 0 {
		delete(s.announced, c.announced)
	}
	s.dirty[c.announced] = true
	c.announced = ""
}

// refresh marks the tasks with the ARNs, or all tasks, to be built again.
func (s *state) refresh(arns []string, all bool) {
	if all {
		arns = slices.Collect(maps.Keys(s.groups))
	}
	for _, arn := range arns {
		if s.groups[arn] != nil {
			s.dirty[arn] = true
		}
	}
}

// portsChanged queues the containers to which new or deleted ports may belong. Containers that have
// one of the ports, or wait for one, come at once. Others without a port, which an operator may
// have connected by hand, come in a second, so that on a host where many ports come and go each of
// them is looked at once a second.
func (s *state) portsChanged(ports map[int]bool) {
	for _, c := range s.containers {
		switch {
		case c.desc == nil:
		case c.newborn != 0 && c.desc.startsWithNetwork():
			if c.ns == nil || len(c.ns.endpoints) < c.expects() || c.has(ports) {
				s.newborns.wantNamespace(c.id, priorityStarting)
			}
		case !c.desc.ownNetwork():
		case c.has(ports) || c.desc.awaitsCNI() && (c.ns == nil || !c.ns.ecs):
			s.looks.connected(c.id)
			s.looks.wantNamespace(c.id, priorityEvent)
		case c.ns == nil || len(c.ns.endpoints) == 0:
			s.looks.later(c.id, time.Second)
		}
	}
}

// has reports whether one of the ports is the container's.
func (c *tracked) has(ports map[int]bool) bool {
	return c.ns != nil && slices.ContainsFunc(c.ns.endpoints, func(ep task.Endpoint) bool {
		return ports[ep.Ifindex]
	})
}

// expects returns the number of endpoints that a container has at the end of its start.
func (c *tracked) expects() int { return max(1, len(c.desc.container.DockerNetworks)) }

// born processes a container that is about to run. Its addresses are read now. Its inspect was
// queued when it was created.
func (s *state) born(b newborn) {
	c := s.containers[b.id]
	if c == nil || c.desc != nil && c.desc.container.Running() {
		return
	}
	c.newborn = b.pid
	if c.desc != nil {
		s.newborns.wantNamespace(c.id, priorityStarting)
	}
}

// found processes the finding of a look.
func (s *state) found(f *finding) {
	wanted := s.looks.done(f)
	delete(s.unseen, f.id)
	c := s.containers[f.id]
	if !wanted || c == nil {
		return
	}
	switch {
	case errdefs.IsNotFound(f.err):
		s.forget(c.id)
	case f.err != nil:
		s.arrived(c)
		if c.desc == nil {
			s.relist = s.missing.add(c.id) || s.relist
		}
		s.failed(c, "container not inspected: keeping what is known", f.err)
	default:
		s.described(c, f)
		s.connected(c, f)
	}
}

// described processes the inspect in f, if there is one.
func (s *state) described(c *tracked, f *finding) {
	if f.inspected {
		delete(s.missing, c.id)
		if c.restored != nil &&
			!c.desc.container.StartedAt.Equal(f.desc.container.StartedAt) {
			c.stats = &task.StatsCell{} // its counters have begun at zero
		}
		c.restored = nil
		s.place(c, f.desc)
		if f.desc.labelErr != nil && !c.warned {
			c.warned = true
			s.cfg.Log.Warn("labels ignored: the container is a task of its own",
				zap.String("container", c.id), zap.Error(f.desc.labelErr))
		}
	}
	if c.desc.container.Running() {
		c.newborn = 0
	}
}

// connected processes what f has of c's namespace.
func (s *state) connected(c *tracked, f *finding) {
	s.dirty[c.home.arn] = true
	switch {
	case c.newborn != 0: // the Engine does not report yet that it is being started
		s.newborns.wantNamespace(c.id, priorityStarting)
	case f.outdated:
		c.ns, c.cgroup = nil, task.Cgroup{}
	case f.nsErr != nil:
		s.unreadable(c, f)
	default:
		s.believe(c, f.ns)
		c.settleDoubt(f.ns)
		c.ns, c.cgroup = f.ns, f.cgroup
		s.looks.succeeded(c.id)
		if c.desc.awaitsCNI() && !c.ns.ecs {
			s.looks.await(c.id, priorityEvent, time.Second)
		} else {
			s.looks.connected(c.id)
		}
	}
}

// foundNewborn processes the finding in the namespace of a container that is being started. Docker
// connects the container before the file with its process exists, but since version 28 afterwards
// (moby/moby#51077).
func (s *state) foundNewborn(f *finding) {
	c := s.containers[f.id]
	if !s.newborns.done(f) || c == nil || f.newborn != c.newborn || f.outdated {
		return
	}
	s.dirty[c.home.arn] = true
	s.believe(c, f.ns)
	c.settleDoubt(f.ns)
	c.ns, c.cgroup = f.ns, f.cgroup
	switch {
	case f.nsErr != nil:
		c.newborn = 0 // its program did not begin to run
	case c.desc.startsWithNetwork() && len(c.ns.endpoints) < c.expects():
		s.newborns.await(c.id, priorityStarting, 50*time.Millisecond)
	default:
		s.newborns.connected(c.id)
	}
}

// unreadable is called when the namespace of a running container could not be read. If its process
// is gone, the container has ended, which is no error: an event or the next list will say so.
func (s *state) unreadable(c *tracked, f *finding) {
	inode := s.inode(c.desc.container.PID)
	if c.ns != nil && (inode == 0 || inode != c.ns.inode) {
		c.ns, c.cgroup = nil, task.Cgroup{}
	}
	if inode == 0 || errors.Is(f.nsErr, errNotIts) {
		s.looks.again(c.id)
		return
	}
	s.failed(c, "network namespace not read", f.nsErr)
}

// place gives c its new description and its place in a task.
func (s *state) place(c *tracked, d *description) {
	s.arrived(c)
	s.leave(c)
	c.desc = d.after(c.ended)
	s.enter(c)
}

// enter puts c, and the containers that share its namespace, into c's task.
func (s *state) enter(c *tracked) {
	c.home = s.homeOf(c, 0)
	if s.groups[c.home.arn] == nil {
		s.groups[c.home.arn] = map[string]*tracked{}
	}
	s.groups[c.home.arn][c.id] = c
	s.dirty[c.home.arn] = true
	if host := c.desc.sharesNetworkOf(); host != "" {
		if s.guests[host] == nil {
			s.guests[host] = map[string]bool{}
		}
		s.guests[host][c.id] = true
	}
	s.moveGuests(c)
}

// leave removes c from its task, if it is in one.
func (s *state) leave(c *tracked) {
	if c.home.arn == "" {
		return
	}
	delete(s.groups[c.home.arn], c.id)
	if len(s.groups[c.home.arn]) == 0 {
		delete(s.groups, c.home.arn)
	}
	s.dirty[c.home.arn] = true
	c.home = identity{}
	host := c.desc.sharesNetworkOf()
	if delete(s.guests[host], c.id); len(s.guests[host]) == 0 {
		delete(s.guests, host)
	}
}

// failed queues another look at c for later, and logs the third failure in a row.
func (s *state) failed(c *tracked, message string, err error) {
	if s.looks.failed(c.id) == 3 {
		s.cfg.Log.Warn(message, zap.String("container", c.id), zap.Error(err))
	}
}

// forget drops a container that the Engine no longer has.
func (s *state) forget(id string) {
	delete(s.unseen, id)
	delete(s.missing, id)
	s.looks.forget(id)
	s.newborns.forget(id)
	c := s.containers[id]
	if c == nil {
		return
	}
	s.arrived(c)
	s.leave(c)
	delete(s.containers, id)
	if c.desc != nil {
		s.moveGuests(c)
	}
}
