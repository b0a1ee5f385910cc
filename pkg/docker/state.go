package docker

import (
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"go.uber.org/zap"

	"metad/pkg/task"
)

// recheckShare: a list has one in so many of the containers inspected that seem unchanged.
const recheckShare = 16

// state is what is known of the containers, and the tasks that they make. It takes in what is heard and
// found, and has the inspector look at what that concerns. Its methods belong to one goroutine.
type state struct {
	cfg     *Config
	names   *naming
	looks   *inspector
	inode   func(pid int) uint64
	recheck int // recheckShare

	containers map[string]*tracked
	groups     map[string]map[string]*tracked // by ARN, then container id
	announced  map[string]int                 // by ARN: containers created of which no more is known
	dirty      map[string]bool                // ARNs to build again
	tasks      map[string]*task.Task
	unseen     map[string]bool // ids of the first list that were not looked at yet; nil before it
	lists      int
}

// tracked is what is known of one container.
type tracked struct {
	id    string
	stats *task.StatsCell
	desc  *description // nil before the first inspect
	// announced is the ARN of the task that it will belong to, until desc says so.
	announced string
	ns        *namespace // nil unless it runs in a namespace of its own
	newborn   int        // process of a container that is being started; 0 once the Engine has spoken
	warned    bool
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
	}
}

// known is what a look at a container begins with.
func (s *state) known(id string) (*description, int) {
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
		// While a container is being started its networks are connected one by one, and inspecting it
		// has to wait: the start event that follows is soon enough.
		if c := s.containers[id]; c != nil && c.desc != nil && (c.desc.container.Running() || c.ns != nil) {
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
		s.die(id, time.Unix(0, m.TimeNano))
		s.want(id, priorityEvent)
	default:
		s.want(id, priorityEvent)
	}
}

// die takes the addresses from a container that has ended: they may be another's before an inspect is answered. An
// old event that is told again says nothing about a container that has been started since.
func (s *state) die(id string, at time.Time) {
	if c := s.containers[id]; c != nil && c.desc != nil && !c.desc.container.StartedAt.After(at) {
		c.ns, c.newborn = nil, 0
		s.looks.hasEnded(id)
		s.dirty[c.desc.arn] = true
	}
}

// announce takes note that a container of a task was created, by the labels that the event carries. An
// inspect of it may have to wait until its program runs already.
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

// list compares what the Engine lists with what is known.
func (s *state) list(l listing) {
	s.lists++
	if s.unseen == nil {
		s.unseen = map[string]bool{}
		for _, sum := range l.containers {
			s.unseen[sum.ID] = true
		}
	}
	ids := make(map[string]bool, len(l.containers))
	for i := range l.containers {
		sum := &l.containers[i]
		ids[sum.ID] = true
		c := s.containers[sum.ID]
		// At the lowest priority, so that a container that starts now does not wait for all of them.
		if l.connected || c == nil || s.differs(c, sum) || s.moved(c) || (i+s.lists)%s.recheck == 0 {
			s.want(sum.ID, priorityRecheck)
		}
	}
	for id := range s.containers {
		if !ids[id] {
			s.want(id, priorityRecheck) // it may be younger than the list: the Engine has the last word
		}
	}
}

// differs reports whether a line of the list shows that an event was lost.
func (s *state) differs(c *tracked, sum *container.Summary) bool {
	if c.desc == nil {
		return !s.looks.busy(c.id) // else it is being inspected anyway
	}
	return c.desc.differs(sum)
}

// differs reports whether a line of the list shows something other than d.
func (d *description) differs(sum *container.Summary) bool {
	known := &d.container
	if known.State != sum.State || !slices.Contains(sum.Names, "/"+known.DockerName) {
		return true
	}
	if !known.Running() {
		return false
	}
	if shown := listedHealth(sum.Status); known.Health != nil && shown != "" && shown != known.Health.Status {
		return true
	}
	if sum.NetworkSettings == nil {
		return false
	}
	if len(sum.NetworkSettings.Networks) != len(known.DockerNetworks) {
		return true
	}
	for _, n := range known.DockerNetworks {
		if ep := sum.NetworkSettings.Networks[n.Name]; ep == nil || ep.IPAddress != n.IPAddress {
			return true
		}
	}
	return false
}

// listedHealth returns the verdict in the status that a list shows, "Up 2 hours (healthy)"; "" if there is none.
func listedHealth(status string) string {
	switch {
	case strings.Contains(status, "(healthy)"):
		return "HEALTHY"
	case strings.Contains(status, "(unhealthy)"):
		return "UNHEALTHY"
	}
	return ""
}

// moved reports whether the container has another namespace than the one that was read.
func (s *state) moved(c *tracked) bool {
	return c.ns != nil && s.inode(max(c.desc.container.PID, c.newborn)) != c.ns.inode
}

// refresh has every task built again.
func (s *state) refresh() {
	for arn := range s.groups {
		s.dirty[arn] = true
	}
}

// portsChanged looks at the containers that ports that came or went could belong to.
func (s *state) portsChanged(ports map[int]bool) {
	for _, c := range s.containers {
		if c.desc != nil && c.desc.ownNetwork() && c.mayHave(ports) {
			s.looks.connected(c.id)
			s.looks.wantNamespace(c.id, priorityEvent)
		}
	}
}

// mayHave reports whether one of the ports is the container's, or could be for all that is known.
func (c *tracked) mayHave(ports map[int]bool) bool {
	if c.ns == nil || len(c.ns.endpoints) == 0 {
		return true
	}
	for _, ep := range c.ns.endpoints {
		if ports[ep.Ifindex] {
			return true
		}
	}
	return false
}

// born takes note of a container that is about to run. Its addresses are read now; what the Engine
// says of it has been asked for when it was created.
func (s *state) born(b newborn) {
	c := s.containers[b.id]
	if c == nil || c.desc != nil && c.desc.container.Running() {
		return
	}
	c.newborn = b.pid
	if c.desc != nil {
		s.looks.wantNamespace(c.id, priorityStarting)
	}
}

// found takes in what a look has found.
func (s *state) found(f *finding) {
	delete(s.unseen, f.id)
	c := s.containers[f.id]
	if !s.looks.done(f) || c == nil {
		return
	}
	switch {
	case errdefs.IsNotFound(f.err):
		s.forget(c.id)
	case f.err != nil:
		s.arrived(c)
		s.failed(c, "container not inspected: keeping what is known", f.err)
	default:
		s.described(c, f)
		s.connected(c, f)
	}
}

// described takes in what the Engine says of c.
func (s *state) described(c *tracked, f *finding) {
	if f.desc.labelErr != nil && !c.warned {
		c.warned = true
		s.cfg.Log.Warn("labels not believed: the container is a task of its own", zap.String("container", c.id), zap.Error(f.desc.labelErr))
	}
	s.place(c, f.desc)
	if c.desc.container.Running() {
		c.newborn = 0
	}
}

// connected takes in what was found in c's namespace.
func (s *state) connected(c *tracked, f *finding) {
	switch {
	case c.newborn != 0 && f.newborn == 0:
		s.looks.wantNamespace(c.id, priorityStarting)
	case f.outdated:
		c.ns = nil
	case f.newborn != 0:
		if c.ns = f.ns; f.nsErr != nil {
			c.newborn = 0 // it has never come to run
		}
	case f.nsErr != nil:
		if c.ns != nil && s.inode(f.desc.container.PID) != c.ns.inode { // else it is there and only could not be read
			c.ns = nil
		}
		s.failed(c, "network namespace not read", f.nsErr)
	default:
		c.ns = f.ns
		s.looks.succeeded(c.id)
		if c.desc.awaitsCNI() && !c.ns.ecs {
			s.looks.await(c.id)
		} else {
			s.looks.connected(c.id)
		}
	}
}

// place gives c its new description and its place in the description's task.
func (s *state) place(c *tracked, d *description) {
	s.arrived(c)
	if c.desc != nil && c.desc.arn != d.arn {
		s.leaveGroup(c)
	}
	c.desc = d
	if s.groups[d.arn] == nil {
		s.groups[d.arn] = map[string]*tracked{}
	}
	s.groups[d.arn][c.id] = c
	s.dirty[d.arn] = true
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
	s.looks.forget(id)
	c := s.containers[id]
	if c == nil {
		return
	}
	s.arrived(c)
	if c.desc != nil {
		s.leaveGroup(c)
	}
	delete(s.containers, id)
}

func (s *state) leaveGroup(c *tracked) {
	arn := c.desc.arn
	delete(s.groups[arn], c.id)
	if len(s.groups[arn]) == 0 {
		delete(s.groups, arn)
	}
	s.dirty[arn] = true
}
