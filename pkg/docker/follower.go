// Package docker follows a Docker Engine and says which tasks the host runs, with the addresses
// and ports of each.
//
// It lists the containers, follows the events from a moment before the list, and lists again now
// and then, because events get lost. Facts come from inspects of containers and from their network
// namespaces, never from an event: an event only says which container to inspect. A container that
// is about to run is seen in containerd's directories before the Engine reports it, because the
// first instruction of its program may be a request for its metadata.
package docker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// Config says what to follow, and has the functions that get the results.
type Config struct {
	Engine Engine
	Log    *zap.Logger

	// Apply gets the complete current set, ordered by ARN, at every change of it. An unchanged
	// task keeps its pointer. One call at a time. The first call comes when every container of
	// the first list has been inspected, or its inspect was not answered for 10 s, so that no
	// set is incomplete. After Restore it comes 10 s after the first list at the latest.
	Apply func([]*task.Task)

	// Enrich may add facts that only the ECS agent has to a task, before it is published. It
	// may also change the containers. Called from one goroutine; must be quick. May be nil.
	Enrich func(*task.Task)

	// Bridges gets the devices of all bridge networks of the Engine, ordered by name, at every
	// change of them. Called from a goroutine of its own. May be nil.
	Bridges func(names []string)

	// LeftAlone gets the addresses of the running containers that are not known, because the
	// Engine lists them and answers no inspect of them. It gets them in order, at every change
	// of them, before the Apply whose set lacks them. Called from Run's goroutine; must be
	// quick. May be nil.
	LeftAlone func([]netip.Addr)

	// HostNetns is the path of the network namespace of the bridges; "": that of New's thread.
	HostNetns string
	// ProcRoot is where the host's processes are seen; "": /proc.
	ProcRoot string

	// BundleDirs are the directories in which containerd keeps the bundles of Docker's
	// containers; none: its usual ones. From them a container is known before its program runs.
	// Without them it is known when Docker reports its start.
	BundleDirs []string

	Cluster          string // name or ARN; "": default
	Region           string // in made-up ARNs; "": us-east-1
	Account          string // in made-up ARNs; "": 000000000000
	AvailabilityZone string // "": none
	// availability zone of tasks that ECS does not know, if there is no other; "": none
	MadeUpZone string
	LaunchType string // if the agent has none; "": EXTERNAL
	CgroupRoot string // where cgroups are mounted; "": /sys/fs/cgroup

	// ReconcileEvery is the time between two lists of all containers; 0: 30 s.
	ReconcileEvery time.Duration
}

// maxFirstSync is how long the tasks of an earlier process may stand for the complete set.
const maxFirstSync = 10 * time.Second

// Status is a Follower's state in numbers.
type Status struct {
	Connected bool // the event stream is open, and the containers were listed since
	Complete  bool // each container of the first list was inspected, or its inspect failed once
	// listed containers that are not known, because the Engine does not answer their inspects
	Missing    int
	Containers int    // known, stopped ones included
	Events     uint64 // received
	Inspects   uint64
	Errors     uint64 // inspects and namespaces that could not be read, lost streams
	Reconnects uint64 // event streams opened after the first
	Strays     uint64 // addresses that a container gave itself beside that of its port
}

// Follower follows one Engine.
type Follower struct {
	cfg      Config
	stream   *stream
	looks    *inspector
	newborns *inspector // see state.newborns
	state    *state     // of Run's goroutine
	ns       *namespaces
	read     func(*task.Container) (*namespace, error) // into the container's namespace
	// the cgroup of the container with the id and a process pid
	cgroupOf func(pid int, id string) task.Cgroup
	images   images
	now      func() time.Time
	births   *bundles // nil: there is no inotify instance left

	synced                  chan struct{} // closed after the first Apply
	complete                atomic.Bool
	containerCount, missing atomic.Int64
	left                    []netip.Addr // as last given to LeftAlone; of Run's goroutine

	mailbox struct { // for Run
		sync.Mutex
		ports      map[int]bool
		doubts     map[netip.Addr]bool
		refresh    []string // ARNs of tasks to make anew
		refreshAll bool
		signal     chan struct{} // holds one token while there is something to take
	}
}

// New returns a follower. Run starts its work. Close it after Run has returned.
func New(cfg Config) (*Follower, error) {
	f, err := newFollower(cfg)
	if err != nil {
		return nil, err
	}
	f.ns, err = openNamespaces(cmp.Or(cfg.ProcRoot, "/proc"),
		cmp.Or(cfg.HostNetns, "/proc/thread-self/ns/net"))
	if err != nil {
		return nil, err
	}
	f.read, f.state.inode = f.ns.read, f.ns.inode
	f.cgroupOf = OpenCgroups(cmp.Or(cfg.ProcRoot, "/proc"),
		cmp.Or(cfg.CgroupRoot, "/sys/fs/cgroup")).of
	if len(cfg.BundleDirs) == 0 {
		cfg.BundleDirs = defaultBundleDirs
	}
	births, err := openBundles(cfg.BundleDirs)
	f.useBirths(births, err)
	return f, nil
}

// useBirths makes the follower follow the bundles, unless err is set: the user's inotify instances
// may be used up, by any other process.
func (f *Follower) useBirths(births *bundles, err error) {
	if err != nil {
		f.cfg.Log.Warn("cannot watch containerd's bundles: a container is known only "+
			"after its start", zap.Error(err))
		return
	}
	f.births = births
}

// newFollower is New without access to the host.
func newFollower(cfg Config) (*Follower, error) {
	if cfg.Engine == nil || cfg.Apply == nil || cfg.Log == nil {
		return nil, errors.New("docker: Engine, Apply and Log must be set")
	}
	cfg.ReconcileEvery = cmp.Or(cfg.ReconcileEvery, 30*time.Second)
	names := newNaming(cmp.Or(cfg.Region, "us-east-1"), cmp.Or(cfg.Account, "000000000000"),
		cmp.Or(cfg.Cluster, "default"))
	if _, err := parseTaskARN(names.prefix + "x"); err != nil {
		return nil, fmt.Errorf("region, account and cluster make no ARN: %w", err)
	}
	f := &Follower{cfg: cfg, stream: newStream(cfg.Engine, cfg.Log), now: time.Now}
	f.cgroupOf = func(int, string) task.Cgroup { return task.Cgroup{} }
	f.synced = make(chan struct{})
	if cfg.Bridges != nil {
		f.stream.bridges = newBridges(cfg.Engine, cfg.Log, cfg.Bridges)
	}
	f.images.engine = cfg.Engine
	f.state = newState(&f.cfg, names)
	f.looks = newInspector(f.look, f.state.known)
	f.newborns = newInspector(f.look, f.state.knownNewborn)
	f.state.looks, f.state.newborns = f.looks, f.newborns
	f.mailbox.ports, f.mailbox.doubts = map[int]bool{}, map[netip.Addr]bool{}
	f.mailbox.signal = make(chan struct{}, 1)
	return f, nil
}

// Close frees what New took.
func (f *Follower) Close() error {
	if f.ns == nil {
		return nil
	}
	if f.births == nil {
		return f.ns.close()
	}
	return errors.Join(f.ns.close(), f.births.close())
}

// Restore sets the initial state to the tasks of an earlier process. A container of them that the
// Engine lists stays as it was until it has been inspected, so that a slow Engine makes no
// container disappear. Call it before Run.
func (f *Follower) Restore(tasks []*task.Task) { f.state.restore(tasks) }

// Synced is closed after the first Apply.
func (f *Follower) Synced() <-chan struct{} { return f.synced }

// Status may be called at any time from any goroutine.
func (f *Follower) Status() Status {
	return Status{
		Connected:  f.stream.connected.Load(),
		Complete:   f.complete.Load(),
		Missing:    int(f.missing.Load()),
		Containers: int(f.containerCount.Load()),
		Events:     f.stream.received.Load(),
		Inspects:   f.looks.inspects.Load(),
		Errors:     f.stream.failures.Load() + f.looks.failures.Load(),
		Reconnects: max(f.stream.opened.Load(), 1) - 1,
		Strays:     f.state.strays.Load(),
	}
}

// Ready returns nil if the set is complete, else the reason. Safe for concurrent use.
func (f *Follower) Ready() error {
	switch missing := f.missing.Load(); {
	case missing > 0:
		return fmt.Errorf("the Docker Engine has not answered yet for %d containers",
			missing)
	case !f.complete.Load():
		return errors.New("not every container has been inspected yet")
	}
	return nil
}

// PortChanged reports a new or deleted port with ifindex in the host's namespace. The follower
// inspects the containers that it may belong to. It never blocks and is safe for concurrent use.
func (f *Follower) PortChanged(ifindex int) {
	f.mailbox.Lock()
	defer f.mailbox.Unlock()
	f.mailbox.ports[ifindex] = true
	f.signal()
}

// WrongMAC reports a packet from addr, by the port of the address, with another MAC. The container
// may have changed its MAC, so the follower inspects it. It never blocks and is safe for concurrent
// use.
func (f *Follower) WrongMAC(addr netip.Addr) {
	f.mailbox.Lock()
	defer f.mailbox.Unlock()
	f.mailbox.doubts[addr] = true
	f.signal()
}

// Refresh makes the follower build the tasks with the ARNs again, or every task if there are none,
// because the facts that Enrich adds have changed. It never blocks and is safe for concurrent use.
func (f *Follower) Refresh(arns ...string) {
	f.mailbox.Lock()
	defer f.mailbox.Unlock()
	f.mailbox.refreshAll = f.mailbox.refreshAll || len(arns) == 0
	f.mailbox.refresh = append(f.mailbox.refresh, arns...)
	f.signal()
}

func (f *Follower) signal() {
	select {
	case f.mailbox.signal <- struct{}{}:
	default:
	}
}

// openMailbox processes the reports of PortChanged, WrongMAC and Refresh.
func (f *Follower) openMailbox() {
	f.mailbox.Lock()
	ports, doubts := f.mailbox.ports, f.mailbox.doubts
	refresh, all := f.mailbox.refresh, f.mailbox.refreshAll
	f.mailbox.ports, f.mailbox.doubts = map[int]bool{}, map[netip.Addr]bool{}
	f.mailbox.refresh, f.mailbox.refreshAll = nil, false
	f.mailbox.Unlock()
	f.state.refresh(refresh, all)
	if len(ports) > 0 {
		f.state.portsChanged(ports)
	}
	if len(doubts) > 0 {
		f.state.wrongMACs(doubts)
	}
}

// Run follows the Engine until ctx ends, and then returns nil. An Engine that is away is no error:
// until it is back, the tasks stay as they were.
func (f *Follower) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	parts.Go(func() { f.stream.run(ctx) })
	if b := f.stream.bridges; b != nil {
		parts.Go(func() { b.run(ctx) })
	}
	births := f.followBirths(&parts)
	defer func() {
		cancel()
		f.end(&parts)
	}()
	reconcile := time.NewTicker(f.cfg.ReconcileEvery)
	defer reconcile.Stop()
	var impatient <-chan time.Time
	patient := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-f.stream.events:
			f.state.event(ev)
		case b := <-births:
			f.state.born(b)
		case l := <-f.stream.lists:
			f.list(l)
			if impatient == nil && f.state.restored {
				impatient = time.After(maxFirstSync)
			}
		case <-reconcile.C:
			f.stream.listAgain()
		case again := <-f.looks.due:
			again()
		case again := <-f.newborns.due:
			again()
		case <-f.mailbox.signal:
			f.openMailbox()
		case found := <-f.looks.findings:
			f.state.found(found)
		case found := <-f.newborns.findings:
			f.state.foundNewborn(found)
		case <-impatient:
			patient = false
		}
		f.drain()
		f.newborns.dispatch(ctx)
		f.looks.dispatch(ctx)
		f.publish(patient)
	}
}

// end waits for the goroutines that Run has started. Their context has ended.
func (f *Follower) end(parts *sync.WaitGroup) {
	if f.births != nil {
		_ = f.births.close() // ends its run; nothing can be lost
	}
	parts.Wait()
	f.looks.close()
	f.newborns.close()
}

// drain processes the input that is already there. That needs no wait and saves calls of Apply.
func (f *Follower) drain() {
	for {
		select {
		case found := <-f.looks.findings:
			f.state.found(found)
		case found := <-f.newborns.findings:
			f.state.foundNewborn(found)
		case ev := <-f.stream.events:
			f.state.event(ev)
		default:
			return
		}
	}
}

// followBirths follows the bundles, if there are any to follow.
func (f *Follower) followBirths(parts *sync.WaitGroup) <-chan newborn {
	if f.births == nil {
		return nil
	}
	parts.Go(func() {
		if err := f.births.run(); err != nil {
			f.cfg.Log.Warn("stopped watching containerd's bundles: a container is "+
				"known only after its start", zap.Error(err))
		}
	})
	return f.births.found
}

func (f *Follower) list(l listing) {
	if f.births != nil {
		f.births.watchRoots()
	}
	f.state.list(l)
}

// leaveAlone reports the addresses of missing containers if they have changed.
func (f *Follower) leaveAlone() {
	if f.cfg.LeftAlone == nil {
		return
	}
	if left := f.state.missing.addrs(); !slices.Equal(left, f.left) {
		f.left = left
		f.cfg.LeftAlone(left)
	}
}

// publish passes on the complete set if it has changed, and the first set in any case. The first
// set is due when every container of the list has been inspected, or patience has ended.
func (f *Follower) publish(patient bool) {
	f.containerCount.Store(int64(len(f.state.containers)))
	f.missing.Store(int64(len(f.state.missing)))
	if f.state.unseen != nil && len(f.state.unseen) == 0 {
		f.complete.Store(true)
	}
	if f.state.relist {
		f.state.relist = false
		f.stream.listAgain()
	}
	if patient && !f.complete.Load() {
		return
	}
	f.leaveAlone()
	changed := f.state.changed()
	select {
	case <-f.synced:
		if changed {
			f.cfg.Apply(f.state.set())
		}
	default:
		f.cfg.Apply(f.state.set())
		close(f.synced)
	}
}
