package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
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
	"metad/pkg/stats"
	"metad/pkg/task"
)

const (
	// drainTime bounds the answering of what was asked before the end.
	drainTime = 6 * time.Second
	// armTime is how long traffic is left to whoever had it before metad, while metad waits for its
	// first list of containers. Who knows tasks from before its restart does not wait.
	armTime = 5 * time.Second
)

func serveCommand() *cli.Command {
	var c config
	return &cli.Command{
		Name:  "serve",
		Usage: "answer the endpoint until SIGINT or SIGTERM",
		Flags: c.flags(),
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if cmd.Args().Present() {
				return fmt.Errorf("serve: unexpected argument %q", cmd.Args().First())
			}
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

// serve runs metad until ctx ends or a part of it fails. What is started is ended in reverse, for
// the reasons given at each step.
func serve(ctx context.Context, c *config, log *zap.Logger) (err error) {
	engine, err := client.NewClientWithOpts(client.WithHost(c.dockerHost), client.WithAPIVersionNegotiation())
	if err != nil {
		return fmt.Errorf("docker-host %q: %w", c.dockerHost, err)
	}
	defer closing(engine, &err)

	d := &daemon{cfg: c, log: log, wired: make(chan struct{})}
	ld, err := loader.Open(loader.Config{
		Bridges:     c.bridges,
		PinDir:      c.pinDir,
		Attach:      loader.AttachMode(c.attach),
		TrustBridge: c.trustBridge,
		OnExit:      loader.OnExit(c.onExit),
		MaxEntries:  c.maxAddresses,
		Log:         log.Named("loader"),
		OnPortGone:  d.portGone,
	})
	if err != nil {
		return err
	}
	defer closing(ld, &err) // last: the maps outlive everything that writes to them
	d.loader = ld
	d.table = lookup.New(ld, log.Named("lookup"))

	d.sampler, err = newSampler(c, engine, log.Named("stats"))
	if err != nil {
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
	})
	if err != nil {
		return err
	}
	defer closing(d.follower, &err)
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
	defer closing(d.files, &err)
	d.server, err = server.New(d.serverConfig(), d.table)
	if err != nil {
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
	run(d.follower.Run)
	run(func(ctx context.Context) error { d.sampler.Run(ctx); return nil })
	run(func(ctx context.Context) error { return ld.Events(ctx, d.event) })
	run(d.retry)
	if d.agent != nil {
		run(func(ctx context.Context) error { d.agent.Run(ctx); return nil })
	}
	if c.proxySocket != "" {
		proxy, ln, err := d.listenProxy()
		if err != nil {
			return err
		}
		run(func(ctx context.Context) error { return proxy.Serve(ctx, ln) })
	}
	if c.adminAddr != "" {
		adm, err := admin.Listen(d.adminConfig())
		if err != nil {
			return err
		}
		run(adm.Serve)
	}

	// The listener is the last descriptor to be opened and the program array the last thing to be filled: the
	// kernel takes both away first if this process is killed, and nobody waits for an answer.
	ln, err := ld.Listen()
	if err != nil {
		return err
	}
	run(func(context.Context) error {
		if err := d.server.Serve(ln); !errors.Is(err, server.ErrStopped) {
			return fmt.Errorf("serve: %w", err)
		}
		return nil
	})
	select {
	case <-d.follower.Synced():
	case <-time.After(armTime):
		log.Warn("no answer from the Docker Engine yet: serving without a list of containers")
	case <-ctx.Done():
	case <-parts.Done():
	}
	if ctx.Err() == nil && parts.Err() == nil {
		if err := ld.Arm(); err != nil {
			return err
		}
		d.armed.Store(true)
		log.Info("serving", zap.String("version", version), zap.Stringer("endpoint", loader.Endpoint), zap.Int("tasks", len(d.table.Views())))
	}

	select {
	case <-ctx.Done():
		log.Info("stopping")
	case <-parts.Done():
		err = context.Cause(parts)
	}
	d.armed.Store(false)
	// No new packets first: who asks from now on is answered by whoever is behind us.
	err = errors.Join(err, ld.Disarm())
	drain, done := context.WithTimeout(context.Background(), drainTime)
	defer done()
	if e := d.server.Shutdown(drain); e != nil {
		log.Warn("connections were cut off", zap.Error(e))
	}
	return errors.Join(err, ln.Close())
}

// closing joins the error of x's Close to *err.
func closing(x io.Closer, err *error) { *err = errors.Join(*err, x.Close()) }

func (c *config) availabilityZone() string {
	if c.disableAZ {
		return ""
	}
	return c.az
}

// newSampler returns the sampler with the sources that --stats-source names, nil for none.
func newSampler(c *config, engine *client.Client, log *zap.Logger) (*stats.Sampler, error) {
	ask := func(ctx context.Context, id string, stream bool) (io.ReadCloser, error) {
		get := engine.ContainerStats
		if !stream {
			get = func(ctx context.Context, id string, _ bool) (container.StatsResponseReader, error) {
				return engine.ContainerStatsOneShot(ctx, id)
			}
		}
		r, err := get(ctx, id, stream)
		return r.Body, err
	}
	source := c.statsSource
	if source == "auto" {
		source = "docker"
		if stats.Visible(stats.CgroupConfig{}) {
			source = "cgroup"
		}
	}
	log.Info("statistics", zap.String("source", source))
	if source == "docker" {
		return stats.New(stats.Config{Log: log}, stats.NewDockerSource(ask, stats.CgroupConfig{})), nil
	}
	cg, err := stats.NewCgroupSource(stats.CgroupConfig{})
	if err != nil {
		return nil, fmt.Errorf("stats-source %s: %w", c.statsSource, err)
	}
	return stats.New(stats.Config{Log: log}, cg), nil
}

// daemon is the parts of a running metad that speak of each other.
type daemon struct {
	cfg *config
	log *zap.Logger

	loader   *loader.Loader
	table    *lookup.Table
	sampler  *stats.Sampler
	follower *docker.Follower
	server   *server.Server
	agent    *agent.Client // nil: none
	files    *mdfile.Writer

	wired chan struct{} // closed when all of the above are set
	armed atomic.Bool
}

// apply is where a new set of tasks goes: first to who answers, so that a task is known as early as can be.
func (d *daemon) apply(tasks []*task.Task) {
	if err := d.table.Apply(tasks); err != nil {
		d.log.Error("some addresses are not served", zap.Error(err))
	}
	d.sampler.Apply(tasks)
	d.files.Apply(tasks)
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
func (d *daemon) listenProxy() (*dockerproxy.Proxy, net.Listener, error) {
	socket, ok := strings.CutPrefix(d.cfg.dockerHost, "unix://")
	if !ok {
		return nil, nil, fmt.Errorf("docker-proxy %q: needs a unix socket to stand in front of; docker-host is %q", d.cfg.proxySocket, d.cfg.dockerHost)
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
			if err := d.table.Retry(); err != nil {
				d.log.Debug("some addresses are still not served", zap.Error(err))
			}
			d.files.Retry()
		}
	}
}

func (d *daemon) portGone(ifindex int) {
	<-d.wired
	if err := d.table.PortGone(ifindex); err != nil {
		d.log.Error("port gone", zap.Int("ifindex", ifindex), zap.Error(err))
	}
	d.follower.Poke(ifindex)
}

func (d *daemon) serverConfig() server.Config {
	cfg := server.DefaultConfig()
	cfg.Log = d.log.Named("server")
	cfg.AgentURL = d.cfg.agentURL
	cfg.UnknownWait = d.cfg.unknownWait
	cfg.MaxConnsPerTask = d.cfg.maxConns
	cfg.Rate = server.ParseRateLimit(d.cfg.rpsLimit)
	cfg.Samples = samples{d.sampler}
	return cfg
}

// samples is the sampler as the server wants it.
type samples struct{ *stats.Sampler }

// Subscribe implements server.Samples.
func (s samples) Subscribe(id string) (<-chan *task.Sample, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ch := make(chan *task.Sample)
	sub := s.Sampler.Subscribe(id)
	if sub == nil {
		close(ch)
		return ch, cancel
	}
	go func() {
		defer close(ch)
		defer sub.Close()
		for {
			sample, err := sub.Next(ctx)
			if err != nil {
				return
			}
			select {
			case ch <- sample:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ch, cancel
}
