package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/docker/client"
	"github.com/urfave/cli/v3"
	"go.uber.org/zap"

	"metad/pkg/admin"
	"metad/pkg/agent"
	"metad/pkg/docker"
	"metad/pkg/dockerproxy"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/mdfile"
	"metad/pkg/server"
	"metad/pkg/snapshot"
	"metad/pkg/stats"
	"metad/pkg/takeover"
	"metad/pkg/task"
)

const (
	// drainTime bounds the answering of what was asked before the end.
	drainTime = 6 * time.Second
	// armTime is how long traffic is left to whoever had it before metad, while metad waits for its
	// first list of containers. Who knows tasks from before its restart does not wait.
	armTime = 5 * time.Second
	// lockTime is how long one that was killed may take to be gone.
	lockTime = 2 * time.Second
)

func serveCommand() *cli.Command {
	var c config
	return &cli.Command{
		Name:  "serve",
		Usage: "answer the endpoint until SIGINT or SIGTERM",
		Flags: c.flags(),
		Action: func(ctx context.Context, _ *cli.Command) error {
			if err := c.validate(); err != nil {
				return err
			}
			log, err := c.logger()
			if err != nil {
				return err
			}
			defer log.Sync() //nolint:errcheck // stderr
			return serve(ctx, &c, log)
		},
	}
}

// serve runs metad until ctx ends, a part of it fails, or another metad has taken over. What is started is
// ended in reverse, for the reasons given at each step.
func serve(ctx context.Context, c *config, log *zap.Logger) (err error) {
	engine, err := client.NewClientWithOpts(client.WithHost(c.dockerHost), client.WithAPIVersionNegotiation())
	if err != nil {
		return fmt.Errorf("docker-host %q: %w", c.dockerHost, err)
	}
	defer closing(engine, &err)

	d := &daemon{cfg: c, log: log, wired: make(chan struct{}), ended: make(chan struct{}), frozen: true}
	socket, pred, err := takeover.Start(ctx, takeover.Config{Dir: c.runDir, Layout: handoverLayout, Build: version, Log: log.Named("takeover")})
	if err != nil {
		return runDirError(c.runDir, err)
	}
	var held io.Closer = socket
	if pred != nil {
		held = pred // both: if this does not come to serving, the other goes on
	}
	defer func() { err = errors.Join(err, held.Close()) }() // last: who starts next must find nothing of ours in its way
	var ln net.Listener
	var saved []lookup.Saved
	var lock io.Closer
	if pred == nil {
		if lock, err = lockPins(ctx, c.pinDir, lockTime); err != nil {
			return err
		}
		defer closing(lock, &err)
		d.loader, err = loader.Open(d.loaderConfig())
		saved = snapshot.Read(c.runDir, log.Named("snapshot"))
	} else {
		d.loader, ln, saved, err = d.adopt(pred)
	}
	if err != nil {
		return err
	}
	// What is in the kernel belongs to one process: who leaves it to another takes nothing out.
	owner := pred == nil
	defer func() {
		leave := d.loader.FinishTakeover
		if owner {
			leave = d.loader.Close
		}
		err = errors.Join(err, leave())
	}()
	defer close(d.ended)
	if err := d.build(engine); err != nil {
		return err
	}
	defer closing(d.follower, &err)
	defer closing(d.files, &err)
	if err := d.table.Restore(saved); err != nil {
		return err
	}
	close(d.wired)

	// The parts end when parts is cancelled, the first error cancels it, and all are waited for before
	// anything above is closed.
	parts, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	run := func(f func(context.Context) error) {
		running.Go(func() {
			if err := f(parts); err != nil {
				cancel(err)
			}
		})
	}
	defer func() {
		cancel(nil)
		running.Wait()
	}()

	// The listener is the last descriptor to be opened and the program array the last thing to be filled: the
	// kernel takes both away first if this process is killed, and nobody waits for an answer.
	if pred == nil {
		if ln, err = d.loader.Listen(); err != nil {
			return err
		}
	}
	defer closing(ln, &err)
	var accepting chan struct{} // closed when the last server that was started accepts no more
	serving := func() error {
		srv, err := server.New(d.serverConfig(), d.table)
		if err != nil {
			return err
		}
		d.server.Store(srv)
		// Shutdown leaves its deadline behind.
		if l, ok := ln.(interface{ SetDeadline(time.Time) error }); ok {
			if err := l.SetDeadline(time.Time{}); err != nil {
				return err
			}
		}
		done := make(chan struct{})
		accepting = done
		run(func(context.Context) error {
			defer close(done)
			if err := srv.Serve(ln); !errors.Is(err, server.ErrStopped) {
				return fmt.Errorf("serve: %w", err)
			}
			return nil
		})
		return nil
	}
	if err := serving(); err != nil {
		return err
	}
	if pred != nil {
		if err := pred.Serving(ctx); err != nil {
			return errors.Join(err, d.server.Load().Shutdown(ctx))
		}
		owner, held = true, socket
		log.Info("taken over from the running metad")
	}
	d.thaw()

	run(d.follower.Run)
	run(func(ctx context.Context) error {
		d.sampler.Run(ctx)
		d.closeStats()
		return nil
	})
	run(func(ctx context.Context) error { return d.loader.Events(ctx, d.event) })
	run(d.retry)
	run(d.keepSnapshot)
	if pred != nil {
		run(func(ctx context.Context) error { return d.keepLock(ctx) })
	}
	if d.agent != nil {
		run(func(ctx context.Context) error { d.agent.Run(ctx); return nil })
	}
	// What is not for containers. A start that cannot have it ends before it takes a packet; after a takeover
	// nobody else is left to serve, and it is tried again.
	side := func(listen func(context.Context) (func(context.Context) error, error)) error {
		if pred == nil {
			serve, err := listen(parts)
			if err == nil {
				run(serve)
			}
			return err
		}
		run(func(ctx context.Context) error {
			const every, patience = 50, 20 // ms; times: one that was killed may have an address for a moment longer
			for n := 0; ctx.Err() == nil; n++ {
				serve, err := listen(ctx)
				if err == nil {
					return serve(ctx)
				}
				if n == patience {
					log.Error("going on without it until it can be had", zap.Error(err))
				}
				pause(ctx, every*time.Millisecond)
			}
			return nil
		})
		return nil
	}
	var proxySocket atomic.Pointer[dockerproxy.Socket]
	if c.proxySocket != "" {
		err := side(func(context.Context) (func(context.Context) error, error) {
			proxy, socket, err := d.listenProxy()
			if err != nil {
				return nil, err
			}
			proxySocket.Store(socket)
			return func(ctx context.Context) error { return proxy.Serve(ctx, socket) }, nil
		})
		if err != nil {
			return err
		}
	}
	if c.adminAddr != "" {
		err := side(func(ctx context.Context) (func(context.Context) error, error) {
			if pred != nil { // it has the address until then
				select {
				case <-pred.Left():
				case <-ctx.Done():
				}
			}
			adm, err := admin.Listen(d.adminConfig())
			if err != nil {
				return nil, err
			}
			return adm.Serve, nil
		})
		if err != nil {
			return err
		}
	}

	if pred == nil && len(d.table.Views()) == 0 {
		// Nothing is known yet: until something is, whoever was asked before metad knows more.
		select {
		case <-d.follower.Synced():
		case <-time.After(armTime):
			log.Warn("no answer from the Docker Engine yet: serving without a list of containers")
		case <-ctx.Done():
		case <-parts.Done():
		}
	}
	if ctx.Err() == nil && parts.Err() == nil {
		if pred == nil {
			if err := d.loader.Arm(); err != nil {
				return err
			}
		}
		d.armed.Store(true)
		log.Info("serving", zap.String("version", version), zap.Stringer("endpoint", loader.Endpoint), zap.Int("tasks", len(d.table.Views())))
	}

	for {
		succ := d.untilReplaced(ctx, parts, socket)
		d.armed.Store(false)
		if succ == nil {
			break
		}
		// The other has all that is in the kernel, and accepts. What was accepted here is answered here.
		log.Info("another metad takes over")
		drained := make(chan struct{})
		srv := d.server.Load()
		running.Go(func() {
			d.shutdown(srv)
			close(drained)
		})
		select {
		case <-drained:
			owner = false
			err := context.Cause(parts)
			if s := proxySocket.Load(); s != nil {
				s.Succeed() // waits until the other's proxy has taken this one's place
			}
			cancel(nil) // the other waits for the admin address
			running.Wait()
			return errors.Join(err, succ.Close())
		case <-succ.Died():
			log.Warn("the other metad is gone: going on")
			<-accepting // at once, not after the last open connection
			if err := errors.Join(serving(), d.resume()); err != nil {
				return err
			}
			d.armed.Store(true)
		}
	}
	log.Info("stopping")
	// No new packets first: who asks from now on is answered by whoever is behind us.
	err = errors.Join(context.Cause(parts), d.loader.Disarm())
	d.shutdown(d.server.Load())
	return err
}

// untilReplaced returns when ctx or parts end, with nil, or when another metad has taken over.
func (d *daemon) untilReplaced(ctx, parts context.Context, socket *takeover.Socket) *takeover.Successor {
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(parts, cancel)()
	succ, err := socket.Wait(wait, d.give, func() {
		if err := d.resume(); err != nil {
			d.log.Error("go on after a takeover that failed", zap.Error(err))
		}
	})
	if err != nil && wait.Err() == nil {
		d.log.Error("no takeover is possible any more", zap.Error(err))
		<-wait.Done()
	}
	return succ
}

// shutdown answers what srv was asked, within drainTime.
func (d *daemon) shutdown(srv *server.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		d.log.Warn("connections were cut off", zap.Error(err))
	}
}

// build makes the parts, none of which does anything yet.
func (d *daemon) build(engine *client.Client) (err error) {
	c, log := d.cfg, d.log
	d.table = lookup.New(d.loader, log.Named("lookup"))
	if d.sampler, d.closeStats, err = newSampler(c, engine, log.Named("stats")); err != nil {
		return err
	}
	d.follower, err = docker.New(docker.Config{
		Engine:           engine,
		Log:              log.Named("docker"),
		Apply:            d.apply,
		Cluster:          c.cluster,
		Region:           c.region,
		Account:          c.account,
		AvailabilityZone: c.availabilityZone(),
		ReconcileEvery:   c.reconcile,
		Enrich:           d.enrich,
		BundleDirs:       c.bundleDirs,
	})
	if err != nil {
		return err
	}
	if c.introspection != "" {
		cfg := agent.DefaultConfig()
		cfg.URL, cfg.Changed, cfg.Log = c.introspection, d.follower.Refresh, log.Named("agent")
		if d.agent, err = agent.New(cfg); err != nil {
			return err
		}
	}
	if d.files, err = mdfile.NewWriter(c.fileConfig(), log.Named("mdfile")); err != nil {
		return err
	}
	d.files.SetHost(mdfile.LocalHost(c.cluster, c.availabilityZone()))
	return nil
}

// closing joins the error of x's Close to *err.
func closing(x io.Closer, err *error) { *err = errors.Join(*err, x.Close()) }

func (c *config) availabilityZone() string {
	if c.disableAZ {
		return ""
	}
	return c.az
}

// daemon is the parts of a running metad that speak of each other.
type daemon struct {
	cfg *config
	log *zap.Logger

	loader     *loader.Loader
	table      *lookup.Table
	sampler    *stats.Sampler
	closeStats func() // after the sampler's Run
	follower   *docker.Follower
	server     atomic.Pointer[server.Server] // another one after a takeover that failed late
	agent      *agent.Client                 // nil: none
	files      *mdfile.Writer

	wired chan struct{} // closed when all of the above are set, but for the server
	ended chan struct{} // closed when serve ends, before the loader is closed
	armed atomic.Bool   // packets come here

	mu       sync.Mutex   // guards what follows, and is held while tasks are published
	current  []*task.Task // the last set
	synced   bool         // current has been set
	unserved bool         // the last try left addresses out, and the log says so
	carried  bool         // what an earlier process sampled has been given to the containers that still run
	frozen   bool         // another metad writes to the kernel's map, or may do so any moment: this one does not
}

// apply is where a new set of tasks goes.
func (d *daemon) apply(tasks []*task.Task) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.current, d.synced = tasks, true
	d.publish()
}

// publish is called with mu held: first to who answers, so that a task is known as early as can be.
func (d *daemon) publish() {
	if d.frozen || !d.synced {
		return
	}
	d.carryOver()
	d.logServed(d.table.Apply(d.current))
	if !d.cfg.disableMetrics {
		d.sampler.Apply(d.current)
	}
	d.files.Apply(d.current)
}

// carryOver gives the containers that an earlier process knew the samples it had of them, once: until there are newer
// ones. It is called with mu held.
func (d *daemon) carryOver() {
	if d.carried {
		return
	}
	d.carried = true
	before := map[string]*task.Container{}
	for _, v := range d.table.Views() {
		for _, c := range v.Task.Containers {
			before[c.ID] = c
		}
	}
	for _, t := range d.current {
		for _, c := range t.Containers {
			// The counters of one that was started again begin anew.
			if old := before[c.ID]; old != nil && c.Running() && c.StartedAt.Equal(old.StartedAt) && c.Stats.Load() == nil {
				c.Stats.Store(old.Stats.Load())
			}
		}
	}
}

// logServed tells when a table's error comes and when it has gone, not each time in between. It is called with
// mu held.
func (d *daemon) logServed(err error) {
	switch {
	case err != nil && !d.unserved:
		d.log.Error("some addresses are not served", zap.Error(err))
	case err == nil && d.unserved:
		d.log.Info("all addresses are served again")
	}
	d.unserved = err != nil
}

// thaw begins or goes on to publish.
func (d *daemon) thaw() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.frozen = false
	d.publish()
}

// enrich adds what only the ECS agent knows.
func (d *daemon) enrich(t *task.Task) {
	if d.agent != nil {
		d.agent.Enrich(t)
	}
}

func (c *config) fileConfig() mdfile.Config {
	form := mdfile.FormProposal
	if c.fileAgentPath {
		form = mdfile.FormAgent
	}
	return mdfile.Config{DataDir: c.dataDir, Layout: mdfile.Layout{Form: form, DataDir: c.dataDir}}
}

// listenProxy makes the Docker API proxy and its socket.
func (d *daemon) listenProxy() (*dockerproxy.Proxy, *dockerproxy.Socket, error) {
	socket, err := d.cfg.engineSocket()
	if err != nil {
		return nil, nil, err
	}
	cfg := dockerproxy.Config{Engine: socket, Enabled: d.cfg.fileEnabled, Identify: d.follower.Identify}
	if d.cfg.selinux {
		cfg.SELinux = dockerproxy.SELinuxOn
	}
	proxy, err := dockerproxy.New(cfg, d.files, d.log.Named("proxy"))
	if err != nil {
		return nil, nil, err
	}
	ln, err := dockerproxy.Listen(d.cfg.proxySocket, socket)
	if err != nil {
		return nil, nil, fmt.Errorf("docker-proxy %q: %w", d.cfg.proxySocket, err)
	}
	return proxy, ln, nil
}

// event logs what the kernel tells: at most one a second of each kind.
func (d *daemon) event(e loader.Event) {
	log := d.log.Warn
	if e.Verdict == "port_unknown" || e.Verdict == "bridge_unknown" {
		log = d.log.Debug // a container that has just started, mostly
	}
	log("packet", zap.String("verdict", e.Verdict), zap.Stringer("addr", e.Addr), zap.Stringer("mac", e.HardwareAddr()),
		zap.Int("ifindex", e.Ifindex), zap.Uint64("held_back", e.HeldBack))
}

// retry gives addresses that the kernel's map had no room for, and files that the disk had none for, another
// chance.
func (d *daemon) retry(ctx context.Context) error {
	for tick := time.NewTicker(time.Second); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			d.mu.Lock()
			if !d.frozen {
				d.logServed(d.table.Retry())
				d.files.Retry()
			}
			d.mu.Unlock()
		}
	}
}

// port: a container starts.
func (d *daemon) port(ifindex int) {
	select {
	case <-d.wired:
		d.follower.PortChanged(ifindex)
	default: // the first list is still to come
	}
}

func (d *daemon) portGone(ifindex int) {
	select {
	case <-d.wired:
	case <-d.ended: // a start that failed: the loader's Close waits for this to return
		return
	}
	if err := d.table.PortGone(ifindex); err != nil {
		d.log.Error("port gone", zap.Int("ifindex", ifindex), zap.Error(err))
	}
	d.follower.PortChanged(ifindex)
}

func (d *daemon) serverConfig() server.Config {
	cfg := server.DefaultConfig()
	cfg.Log = d.log.Named("server")
	cfg.AgentURL = d.cfg.agentURL
	cfg.HostAddr = loader.HostAddr
	cfg.UnknownWait = d.cfg.unknownWait
	cfg.MaxConnsPerTask = d.cfg.maxConns
	cfg.Rate, _ = server.ParseRateLimit(d.cfg.rpsLimit) // validate has seen to it
	cfg.NoStats = d.cfg.disableMetrics
	cfg.Samples = samples{d.sampler}
	return cfg
}
