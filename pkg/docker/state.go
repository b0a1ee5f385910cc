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

// recheckShare: a list has one in so many of the containers inspected that seem unchanged.
const recheckShare = 16

// state is what is known of the containers, and the tasks that they make. It takes in what is heard
// and found, and has the inspector look at what that concerns. Its methods belong to one goroutine.
type state struct {
	cfg   *Config
	names *naming
	looks *inspector
	// newborns looks into the namespaces of containers that are being started, without the
	// Engine, which would not answer yet, and beside the look at the Engine that waits for
	// that.
	newborns *inspector
	inode    func(pid int) uint64
	recheck  int // recheckShare

	containers map[string]*tracked
	groups     map[string]map[string]*tracked // by ARN, then container id
	// by ARN: containers created of which no more is known
	announced map[string]int
	dirty     map[string]bool // ARNs to build again
	tasks     map[string]*task.Task
	published []*task.Task // the last set
	renewed   []string     // ARNs of tasks that have changed since, or are gone
	// by id or name of a container: those that share its namespace
	guests   map[string]map[string]bool
	unseen   map[string]bool // ids of the first list that were not looked at yet; nil before it
	missing  missing
	lists    int
	relist   bool // a list is wanted, for the address of a container that is missing
	restored bool // there is something that an earlier process knew
	strays   atomic.Uint64
}

// tracked is what is known of one container.
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
	// process of a container that is being started; 0 once the Engine has spoken
	newborn  int
	ended    ending     // of its last life
	doubt    doubt      // of its MAC
	restored *task.Task // desc is of an earlier process's; nil since the first inspect
	warned   bool
}

// ending is the end of one life of a container. An inspect that was answered before it says
// otherwise.
type ending struct {
	startedAt time.Time // which life
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

// known is what a look at a container begins with.
func (s *state) known(id string) (*description, int) { return s.containers[id].desc, 0 }

// knownNewborn is what a look at a container that is being started begins with.
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

// want has the container looked at.
func (s *state) want(id string, p priority) *tracked {
	c := s.container(id)
	s.looks.want(id, p)
	return c
}

// event notes what an event calls for.
func (s *state) event(m events.Message) {
	if m.Type == events.NetworkEventType {
		id := m.Actor.Attributes["container"]
		// While a container is being started its networks are connected one by one, and
		// inspecting it has to wait: the start event that follows is soon enough.
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

// die takes note that a container has ended. Its addresses may be another's before an inspect is
// answered, and it may be started again before that. An old event that is told again says nothing
// about a container that has been started since.
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

// after returns what is true of d, which was said of a container's life before it ended, after
// that.
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
	// If it is started again, it may get others.
	c.DockerNetworks = slices.Clone(c.DockerNetworks)
	for i := range c.DockerNetworks {
		c.DockerNetworks[i] = task.DockerNetwork{Name: c.DockerNetworks[i].Name}
	}
	return &now
}

// announce takes note that a container of a task was created, by the labels that the event carries.
// An inspect of it may have to wait until its program runs already.
func (s *state) announce(c *tracked, attributes map[string]string) {
	if c.desc != nil || c.announced != "" { // told again
		return
	}
	if t, _ := s.names.expect(attributes, attributes["name"]); t != nil {
		c.announced = t.ARN
		s.announced[t.ARN]++
		s.dirty[t.ARN] = true
	}
}

// arrived ends what announce began: what c is is known, or will not be soon.
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

// refresh has the tasks with the ARNs built again, or all.
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

// portsChanged looks at the containers that ports that came or went could belong to: at once at
// those that have one of them and at those that wait for one; at others without a port, which
// somebody may connect by hand, in a second, so that a host where many ports come and go has each
// of them looked at once a second.
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

// expects returns how many endpoints a container that is being started has when it is connected.
func (c *tracked) expects() int { return max(1, len(c.desc.container.DockerNetworks)) }

// born takes note of a container that is about to run. Its addresses are read now; what the Engine
// says of it has been asked for when it was created.
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

// found takes in what a look has found.
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

// described takes in what the Engine says of c.
func (s *state) described(c *tracked, f *finding) {
	if f.inspected {
		delete(s.missing, c.id)
		if c.restored != nil &&
			!c.desc.container.StartedAt.Equal(f.desc.container.StartedAt) {
			c.stats = &task.StatsCell{} // its counters have begun anew
		}
		c.restored = nil
		s.place(c, f.desc)
		if f.desc.labelErr != nil && !c.warned {
			c.warned = true
			s.cfg.Log.Warn("labels not believed: the container is a task of its own",
				zap.String("container", c.id), zap.Error(f.desc.labelErr))
		}
	}
	if c.desc.container.Running() {
		c.newborn = 0
	}
}

// connected takes in what was found in c's namespace.
func (s *state) connected(c *tracked, f *finding) {
	s.dirty[c.home.arn] = true
	switch {
	case c.newborn != 0: // the Engine does not know yet that it is being started
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

// foundNewborn takes in what was found in the namespace of a container that is being started.
// Docker connects it before the file with its process is there, but since version 28 afterwards
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
		c.newborn = 0 // it has never come to run
	case c.desc.startsWithNetwork() && len(c.ns.endpoints) < c.expects():
		s.newborns.await(c.id, priorityStarting, 50*time.Millisecond)
	default:
		s.newborns.connected(c.id)
	}
}

// unreadable takes note that the namespace of a running container could not be read. If its process
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

// enter puts c into its task, and those that share its namespace with it.
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

// leave takes c out of its task, if it is in one.
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

// failed has c looked at again later.
func (s *state) failed(c *tracked, message string, err error) {
	if s.looks.failed(c.id) == 3 {
		s.cfg.Log.Warn(message, zap.String("container", c.id), zap.Error(err))
	}
}

// forget drops a container that the Engine does not have any more.
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
