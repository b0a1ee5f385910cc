// Package docker follows a Docker Engine and says which tasks the host runs, with the addresses
// and ports of each.
//
// It lists the containers, follows the events from a moment before, and lists again now and then,
// because events get lost. Facts come from inspecting a container and from its network namespace, never
// from an event: an event only says where to look. That a container is about to run is seen in containerd's
// directories, before the Engine says so: its program may ask for its metadata with its first instruction.
package docker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	"go.uber.org/zap"

	"metad/pkg/task"
)

// Engine is what a Follower needs of the Docker Engine. *client.Client is one.
type Engine interface {
	ContainerList(context.Context, container.ListOptions) ([]container.Summary, error)
	ContainerInspect(ctx context.Context, id string) (container.InspectResponse, error)
	Events(context.Context, events.ListOptions) (<-chan events.Message, <-chan error)
}

// Config says what to follow and whom to tell.
type Config struct {
	Engine Engine
	Log    *zap.Logger

	// Apply gets the whole current set, ordered by ARN, at every change of it; a task that has not
	// changed has the pointer it had before. One call at a time. The first comes when every container
	// there was at the start has been looked at, so that nobody takes a part for the whole.
	Apply func([]*task.Task)

	// Enrich may add to a task what only the ECS agent knows, before the task is published. It
	// may change the containers too. Called from one goroutine; must be quick. May be nil.
	Enrich func(*task.Task)

	// HostNetns is the path of the network namespace that the bridges are in; "": that of New's thread.
	HostNetns string
	// ProcRoot is where the host's processes are seen; "": /proc.
	ProcRoot string

	// BundleDirs are where containerd keeps the bundles of Docker's containers; none: its usual places. A
	// container is then known before its program runs. Without them it is as soon as Docker says it has started.
	BundleDirs []string

	Cluster          string // name or ARN; "": default
	Region           string // in made-up ARNs; "": us-east-1
	Account          string // in made-up ARNs; "": 000000000000
	AvailabilityZone string // "": none

	// ReconcileEvery is the time between two looks at the list of all containers; 0: 30 s.
	ReconcileEvery time.Duration
}

const (
	inspectTimeout = 10 * time.Second
	listTimeout    = 30 * time.Second

	// How many looks at containers go on at once. The Engine holds a container's lock while it
	// starts it, so a look at one that is about to start waits all that time: those have places of their own.
	maxNewborn = 16
	maxUrgent  = 16
	maxFresh   = 64
	maxLazy    = 8

	// A list that takes longer than this to be worked off does not hold the first Apply any more.
	maxFirstSync = 10 * time.Second

	// A reconcile inspects one in recheckShare of the containers that seem unchanged.
	recheckShare = 16
)

// Status is how a Follower is doing.
type Status struct {
	Connected  bool   // the event stream is open
	Containers int    // known, stopped ones included
	Events     uint64 // received
	Inspects   uint64
	Errors     uint64 // inspects and namespaces that could not be read, lost streams
	Reconnects uint64 // event streams opened after the first
}

// Follower follows one Engine.
type Follower struct {
	cfg     Config
	names   *naming
	synced  chan struct{}
	read    func(*task.Container) (*namespace, error) // into the container's namespace
	inode   func(pid int) uint64
	ns      *namespaces
	births  *bundles
	now     func() time.Time
	recheck int // recheckShare

	connected                                     atomic.Bool
	containerCount                                atomic.Int64
	eventCount, inspects, failures, streamsOpened atomic.Uint64

	pokes struct {
		sync.Mutex
		ports   []int
		refresh bool
		signal  chan struct{} // holds one token while there is something to take
	}

	// What follows belongs to Run's goroutine.
	containers map[string]*tracked
	newborns   queue // about to run: looked at without the Engine, which would keep them waiting
	urgent     queue // something has happened
	fresh      queue // just created
	lazy       queue // the rest
	finished   chan *look
	retries    chan string
	groups     map[string]map[string]*tracked // by ARN, then container id
	announced  map[string]int                 // by ARN: containers created of which no more is known
	dirty      map[string]bool                // ARNs to build again
	tasks      map[string]*task.Task
	first      map[string]bool // ids of the first list that were not looked at yet
	ready      bool            // all were, or have had their time
	reconciles int
	wait       sync.WaitGroup // for looks
}

// tracked is what is known of one container, and what is being done about it.
type tracked struct {
	id    string
	stats *task.StatsCell
	desc  *description // nil before the first inspect
	// announced is the ARN of the task that it will belong to, until desc says so.
	announced string
	ns        *namespace // nil unless it runs in a namespace of its own

	newborn  int    // process of a container that is being started; 0 once the Engine has spoken
	queued   *queue // that it waits in, or will when the present look is done
	looking  bool
	died     bool // while it was being looked at: what was found is of before
	inspect  bool // the next look is at what the Engine says too, not only into the namespace
	tries    int  // failed looks in a row
	settling int  // looks at a namespace that was not connected yet
	retry    *time.Timer
	gone     bool
	warned   bool
}

// queue is a line of containers to look at.
type queue struct {
	ids  []string
	busy int
	most int
	rank int // a container waits in one queue: that of the highest rank
}

// look is one look at a container and what it found.
type look struct {
	*tracked
	from    *queue
	inspect bool
	newborn int          // only look into the namespace of this process
	desc    *description // what was known; then what is
	ns      *namespace
	err     error // the Engine's
	nsErr   error
}

// New returns a follower that has done nothing yet. Close it after Run has returned.
func New(cfg Config) (*Follower, error) {
	f, err := newFollower(cfg)
	if err != nil {
		return nil, err
	}
	f.ns, err = openNamespaces(orDefault(cfg.ProcRoot, "/proc"), orDefault(cfg.HostNetns, "/proc/thread-self/ns/net"))
	if err != nil {
		return nil, err
	}
	f.read, f.inode = f.ns.read, f.ns.inode
	if len(cfg.BundleDirs) == 0 {
		cfg.BundleDirs = defaultBundleDirs
	}
	if f.births, err = openBundles(cfg.BundleDirs); err != nil {
		return nil, errors.Join(err, f.ns.close())
	}
	return f, nil
}

// newFollower is New without a look at the machine.
func newFollower(cfg Config) (*Follower, error) {
	if cfg.Engine == nil || cfg.Apply == nil || cfg.Log == nil {
		return nil, errors.New("docker: Engine, Apply and Log must be set")
	}
	if cfg.ReconcileEvery == 0 {
		cfg.ReconcileEvery = 30 * time.Second
	}
	f := &Follower{
		cfg:        cfg,
		names:      newNaming(orDefault(cfg.Region, "us-east-1"), orDefault(cfg.Account, "000000000000"), orDefault(cfg.Cluster, "default")),
		synced:     make(chan struct{}),
		now:        time.Now,
		recheck:    recheckShare,
		containers: map[string]*tracked{},
		newborns:   queue{most: maxNewborn, rank: 3},
		urgent:     queue{most: maxUrgent, rank: 2},
		fresh:      queue{most: maxFresh, rank: 1},
		lazy:       queue{most: maxLazy},
		finished:   make(chan *look, maxNewborn+maxUrgent+maxFresh+maxLazy),
		retries:    make(chan string, 1024),
		groups:     map[string]map[string]*tracked{},
		announced:  map[string]int{},
		dirty:      map[string]bool{},
		tasks:      map[string]*task.Task{},
	}
	if _, err := parseTaskARN(f.names.prefix + "x"); err != nil {
		return nil, fmt.Errorf("region, account and cluster make no ARN: %w", err)
	}
	f.pokes.signal = make(chan struct{}, 1)
	return f, nil
}

func orDefault(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// Close frees what New took.
func (f *Follower) Close() error {
	if f.ns == nil {
		return nil
	}
	return errors.Join(f.ns.close(), f.births.close())
}

// Synced is closed after the first Apply.
func (f *Follower) Synced() <-chan struct{} { return f.synced }

// Status may be called at any time from any goroutine.
func (f *Follower) Status() Status {
	return Status{
		Connected:  f.connected.Load(),
		Containers: int(f.containerCount.Load()),
		Events:     f.eventCount.Load(),
		Inspects:   f.inspects.Load(),
		Errors:     f.failures.Load(),
		Reconnects: max(f.streamsOpened.Load(), 1) - 1,
	}
}

// Poke tells that a port with ifindex has come or gone in the host's namespace: the containers that it could
// concern are looked at now. Never blocks; safe for concurrent use.
func (f *Follower) Poke(ifindex int) {
	f.pokes.Lock()
	f.pokes.ports = append(f.pokes.ports, ifindex)
	f.pokes.Unlock()
	f.signal()
}

// Refresh has every task made anew, because what Enrich adds has changed. Never blocks; safe for concurrent use.
func (f *Follower) Refresh() {
	f.pokes.Lock()
	f.pokes.refresh = true
	f.pokes.Unlock()
	f.signal()
}

func (f *Follower) signal() {
	select {
	case f.pokes.signal <- struct{}{}:
	default:
	}
}

// listed is the answer to a question for all containers.
type listed struct {
	containers []container.Summary
	all        bool // inspect every one, changed or not
}

// Run follows the Engine until ctx ends, and returns nil then. An Engine that is away is no error: the
// tasks stay as they were last seen until it is back.
func (f *Follower) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	incoming := make(chan events.Message, 4096) // the Engine drops events for whom reads slowly
	lists := make(chan listed)
	relist := make(chan struct{}, 1)
	var following sync.WaitGroup
	following.Go(func() { f.follow(ctx, incoming, lists, relist) })
	var births <-chan newborn
	if f.births != nil {
		births = f.births.found
		following.Go(func() {
			if err := f.births.run(); err != nil {
				f.cfg.Log.Warn("containers are not seen before they run", zap.Error(err))
			}
		})
	}
	defer func() {
		cancel()
		if f.births != nil {
			_ = f.births.close() // ends its run, and nothing was written
		}
		following.Wait()
		f.wait.Wait()
		for _, c := range f.containers {
			c.stopRetry()
		}
	}()

	reconcile := time.NewTicker(f.cfg.ReconcileEvery)
	defer reconcile.Stop()
	var impatient <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-incoming:
			f.event(ev)
		case b := <-births:
			f.born(b)
		case l := <-lists:
			if f.births != nil {
				f.births.watchRoots()
			}
			f.list(l)
			if impatient == nil {
				impatient = time.After(maxFirstSync)
			}
		case <-reconcile.C:
			select {
			case relist <- struct{}{}:
			default: // one is asked for already
			}
		case id := <-f.retries:
			f.retry(id)
		case <-f.pokes.signal:
			f.poked()
		case l := <-f.finished:
			f.found(l)
		case <-impatient:
			f.ready = true
		}
		// What is there already costs no waiting, and one Apply less.
		for more := true; more; {
			select {
			case l := <-f.finished:
				f.found(l)
			case ev := <-incoming:
				f.event(ev)
			default:
				more = false
			}
		}
		f.dispatch(ctx)
		f.ready = f.ready || f.first != nil && len(f.first) == 0
		f.publish()
	}
}

// follow keeps an event stream open and lists the containers each time after it has opened one, and
// when asked to.
func (f *Follower) follow(ctx context.Context, incoming chan<- events.Message, lists chan<- listed, relist <-chan struct{}) {
	since := f.now()
	for tries := 0; ; tries++ {
		var err error
		since, err = f.stream(ctx, since, incoming, lists, relist)
		if f.connected.Swap(false) {
			tries = 0
		}
		if ctx.Err() != nil {
			return
		}
		f.failures.Add(1)
		if tries == 0 {
			f.cfg.Log.Warn("docker is away: keeping the tasks as they are", zap.Error(err))
		}
		select {
		case <-time.After(backoff(20*time.Millisecond, tries, 2*time.Second)):
		case <-ctx.Done():
			return
		}
	}
}

// actions are the events asked for. Others come often and say nothing: each health check is an exec_….
var actions = []events.Action{events.ActionCreate, events.ActionStart, events.ActionDie, events.ActionDestroy, events.ActionRename,
	events.ActionPause, events.ActionUnPause, events.ActionHealthStatus, events.ActionRestart, events.ActionUpdate,
	events.ActionConnect, events.ActionDisconnect}

// stream reads events from since on until the stream ends, and returns when the next should begin.
func (f *Follower) stream(ctx context.Context, since time.Time, incoming chan<- events.Message, lists chan<- listed, relist <-chan struct{}) (time.Time, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wanted := filters.NewArgs(filters.Arg("type", string(events.ContainerEventType)), filters.Arg("type", string(events.NetworkEventType)))
	for _, a := range actions {
		wanted.Add("event", string(a))
	}
	// The Engine answers before it subscribes us: what happens in between is in since. It keeps the last 256 events.
	messages, errs := f.cfg.Engine.Events(ctx, events.ListOptions{
		Since:   fmt.Sprintf("%d.%09d", since.Unix(), since.Nanosecond()),
		Filters: wanted,
	})
	select {
	case err := <-errs: // the answer was an error
		return since, fmt.Errorf("open event stream: %w", err)
	default:
	}

	answers := make(chan error, 1)
	asking := false
	ask := func(all bool) {
		asking = true
		go func() {
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			containers, err := f.cfg.Engine.ContainerList(ctx, container.ListOptions{All: true})
			if err == nil {
				select {
				case lists <- listed{containers, all}:
				case <-ctx.Done():
					err = ctx.Err()
				}
			}
			answers <- err
		}()
	}
	defer func() {
		if asking {
			cancel()
			<-answers
		}
	}()
	ask(true)
	for {
		select {
		case m := <-messages:
			f.eventCount.Add(1)
			if t := time.Unix(0, m.TimeNano); m.TimeNano > 0 && t.After(since) {
				since = t
			}
			select {
			case incoming <- m:
			case <-ctx.Done():
				return since, ctx.Err()
			}
		case err := <-errs:
			return since, fmt.Errorf("event stream: %w", err)
		case err := <-answers:
			asking = false
			if err != nil {
				return since, fmt.Errorf("list containers: %w", err)
			}
			if !f.connected.Swap(true) {
				f.streamsOpened.Add(1)
				f.cfg.Log.Info("following docker")
			}
		case <-relist:
			if !asking {
				ask(false)
			}
		}
	}
}

// event notes what an event calls for.
func (f *Follower) event(m events.Message) {
	if m.Type == events.NetworkEventType {
		id := m.Actor.Attributes["container"]
		// While a container is being started its networks are connected one by one, and inspecting it
		// has to wait: the start event that follows is soon enough.
		if c := f.containers[id]; c != nil && c.desc != nil && (c.desc.container.Running() || c.ns != nil) {
			f.look(&f.urgent, id)
		}
		return
	}
	id := m.Actor.ID
	if id == "" {
		return
	}
	switch m.Action {
	case events.ActionDestroy:
		f.forget(id)
	case events.ActionCreate:
		f.look(&f.fresh, id)
		f.announce(f.containers[id], m.Actor.Attributes)
	case events.ActionDie:
		// Its addresses may be another's before an inspect is answered. An old event that is told
		// again says nothing about a container that has been started since.
		if c := f.containers[id]; c != nil && c.desc != nil && !c.desc.container.StartedAt.After(time.Unix(0, m.TimeNano)) {
			c.ns, c.newborn = nil, 0
			c.died = c.looking
			f.dirty[c.desc.arn] = true
		}
		f.look(&f.urgent, id)
	default:
		f.look(&f.urgent, id)
	}
}

// announce takes note that a container of a task was created, by the labels that the event carries. An
// inspect of it may have to wait until its program runs already.
func (f *Follower) announce(c *tracked, attributes map[string]string) {
	if c.desc != nil || c.announced != "" { // told again
		return
	}
	if t, _ := f.Identify(attributes, attributes["name"]); t != nil {
		c.announced = t.ARN
		f.announced[t.ARN]++
		f.dirty[t.ARN] = true
	}
}

// arrived ends what announce began: what c is is known, or will not be soon.
func (f *Follower) arrived(c *tracked) {
	if c.announced == "" {
		return
	}
	if f.announced[c.announced]--; f.announced[c.announced] == 0 {
		delete(f.announced, c.announced)
	}
	f.dirty[c.announced] = true
	c.announced = ""
}

// list compares what the Engine lists with what is known.
func (f *Follower) list(l listed) {
	f.reconciles++
	if f.first == nil {
		f.first = map[string]bool{}
		for _, s := range l.containers {
			f.first[s.ID] = true
		}
	}
	ids := make(map[string]bool, len(l.containers))
	for i := range l.containers {
		s := &l.containers[i]
		ids[s.ID] = true
		c := f.containers[s.ID]
		// In the lazy line, so that what starts now does not wait for all of them.
		if l.all || c == nil || c.differs(s) || f.moved(c) || (i+f.reconciles)%f.recheck == 0 {
			f.look(&f.lazy, s.ID)
		}
	}
	for id := range f.containers {
		if !ids[id] {
			f.look(&f.lazy, id) // it may be younger than the list: the Engine has the last word
		}
	}
}

// differs reports whether a line of the list shows that an event was lost.
func (c *tracked) differs(s *container.Summary) bool {
	if c.desc == nil {
		return c.queued == nil && !c.looking // else it is being inspected anyway
	}
	known := &c.desc.container
	if known.State != s.State || !slices.Contains(s.Names, "/"+known.DockerName) {
		return true
	}
	if h := known.Health; h != nil && known.Running() {
		shown := map[bool]string{strings.Contains(s.Status, "(healthy)"): "HEALTHY", strings.Contains(s.Status, "(unhealthy)"): "UNHEALTHY"}[true]
		if shown != "" && shown != h.Status {
			return true
		}
	}
	if s.NetworkSettings == nil || !known.Running() {
		return false
	}
	if len(s.NetworkSettings.Networks) != len(known.DockerNetworks) {
		return true
	}
	for _, n := range known.DockerNetworks {
		if ep := s.NetworkSettings.Networks[n.Name]; ep == nil || ep.IPAddress != n.IPAddress {
			return true
		}
	}
	return false
}

// moved reports whether the container has another namespace than the one that was read.
func (f *Follower) moved(c *tracked) bool {
	return c.ns != nil && f.inode(max(c.desc.container.PID, c.newborn)) != c.ns.inode
}

// poked looks at the containers that a port that came or went could belong to.
func (f *Follower) poked() {
	f.pokes.Lock()
	ports, refresh := f.pokes.ports, f.pokes.refresh
	f.pokes.ports, f.pokes.refresh = nil, false
	f.pokes.Unlock()
	if refresh {
		for arn := range f.groups {
			f.dirty[arn] = true
		}
	}
	if len(ports) == 0 {
		return
	}
	for _, c := range f.containers {
		if c.desc == nil || !c.desc.ownNetwork() {
			continue
		}
		if c.ns == nil || len(c.ns.endpoints) == 0 || slices.ContainsFunc(c.ns.endpoints, func(ep task.Endpoint) bool {
			return slices.Contains(ports, ep.Ifindex)
		}) {
			c.settling = 0
			f.lookInto(&f.urgent, c)
		}
	}
}

// look puts a container in line for a look at it: an inspect, and its namespace if it has one.
func (f *Follower) look(q *queue, id string) {
	c := f.containers[id]
	if c == nil {
		c = &tracked{id: id, stats: &task.StatsCell{}}
		f.containers[id] = c
		f.containerCount.Store(int64(len(f.containers)))
	}
	c.inspect = true
	f.lookInto(q, c)
}

// lookInto puts a container in line for a look into its namespace.
func (f *Follower) lookInto(q *queue, c *tracked) {
	c.stopRetry()
	if c.queued != nil && c.queued.rank >= q.rank {
		return
	}
	// A place left behind in another line is passed over when its turn comes.
	c.queued = q
	if !c.looking {
		q.ids = append(q.ids, c.id)
	}
}

// born takes note of a container that is about to run. Its addresses are read now; what the Engine
// says of it has been asked for when it was created.
func (f *Follower) born(b newborn) {
	c := f.containers[b.id]
	if c == nil || c.desc != nil && c.desc.container.Running() {
		return
	}
	c.newborn = b.pid
	if c.desc != nil {
		f.lookInto(&f.newborns, c)
	}
}

// retry looks again at a container whose time for that has come.
func (f *Follower) retry(id string) {
	c := f.containers[id]
	switch {
	case c == nil:
	case c.tries == 0 && c.desc != nil && c.desc.awaitsCNI():
		f.lookInto(&f.urgent, c)
	default:
		f.look(&f.lazy, id)
	}
}

func (c *tracked) stopRetry() {
	if c.retry != nil {
		c.retry.Stop()
		c.retry = nil
	}
}

// dispatch starts as many looks as there are places for.
func (f *Follower) dispatch(ctx context.Context) {
	for _, q := range []*queue{&f.newborns, &f.urgent, &f.fresh, &f.lazy} {
		for q.busy < q.most && len(q.ids) > 0 {
			c := f.containers[q.ids[0]]
			q.ids = q.ids[1:]
			if c == nil || c.queued != q || c.looking {
				continue
			}
			l := &look{tracked: c, from: q, inspect: c.inspect && q != &f.newborns, desc: c.desc}
			if !l.inspect {
				l.newborn = c.newborn
			}
			c.queued, c.looking, c.died = nil, true, false
			c.inspect = c.inspect && !l.inspect
			q.busy++
			f.wait.Go(func() {
				f.take(ctx, l)
				f.finished <- l // has room for all
			})
		}
	}
}

// take takes a look. It runs beside Run and touches nothing but l's findings.
func (f *Follower) take(ctx context.Context, l *look) {
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	if l.inspect {
		f.inspects.Add(1)
		var health *task.Health
		if l.desc != nil {
			health = l.desc.container.Health
		}
		inspect, err := f.cfg.Engine.ContainerInspect(ctx, l.id)
		if err == nil {
			l.desc, err = describe(&inspect, f.names, health, f.now())
		}
		if err != nil {
			l.err = err
			return
		}
	}
	switch {
	case l.newborn != 0 && l.desc.startsWithNetwork():
		c := l.desc.container
		c.PID = l.newborn
		l.ns, l.nsErr = f.read(&c)
	case l.desc.ownNetwork():
		l.ns, l.nsErr = f.read(&l.desc.container)
	}
}

// found takes in what a look found.
func (f *Follower) found(l *look) {
	c := l.tracked
	l.from.busy--
	c.looking = false
	delete(f.first, c.id)
	if c.gone {
		return
	}
	if c.queued != nil { // asked for meanwhile: now it may stand in line
		c.queued.ids = append(c.queued.ids, c.id)
	} else if c.inspect { // put off
		f.lookInto(&f.urgent, c)
	}
	switch {
	case errdefs.IsNotFound(l.err):
		f.forget(c.id)
		return
	case l.err != nil:
		f.failed(c, "container not inspected: keeping what is known", l.err)
		return
	}
	if l.nsErr != nil && c.ns != nil && f.inode(l.desc.container.PID) == c.ns.inode {
		l.ns = c.ns // the namespace is there and only could not be read
	}
	if l.desc.labelErr != nil && !c.warned {
		c.warned = true
		f.cfg.Log.Warn("labels not believed: the container is a task of its own", zap.String("container", c.id), zap.Error(l.desc.labelErr))
	}
	f.place(c, l.desc)
	if c.desc.container.Running() {
		c.newborn = 0
	}
	if c.newborn != 0 && l.newborn == 0 {
		f.lookInto(&f.newborns, c)
		return
	}
	c.ns = l.ns
	if c.died {
		c.ns = nil
		return
	}
	if l.newborn != 0 {
		if l.nsErr != nil {
			c.newborn = 0 // it has never come to run
		}
		return
	}
	if l.nsErr != nil {
		f.failed(c, "network namespace not read", l.nsErr)
		return
	}
	c.tries = 0
	if !c.desc.awaitsCNI() || c.ns.ecs {
		c.settling = 0
		return
	}
	// Nobody tells when a CNI plugin is done.
	f.retryIn(c, backoff(2*time.Millisecond, c.settling, time.Second))
	c.settling++
}

// place gives c its new description and its place in the description's task.
func (f *Follower) place(c *tracked, d *description) {
	f.arrived(c)
	if c.desc != nil && c.desc.arn != d.arn {
		f.leaveGroup(c)
	}
	c.desc = d
	if f.groups[d.arn] == nil {
		f.groups[d.arn] = map[string]*tracked{}
	}
	f.groups[d.arn][c.id] = c
	f.dirty[d.arn] = true
}

// failed has c looked at again later. A container that has just ended fails once in the usual course of things.
func (f *Follower) failed(c *tracked, message string, err error) {
	f.arrived(c)
	f.failures.Add(1)
	c.tries++
	if c.tries == 3 {
		f.cfg.Log.Warn(message, zap.String("container", c.id), zap.Error(err))
	}
	f.retryIn(c, backoff(20*time.Millisecond, c.tries, 10*time.Second))
}

func backoff(shortest time.Duration, tries int, longest time.Duration) time.Duration {
	return min(shortest<<min(tries, 16), longest)
}

func (f *Follower) retryIn(c *tracked, d time.Duration) {
	if c.queued != nil {
		return
	}
	c.stopRetry()
	id := c.id
	c.retry = time.AfterFunc(d, func() {
		select {
		case f.retries <- id:
		default: // a reconcile will come by
		}
	})
}

// forget drops a container that the Engine does not have any more.
func (f *Follower) forget(id string) {
	delete(f.first, id)
	c := f.containers[id]
	if c == nil {
		return
	}
	c.gone = true
	c.stopRetry()
	f.arrived(c)
	if c.desc != nil {
		f.leaveGroup(c)
	}
	delete(f.containers, id)
	f.containerCount.Store(int64(len(f.containers)))
}

func (f *Follower) leaveGroup(c *tracked) {
	arn := c.desc.arn
	delete(f.groups[arn], c.id)
	if len(f.groups[arn]) == 0 {
		delete(f.groups, arn)
	}
	f.dirty[arn] = true
}
