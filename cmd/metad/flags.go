package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"metad/pkg/agent"
	"metad/pkg/dockerproxy"
	"metad/pkg/loader"
	"metad/pkg/mdfile"
	"metad/pkg/nri"
	"metad/pkg/server"
)

const defaultConfigFile = "/etc/metad/metad.yaml"

// flagSet collects flags, each with its sources.
type flagSet struct {
	file     *configFile
	category string // of the flags that are added next
	flags    []cli.Flag
}

// sources are a flag's variable, the ECS agent's or SDK's names for the same, and the file.
func (s *flagSet) sources(name string, aliases ...string) cli.ValueSourceChain {
	own := "METAD_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
	chain := cli.EnvVars(append([]string{own}, aliases...)...)
	chain.Append(cli.NewValueSourceChain(&fileSource{s.file, name}))
	return chain
}

func (s *flagSet) text(dst *string, name, def, usage string, sources ...cli.ValueSourceChain) {
	chain := s.sources(name)
	if sources != nil {
		chain = sources[0]
	}
	s.flags = append(s.flags, &cli.StringFlag{Name: name, Value: def, Usage: usage,
		Destination: dst, Category: s.category, Sources: chain})
}

func (s *flagSet) list(dst *[]string, name string, def []string, usage string) {
	s.flags = append(s.flags, &cli.StringSliceFlag{Name: name, Value: def, Usage: usage,
		Destination: dst, Category: s.category, Sources: s.sources(name)})
}

func (s *flagSet) bool(dst *bool, name, usage string, agents ...string) {
	chain := s.sources(name)
	for _, alias := range agents {
		chain = withAgents(chain, alias, agentsBool)
	}
	s.flags = append(s.flags, &cli.BoolFlag{Name: name, Usage: usage,
		Destination: dst, Category: s.category, Sources: chain})
}

func (s *flagSet) duration(dst *time.Duration, name string, def time.Duration, usage string) {
	s.flags = append(s.flags, &cli.DurationFlag{Name: name, Value: def, Usage: usage,
		Destination: dst, Category: s.category, Sources: s.sources(name)})
}

func (s *flagSet) integer(dst *int, name string, def int, usage string) {
	s.flags = append(s.flags, &cli.IntFlag{Name: name, Value: def, Usage: usage,
		Destination: dst, Category: s.category, Sources: s.sources(name)})
}

// off is the value that switches a function off; so does the empty text.
const off = "off"

// switchable is a text flag that off sets to the empty text.
func (s *flagSet) switchable(dst *string, name, def, usage string,
	sources ...cli.ValueSourceChain) {
	s.text(dst, name, def, usage, sources...)
	f := s.flags[len(s.flags)-1].(*cli.StringFlag)
	f.Action = func(_ context.Context, _ *cli.Command, v string) error {
		if v == off {
			*dst = ""
		}
		return nil
	}
}

// flags returns the flags of `metad serve`.
func (c *config) flags() []cli.Flag {
	s := &flagSet{file: &c.file}
	s.flags = append(s.flags, &cli.StringFlag{Name: "config", Value: defaultConfigFile,
		Usage: "YAML file with the flags' names as keys", Destination: &c.file.path,
		Category: "daemon", Sources: cli.EnvVars("METAD_CONFIG")})
	c.dataPathFlags(s)
	c.taskFlags(s)
	c.requestFlags(s)
	c.fileFlags(s)
	c.daemonFlags(s)
	return s.flags
}

func (c *config) dataPathFlags(s *flagSet) {
	s.category = "data path"
	s.list(&c.bridges, "bridges", loader.DefaultBridges, "patterns of the bridges to watch")
	s.text(&c.pinDir, "pin-dir", loader.DefaultPinDir, "where the maps are pinned")
	s.text(&c.attach, "attach", string(loader.AttachAuto),
		"auto (tcx links, filters for more than 64 devices), tcx or clsact")
	s.bool(&c.trustBridge, "trust-bridge",
		"let address and MAC prove a task on a port that has no program yet")
	s.text(&c.onExit, "on-exit", string(loader.OnExitOpen),
		"packets for the endpoint while metad is away: open (they go where they went "+
			"before) or drop")
	s.text(&c.hostRoute, "host-route", "on",
		"route from the host's processes and host-network containers to the endpoint: "+
			"on or off (the agent's OUTPUT rule, if any, comes first)")
	s.integer(&c.maxAddresses, "max-addresses", defaultMaxAddresses, "size of the address map")
}

// defaultMaxAddresses is the size of the address map in the C code.
const defaultMaxAddresses = 16384

func (c *config) taskFlags(s *flagSet) {
	s.category = "tasks"
	s.text(&c.dockerHost, "docker-host", "unix://"+dockerproxy.DefaultEngine,
		"the Docker Engine", s.sources("docker-host", "DOCKER_HOST"))
	s.list(&c.bundleDirs, "bundle-dirs", nil,
		"containerd's bundle directories, where metad sees a container before its program "+
			"runs (default: containerd's and dockerd's usual places)")
	s.duration(&c.reconcile, "reconcile", 30*time.Second,
		"time between two lists of all containers, in case events were lost")
	s.text(&c.cluster, "cluster", "default", "cluster of tasks without one",
		s.sources("cluster", "ECS_CLUSTER"))
	s.text(&c.region, "region", "us-east-1", "region in made-up ARNs",
		s.sources("region", "AWS_REGION", "AWS_DEFAULT_REGION"))
	s.text(&c.account, "account", "000000000000", "account in made-up ARNs")
	s.text(&c.az, "availability-zone", "", "availability zone to show; "+
		"empty: the agent's, and for tasks that ECS does not know the region with an a")
	s.text(&c.launchType, "launch-type", "EXTERNAL",
		"launch type to show if the agent has none")
	s.bool(&c.disableAZ, "disable-availability-zone", "leave the availability zone out",
		"ECS_DISABLE_TASK_METADATA_AZ")
}

func (c *config) requestFlags(s *flagSet) {
	s.category = "requests"
	def := server.DefaultConfig()
	s.switchable(&c.agentURL, "agent-url", def.AgentURL,
		"the ECS agent's task endpoint, for all that metad does not serve, or off")
	s.switchable(&c.introspection, "agent-introspection-url", agent.DefaultConfig().URL,
		"the ECS agent's introspection API, or off")
	s.switchable(&c.introspect, "introspection", "",
		"address of the ECS agent's introspection API on a host without an agent "+
			"(clients use 127.0.0.1:51678), or off")
	s.duration(&c.unknownWait, "unknown-wait", def.UnknownWait,
		"how long a request from an unknown address waits for its task, at most 400ms")
	s.switchable(&c.rpsLimit, "rps-limit", "",
		`requests per second and burst of one task, "rate,burst", or off`,
		withAgents(s.sources("rps-limit"), "ECS_TASK_METADATA_RPS_LIMIT", agentsRate))
	s.integer(&c.maxConns, "max-conns-per-task", def.MaxConnsPerTask,
		"connections that one task may hold")
	s.bool(&c.ownIDsOnly, "own-ids-only",
		"answer v3 and v4 paths with an endpoint id only to the id's own task")
	s.text(&c.statsSource, "stats-source", "auto", "auto, cgroup or docker")
	s.bool(&c.disableMetrics, "disable-metrics", "collect no statistics", "ECS_DISABLE_METRICS")
}

func (c *config) fileFlags(s *flagSet) {
	s.category = "metadata file"
	s.text(&c.dataDir, "data-dir", mdfile.DefaultDataDir(mdfile.Linux, ""),
		"directory of the metadata files on the host")
	s.switchable(&c.proxySocket, "docker-proxy", dockerproxy.DefaultSocket,
		"socket of the Docker API proxy, or off")
	s.bool(&c.fileEnabled, "container-metadata",
		"give new containers a metadata file, by the proxy or NRI",
		"ECS_ENABLE_CONTAINER_METADATA")
	s.bool(&c.fileAgentPath, "agent-paths",
		"mount at /opt/ecs/metadata/UUID, as the ECS agent does")
	s.bool(&c.metadataURIs, "metadata-uris",
		"set ECS_CONTAINER_METADATA_URI and ECS_CONTAINER_METADATA_URI_V4 in new "+
			"containers, by the proxy or NRI")
	s.text(&c.nri, "nri", "auto",
		"act as an NRI plugin of the Docker Engine (29.2 or later), for every new "+
			"container: auto (if the socket exists), on or off")
	s.text(&c.nriSocket, "nri-socket", nri.DefaultSocket,
		"the Docker Engine's NRI socket (socket-path of its nri-opts)")
	s.bool(&c.selinux, "selinux", "relabel the mount even if the engine reports no SELinux",
		"ECS_SELINUX_CAPABLE")
}

func (c *config) daemonFlags(s *flagSet) {
	s.category = "daemon"
	s.switchable(&c.adminAddr, "admin", defaultAdmin,
		"address of /metrics, /healthz and /readyz, or off")
	s.text(&c.adminGroup, "admin-group", "",
		"group that may use the admin socket (tasks, statistics, profiles) beside root")
	s.bool(&c.containerMetrics, "container-metrics",
		"serve the statistics of all containers, under cAdvisor's names, at "+
			"/metrics/containers of the admin address, to every process of the host")
	s.bool(&c.pprof, "pprof", "serve /debug/pprof on the admin socket")
	s.text(&c.runDir, "run-dir", defaultRunDir,
		"directory of the admin socket, the takeover socket and the snapshot")
	s.text(&c.logLevel, "log-level", "info", "debug, info, warn or error",
		withAgents(s.sources("log-level"), "ECS_LOGLEVEL", agentsLevel))
	s.text(&c.logFormat, "log-format", "console", "console or json")
}

const (
	defaultAdmin  = "127.0.0.1:51683"
	defaultRunDir = "/run/metad"
)

// flagsNamed returns those of serve's flags that another command has too.
func (c *config) flagsNamed(names ...string) []cli.Flag {
	var out []cli.Flag
	for _, f := range c.flags() {
		if slices.Contains(names, f.Names()[0]) {
			out = append(out, f)
		}
	}
	return out
}

// agents is a variable of the ECS agent with values that metad's own flag does not allow. To the
// agent an invalid value means the default. metad must start on every host that the agent starts
// on.
type agents struct {
	cli.ValueSource // of the environment
	name            string
	read            func(string) string
}

// IsFromEnv and Key implement cli.EnvValueSource, for the help.
func (a agents) IsFromEnv() bool { return true }
func (a agents) Key() string     { return a.name }

// Lookup implements cli.ValueSource.
func (a agents) Lookup() (string, bool) {
	v, ok := a.ValueSource.Lookup()
	if v == "" {
		return "", ok
	}
	return a.read(v), ok
}

// withAgents puts the agent's variable after metad's own and before the file.
func withAgents(own cli.ValueSourceChain, name string,
	read func(string) string) cli.ValueSourceChain {
	own.Chain = slices.Insert(own.Chain, 1,
		cli.ValueSource(agents{cli.EnvVar(name), name, read}))
	return own
}

func agentsRate(v string) string {
	limit, _ := server.ParseRateLimit(v)
	return fmt.Sprintf("%d,%d", limit.PerSecond, limit.Burst)
}

func agentsBool(v string) string {
	on, _ := strconv.ParseBool(strings.TrimSpace(v))
	return strconv.FormatBool(on)
}

// agentsLevel converts a log level of the agent, which has crit in addition to metad's own.
func agentsLevel(v string) string {
	if v = strings.ToLower(v); v == "crit" || v == "critical" {
		return "error"
	}
	if slices.Contains(levels, v) {
		return v
	}
	return "info"
}

var levels = []string{"debug", "info", "warn", "error"}
