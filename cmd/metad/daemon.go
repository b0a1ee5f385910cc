package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"

	"metad/pkg/agent"
	"metad/pkg/cadvisor"
	"metad/pkg/docker"
	"metad/pkg/dockerproxy"
	"metad/pkg/inject"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/mdfile"
	"metad/pkg/server"
	"metad/pkg/stats"
	"metad/pkg/takeover"
	"metad/pkg/task"
)

// daemon is the parts of a running metad and their connections.
type daemon struct {
	cfg *config
	log *zap.Logger

	own         *possession
	engine      *docker.Client
	tasks       *publisher
	follower    *docker.Follower
	agent       *agent.Client // nil: none
	sampler     *stats.Sampler
	closeStats  func() // after the sampler's Run
	files       *mdfile.Writer
	inject      *inject.Injector
	plugin      *plugin                            // nil: none
	proxySocket atomic.Pointer[dockerproxy.Socket] // of the proxy that serves; nil: none yet
	endpoint    *endpoint
	watchdog    *watchdog   // nil: none
	guard       *agentGuard // nil: none
	answers     firstAnswers
	containers  http.Handler // nil: containers' metrics are not shown
	dropped     eventLog
	abandoned   atomic.Uint64 // takeovers of this metad that failed
}

// newDaemon makes the parts. None of them runs yet.
func newDaemon(c *config, log *zap.Logger, own *possession) (_ *daemon, err error) {
	d := &daemon{cfg: c, log: log, own: own, answers: firstAnswers{since: time.Now()}}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.engine, err = c.engine(); err != nil {
		return nil, err
	}
	d.tasks = &publisher{log: log, table: lookup.New(own.loader, log.Named("lookup"))}
	d.tasks.table.NameContainers(own.loader)
	if d.sampler, d.closeStats, err = c.sampler(d.engine, log); err != nil {
		return nil, err
	}
	if c.containerMetrics {
		d.containers = cadvisor.New(d.sampler)
	}
	cfg := c.followerConfig(d.engine, log)
	cfg.Apply, cfg.Enrich, cfg.Bridges = d.tasks.apply, d.enrich, own.loader.SetBridges
	cfg.LeftAlone = d.leaveAlone
	if d.follower, err = docker.New(cfg); err != nil {
		return nil, err
	}
	if d.agent, err = c.agentClient(d.follower.Refresh, log); err != nil {
		return nil, err
	}
	if d.files, err = c.fileWriter(log); err != nil {
		return nil, err
	}
	puts := c.injectConfig()
	puts.Identify = d.follower.Identify
	d.inject = inject.New(puts, d.files)
	d.plugin = d.newPlugin()
	if err := d.tasks.restore(own.saved); err != nil {
		return nil, err
	}
	d.follower.Restore(d.tasks.published())
	return d, nil
}

// Close releases the resources of newDaemon. The parts must have been stopped.
func (d *daemon) Close() error {
	var errs []error
	if d.engine != nil {
		errs = append(errs, d.engine.Close())
	}
	if d.follower != nil {
		errs = append(errs, d.follower.Close())
	}
	if d.files != nil {
		errs = append(errs, closeWithin(looseTime, d.files))
	}
	return errors.Join(errs...)
}

// closeWithin closes c, and returns after t at the latest: a frozen disk may hold up c.
func closeWithin(t time.Duration, c io.Closer) error {
	closed := make(chan error, 1)
	go func() { closed <- c.Close() }()
	select {
	case err := <-closed:
		return err
	case <-time.After(t):
		return nil
	}
}

// leaveAlone leaves the addresses of containers that the Engine gives no answer about to the agent.
func (d *daemon) leaveAlone(addrs []netip.Addr) {
	if err := d.own.loader.LeaveAlone(addrs); err != nil {
		d.log.Warn("cannot leave containers without an inspect to the ECS agent",
			zap.Error(err))
	}
}

func (d *daemon) busy(tag uint32) {
	if err := d.own.loader.Busy(tag); err != nil {
		d.log.Debug("new connections over a limit are refused, and not dropped",
			zap.Error(err))
	}
}

// enrich adds the facts that only the ECS agent has.
func (d *daemon) enrich(t *task.Task) {
	if d.agent != nil {
		d.agent.Enrich(t)
		if d.cfg.disableAZ {
			t.AvailabilityZone = ""
		}
	}
}

// listen makes the server accept the containers' connections.
func (d *daemon) listen(parts *parts) error {
	ln, err := d.own.listener()
	if err != nil {
		return err
	}
	d.guard = newAgentGuard(agentAddr(d.cfg.agentURL), d.log)
	d.endpoint = &endpoint{ln: ln, parts: parts, log: d.log, make: func() (*server.Server,
		error) {
		cfg := d.cfg.serverConfig(samples{d.sampler}, d.log)
		if d.guard != nil {
			cfg.AgentTrusted = d.guard.trusted.Load
		}
		cfg.Busy = d.busy
		return server.New(cfg, d.tasks.table)
	}}
	d.watchdog, err = newWatchdog(d.log, probeEndpoint(ln))
	if err == nil {
		err = d.endpoint.start()
	}
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	return nil
}

// run starts all parts but the endpoint.
func (d *daemon) run(parts *parts) {
	if !d.cfg.disableMetrics {
		sets := d.tasks.mailbox()
		parts.run(func(ctx context.Context) error {
			sets.each(ctx, d.sampler.Apply)
			return nil
		})
	}
	files, saved, seen := d.tasks.mailbox(), d.tasks.mailbox(), d.tasks.mailbox()
	parts.runLoose("metadata files", func(ctx context.Context) { d.keepFiles(ctx, files) })
	parts.run(d.sample)
	parts.run(func(ctx context.Context) error { seen.each(ctx, d.answers.changed); return nil })
	d.tasks.to(filling) // the tasks of an earlier process need no list of containers
	parts.run(d.follower.Run)
	parts.run(d.retry)
	parts.run(d.arm)
	parts.run(d.own.keepLock)
	if d.watchdog != nil {
		parts.run(d.watchdog.run)
	}
	if d.guard != nil {
		parts.run(d.guard.run)
	}
	if d.agent != nil {
		parts.run(func(ctx context.Context) error { d.agent.Run(ctx); return nil })
	}
	d.runSupport(parts, saved)
	// Not later, when packets come here: the Docker Engine starts after metad.
	notify(d.log, sd.SdNotifyReady)
}

// sample takes the tasks' statistics.
func (d *daemon) sample(ctx context.Context) error {
	defer d.closeStats()
	d.sampler.Run(ctx)
	return nil
}

// keepFiles keeps the metadata files up to date. It writes a file again each second while the disk
// is full.
func (d *daemon) keepFiles(ctx context.Context, sets mailbox[[]*task.Task]) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case tasks := <-sets.latest:
			if d.tasks.publishes() {
				d.files.Apply(tasks)
			}
		case <-tick.C:
			if d.tasks.publishes() {
				d.files.Retry()
			}
		}
	}
}

// retry tries each second to add the addresses for which the kernel's map had no room.
func (d *daemon) retry(ctx context.Context) error {
	return eachSecond(ctx, d.tasks.retry)
}

// eachSecond calls f once a second until ctx ends, and returns nil then.
func eachSecond(ctx context.Context, f func()) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			f()
		}
	}
}

// arm makes packets come to this process. With the tasks of an earlier process it does so at once,
// otherwise after every container has been inspected: until then the agent, if there is one, has
// better answers.
func (d *daemon) arm(ctx context.Context) error {
	known := d.follower.Synced()
	if len(d.tasks.table.Views()) > 0 {
		c := make(chan struct{})
		close(c)
		known = c
	}
	return d.own.arm(ctx, known, func(arm func() error) error {
		if err := d.tasks.serve(arm); err != nil {
			return err
		}
		d.log.Info("serving", zap.String("version", version),
			zap.Stringer("endpoint", loader.Endpoint),
			zap.Int("tasks", len(d.tasks.table.Views())))
		return nil
	})
}

// untilReplaced returns the metad that has taken over, or hup after a SIGHUP, or neither when ctx
// ends.
func (d *daemon) untilReplaced(ctx context.Context, hups <-chan os.Signal) (
	succ *takeover.Successor, hup bool) {
	ctx, cancel := context.WithCancel(ctx)
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		select {
		case <-hups:
			hup = true
			cancel()
		case <-ctx.Done():
		}
	}()
	succ, err := d.own.socket.Wait(ctx, d.offer, func() {
		if err := d.resume(); err != nil {
			d.log.Error("cannot resume after a failed takeover", zap.Error(err))
		}
	})
	if err != nil && ctx.Err() == nil {
		d.log.Error("takeovers are no longer possible", zap.Error(err))
		<-ctx.Done()
	}
	cancel()
	<-heard
	return succ, hup
}

// offer returns the state for a successor.
func (d *daemon) offer() (takeover.State, error) {
	if err := d.tasks.offer(); err != nil {
		return takeover.State{}, err
	}
	return d.own.offer(d.tasks.table.Views(), d.proxySocket.Load())
}

// resume continues after a takeover that failed.
func (d *daemon) resume() error {
	d.abandoned.Add(1)
	return d.tasks.resume(d.own.loader.CancelTakeover)
}

// leave answers the connections that were accepted here, while succ owns the kernel's side and
// accepts new ones. It reports whether this metad is done: if succ dies before that, this one
// serves again.
func (d *daemon) leave(succ *takeover.Successor, parts *parts) (done bool, err error) {
	d.log.Info("another metad takes over")
	d.tasks.to(replaced)
	select {
	case <-d.endpoint.drain():
	case <-succ.Died():
	}
	select {
	case <-succ.Died(): // also if this one was drained at the same moment
		d.log.Warn("the other metad is gone: serving again")
		return false, errors.Join(d.endpoint.restart(), d.resume())
	default:
	}
	d.own.ours = false
	// The endpoint closes before anything else: succ must be the last owner of the listener.
	// If succ is killed then, the kernel resets the waiting connections while succ's programs
	// still carry the resets.
	err = d.endpoint.Close()
	if s := d.proxySocket.Load(); s != nil {
		s.Succeed() // waits until the accepted connections have been answered
	}
	// the successor waits for the admin address
	return true, errors.Join(err, parts.stop(), succ.Close())
}

// stop ends the serving. It disarms the programs first: from then on the agent, if there is one,
// answers new requests. If the service manager is about to start another metad, they wait for it.
func (d *daemon) stop(parts *parts) error {
	d.log.Info("stopping")
	notify(d.log, sd.SdNotifyStopping)
	if parts.ctx.Err() == nil && d.keepForRestart() {
		return d.leaveKept(parts)
	}
	d.tasks.to(stopping)
	err := d.own.loader.Disarm()
	<-d.endpoint.drain()
	return err
}
