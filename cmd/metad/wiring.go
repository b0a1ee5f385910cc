package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"path/filepath"
	"strconv"

	"github.com/docker/docker/api/types/container"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"metad/pkg/admin"
	"metad/pkg/agent"
	"metad/pkg/docker"
	"metad/pkg/dockerproxy"
	"metad/pkg/doctor"
	"metad/pkg/inject"
	"metad/pkg/loader"
	"metad/pkg/mdfile"
	"metad/pkg/server"
	"metad/pkg/sockdiag"
	"metad/pkg/stats"
	"metad/pkg/takeover"
)

// This file has every mapping from flags to the Configs of the packages. A method here sets the
// fields that come from flags; the caller adds functions and channels between the parts.

func (c *config) logger() (*zap.Logger, error) {
	c.level = zap.NewAtomicLevel()
	if err := c.setLevel(c.logLevel); err != nil {
		return nil, err
	}
	zc := zap.NewProductionConfig()
	zc.Level = c.level
	zc.Encoding = c.logFormat
	zc.DisableStacktrace, zc.DisableCaller = true, true
	zc.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	if c.logFormat == "console" {
		zc.EncoderConfig.ConsoleSeparator = " "
	}
	return zc.Build()
}

// setLevel changes the level of the log, also while metad runs.
func (c *config) setLevel(name string) error {
	level, err := zapcore.ParseLevel(name)
	if err != nil {
		return fmt.Errorf("log-level: %w", err)
	}
	c.level.SetLevel(level)
	return nil
}

// engine returns a client of the Docker Engine, which may not run yet.
func (c *config) engine() (*docker.Client, error) {
	engine, err := docker.NewClient(c.dockerHost)
	if err != nil {
		return nil, fmt.Errorf("docker-host %q: %w", c.dockerHost, err)
	}
	return engine, nil
}

func (c *config) takeoverConfig(log *zap.Logger) takeover.Config {
	return takeover.Config{Dir: c.runDir, Layout: takeoverLayout, Build: version,
		Log: log.Named("takeover")}
}

func (c *config) loaderConfig(log *zap.Logger) loader.Config {
	return loader.Config{
		Bridges:     c.bridges,
		PinDir:      c.pinDir,
		Attach:      loader.AttachMode(c.attach),
		TrustBridge: c.trustBridge,
		OnExit:      loader.OnExit(c.onExit),
		MaxEntries:  c.maxAddresses,
		Log:         log.Named("loader"),
		HostRoute:   c.hostRoute != "off",
		AgentAddr:   agentAddr(c.agentURL),
	}
}

// agentAddr returns where the agent listens. A host name is not resolved: rules name addresses.
func agentAddr(agentURL string) netip.AddrPort {
	u, err := url.Parse(agentURL)
	if err != nil {
		return netip.AddrPort{}
	}
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16)
	if err != nil {
		return netip.AddrPort{}
	}
	host := u.Hostname()
	if host == "localhost" {
		host = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || !addr.Is4() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr, uint16(port))
}

func (c *config) followerConfig(engine docker.Engine, log *zap.Logger) docker.Config {
	return docker.Config{
		Engine:           engine,
		Log:              log.Named("docker"),
		Cluster:          c.cluster,
		Region:           c.region,
		Account:          c.account,
		AvailabilityZone: c.availabilityZone(),
		MadeUpZone:       c.madeUpZone(),
		LaunchType:       c.launchType,
		ReconcileEvery:   c.reconcile,
		BundleDirs:       c.bundleDirs,
	}
}

// madeUpZone is the zone of tasks that ECS does not know. Scripts remove its last letter to get
// the region.
func (c *config) madeUpZone() string {
	if c.disableAZ {
		return ""
	}
	return c.region + "a"
}

func (c *config) availabilityZone() string {
	if c.disableAZ {
		return ""
	}
	return c.az
}

// agentClient returns a client of the agent's introspection API and task endpoint, or nil if both
// are off. changed is called when the agent's answers change.
func (c *config) agentClient(changed func(arns ...string), log *zap.Logger) (*agent.Client, error) {
	if (c.introspection == "" || c.introspect != "") && c.agentURL == "" {
		return nil, nil
	}
	cfg := agent.DefaultConfig()
	cfg.URL, cfg.TaskURL = c.introspection, c.agentURL
	if c.introspect != "" {
		cfg.URL = "" // where metad answers as the agent does, it must not ask itself
	}
	cfg.Changed, cfg.Log = changed, log.Named("agent")
	return agent.New(cfg)
}

func (c *config) serverConfig(samples server.Samples, log *zap.Logger) server.Config {
	cfg := server.DefaultConfig()
	cfg.Log = log.Named("server")
	cfg.AgentURL = c.agentURL
	cfg.HostAddr = loader.HostAddr
	cfg.UnknownWait = c.unknownWait
	cfg.MaxConnsPerTask = c.maxConns
	cfg.Rate, _ = server.ParseRateLimit(c.rpsLimit) // validate has checked it
	cfg.NoStats = c.disableMetrics
	cfg.OwnIDsOnly = c.ownIDsOnly
	cfg.Samples = samples
	cfg.SocketCgroup = func(pid int, from, to netip.AddrPort) (uint64, error) {
		return sockdiag.Cgroup(fmt.Sprintf("/proc/%d/ns/net", pid), from, to)
	}
	cfg.CgroupContainer = docker.OpenCgroups("/proc", "/sys/fs/cgroup").Container
	return cfg
}

// sampler returns the sampler with the source that --stats-source names, and a function that
// closes the source. Call it after Run has returned.
func (c *config) sampler(engine *docker.Client, log *zap.Logger) (*stats.Sampler, func(), error) {
	source := c.statsSource
	if source == "auto" && !stats.Visible(stats.CgroupConfig{}) {
		source = "docker"
	}
	log = log.Named("stats")
	log.Info("statistics", zap.String("source", source))
	var sources []stats.Source
	closeSource := func() {}
	if source != "docker" {
		cg, err := stats.NewCgroupSource(stats.CgroupConfig{})
		if err != nil {
			return nil, nil, fmt.Errorf("stats-source %s: %w", c.statsSource, err)
		}
		sources = append(sources, cg)
	}
	if source != "cgroup" { // auto: for containers whose cgroup cannot be seen
		d := stats.NewDockerSource(askEngine(engine), stats.CgroupConfig{})
		sources, closeSource = append(sources, d), d.Close
	}
	return stats.New(stats.Config{Log: log, Keep: c.containerMetrics}, sources...), closeSource,
		nil
}

func askEngine(engine *docker.Client) stats.Engine {
	return func(ctx context.Context, id string, stream bool) (io.ReadCloser, error) {
		var r container.StatsResponseReader
		var err error
		if stream {
			r, err = engine.ContainerStats(ctx, id, true)
		} else {
			r, err = engine.ContainerStatsOneShot(ctx, id)
		}
		return r.Body, err
	}
}

// fileWriter returns the writer of the metadata files.
func (c *config) fileWriter(log *zap.Logger) (*mdfile.Writer, error) {
	form := mdfile.FormProposal
	if c.fileAgentPath {
		form = mdfile.FormAgent
	}
	cfg := mdfile.Config{DataDir: c.dataDir, Layout: mdfile.Layout{Form: form,
		DataDir: c.dataDir}}
	w, err := mdfile.NewWriter(cfg, log.Named("mdfile"))
	if err == nil {
		w.SetHost(mdfile.LocalHost(c.cluster, c.availabilityZone()))
	}
	return w, err
}

// injectConfig returns the settings of what the proxy and NRI put into containers.
func (c *config) injectConfig() inject.Config {
	return inject.Config{File: c.fileEnabled, URIs: c.metadataURIs}
}

func (c *config) proxyConfig() (dockerproxy.Config, error) {
	socket, err := c.engineSocket()
	if err != nil {
		return dockerproxy.Config{}, err
	}
	cfg := dockerproxy.Config{Engine: socket}
	if c.selinux {
		cfg.SELinux = dockerproxy.SELinuxOn
	}
	return cfg, nil
}

func (c *config) adminConfig() admin.Config {
	return admin.Config{Addr: c.adminAddr, Socket: adminSocket(c.runDir), Group: c.adminGroup,
		PProf: c.pprof}
}

// adminSocket returns the path of the admin socket of a metad with this run directory.
func adminSocket(runDir string) string { return filepath.Join(runDir, "admin.sock") }

func (c *config) doctorConfig() doctor.Config {
	return doctor.Config{
		Bridges:          c.bridges,
		Attach:           c.attach,
		PinDir:           c.pinDir,
		DockerHost:       c.dockerHost,
		AgentURL:         c.agentURL,
		IntrospectionURL: c.introspection,
		NRISocket:        c.nriSocket,
		AdminSocket:      adminSocket(c.runDir),
	}
}
