package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.yaml.in/yaml/v3"

	"metad/pkg/server"
)

const defaultConfigFile = "/etc/metad/metad.yaml"

// config is everything `metad serve` can be told. Flags win over the environment (METAD_*, then
// the ECS_* name that means the same), that over the file.
type config struct {
	file configFile

	bridges      []string
	pinDir       string
	attach       string
	trustBridge  bool
	onExit       string
	hostRoute    string
	maxAddresses int

	dockerHost string
	bundleDirs []string
	reconcile  time.Duration
	cluster    string
	region     string
	account    string
	az         string
	disableAZ  bool

	agentURL      string
	introspection string

	unknownWait time.Duration
	rpsLimit    string
	maxConns    int

	statsSource    string
	disableMetrics bool

	adminAddr string
	pprof     bool

	dataDir       string
	proxySocket   string
	fileEnabled   bool
	fileAgentPath bool
	selinux       bool
	runDir        string

	logLevel  string
	logFormat string
}

// flags returns the flags of `metad serve`, each with its sources.
func (c *config) flags() []cli.Flag {
	src := func(name string, aliases ...string) cli.ValueSourceChain {
		env := append([]string{"METAD_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))}, aliases...)
		chain := cli.EnvVars(env...)
		chain.Append(cli.NewValueSourceChain(&fileSource{&c.file, name}))
		return chain
	}
	str := func(dst *string, category, name, def, usage string, aliases ...string) cli.Flag {
		return &cli.StringFlag{Name: name, Value: def, Usage: usage, Destination: dst, Category: category, Sources: src(name, aliases...)}
	}
	boolean := func(dst *bool, category, name, usage string, aliases ...string) cli.Flag {
		chain := src(name)
		for _, alias := range aliases {
			chain = withAgents(chain, alias, agentsBool)
		}
		return &cli.BoolFlag{Name: name, Usage: usage, Destination: dst, Category: category, Sources: chain}
	}
	dur := func(dst *time.Duration, category, name string, def time.Duration, usage string, aliases ...string) cli.Flag {
		return &cli.DurationFlag{Name: name, Value: def, Usage: usage, Destination: dst, Category: category, Sources: src(name, aliases...)}
	}
	integer := func(dst *int, category, name string, def int, usage string, aliases ...string) cli.Flag {
		return &cli.IntFlag{Name: name, Value: def, Usage: usage, Destination: dst, Category: category, Sources: src(name, aliases...)}
	}
	const (
		path   = "data path"
		tasks  = "tasks"
		http   = "requests"
		files  = "metadata file"
		daemon = "daemon"
	)
	return []cli.Flag{
		&cli.StringFlag{Name: "config", Value: defaultConfigFile, Usage: "YAML file with the flags' names as keys", Destination: &c.file.path, Category: daemon, Sources: cli.EnvVars("METAD_CONFIG")},

		&cli.StringSliceFlag{Name: "bridges", Value: []string{"ecs-bridge", "docker0", "br-*"}, Usage: "patterns of the bridges to watch", Destination: &c.bridges, Category: path, Sources: src("bridges")},
		str(&c.pinDir, path, "pin-dir", "/sys/fs/bpf/metad", "where the maps are pinned"),
		str(&c.attach, path, "attach", "auto", "auto, tcx or clsact"),
		boolean(&c.trustBridge, path, "trust-bridge", "let address and MAC prove a task on a port that has no program yet"),
		str(&c.onExit, path, "on-exit", "open", "what becomes of packets for the endpoint without metad: open (as before metad) or drop"),
		str(&c.hostRoute, path, "host-route", "on", "route for host processes and host-network containers to the endpoint: on (the agent's OUTPUT rule, where there is one, still comes first) or off"),
		integer(&c.maxAddresses, path, "max-addresses", 16384, "size of the address map"),

		str(&c.dockerHost, tasks, "docker-host", "unix:///var/run/docker.sock", "the Docker Engine", "DOCKER_HOST"),
		&cli.StringSliceFlag{Name: "bundle-dirs", Usage: "where containerd keeps the bundles of Docker's containers: tells of a container before its program runs (default: containerd's and dockerd's usual places)", Destination: &c.bundleDirs, Category: tasks, Sources: src("bundle-dirs")},
		dur(&c.reconcile, tasks, "reconcile", 30*time.Second, "how often the whole container list is compared, because events get lost"),
		str(&c.cluster, tasks, "cluster", "default", "cluster of tasks that name none", "ECS_CLUSTER"),
		str(&c.region, tasks, "region", "us-east-1", "region in made-up ARNs", "AWS_REGION", "AWS_DEFAULT_REGION"),
		str(&c.account, tasks, "account", "000000000000", "account in made-up ARNs"),
		str(&c.az, tasks, "availability-zone", "", "availability zone to show; empty: none"),
		boolean(&c.disableAZ, tasks, "disable-availability-zone", "leave the availability zone out", "ECS_DISABLE_TASK_METADATA_AZ"),

		str(&c.agentURL, http, "agent-url", "http://127.0.0.1:51679", "the ECS agent's task endpoint, for all that metad does not serve; empty: none"),
		str(&c.introspection, http, "agent-introspection-url", "http://127.0.0.1:51678", "the ECS agent's introspection API; empty: none"),
		dur(&c.unknownWait, http, "unknown-wait", 400*time.Millisecond, "how long a request from an unknown address waits for its task, at most 400ms"),
		&cli.StringFlag{Name: "rps-limit", Usage: `requests per second and burst of one task, "rate,burst"; empty: no limit`, Destination: &c.rpsLimit, Category: http, Sources: withAgents(src("rps-limit"), "ECS_TASK_METADATA_RPS_LIMIT", agentsRate)},
		integer(&c.maxConns, http, "max-conns-per-task", server.DefaultConfig().MaxConnsPerTask, "connections one task may hold"),
		str(&c.statsSource, http, "stats-source", "auto", "auto, cgroup or docker"),
		boolean(&c.disableMetrics, http, "disable-metrics", "collect no statistics", "ECS_DISABLE_METRICS"),

		str(&c.dataDir, files, "data-dir", "/var/lib/ecs/data", "where the metadata files live on the host"),
		str(&c.proxySocket, files, "docker-proxy", "/run/metad/docker.sock", "socket of the Docker API proxy; empty: none"),
		boolean(&c.fileEnabled, files, "container-metadata", "give containers created through the proxy a metadata file", "ECS_ENABLE_CONTAINER_METADATA"),
		boolean(&c.fileAgentPath, files, "agent-paths", "mount at /opt/ecs/metadata/<uuid>, as the ECS agent does"),
		boolean(&c.selinux, files, "selinux", "relabel the mount even if the engine reports no SELinux", "ECS_SELINUX_CAPABLE"),

		str(&c.adminAddr, daemon, "admin", "127.0.0.1:51683", "address of /metrics, /healthz, /readyz and /v1/tasks; empty: none"),
		boolean(&c.pprof, daemon, "pprof", "serve /debug/pprof on the admin address"),
		str(&c.runDir, daemon, "run-dir", "/run/metad", "where the takeover socket and the snapshot live"),
		&cli.StringFlag{Name: "log-level", Value: "info", Usage: "debug, info, warn or error", Destination: &c.logLevel, Category: daemon, Sources: withAgents(src("log-level"), "ECS_LOGLEVEL", agentsLevel)},
		str(&c.logFormat, daemon, "log-format", "console", "console or json"),
	}
}

// validate names the first field whose value makes no sense. The packages check what is theirs.
func (c *config) validate() error {
	if err := c.file.err; err != nil {
		return err
	}
	oneOf := func(name, v string, of ...string) error {
		if slices.Contains(of, v) {
			return nil
		}
		return fmt.Errorf("%s %q: want one of %s", name, v, strings.Join(of, ", "))
	}
	atLeast := func(name string, v, least int) error {
		if v >= least {
			return nil
		}
		return fmt.Errorf("%s %d: want at least %d", name, v, least)
	}
	var bridges error
	for _, p := range c.bridges {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			bridges = fmt.Errorf("bridges: bad pattern %q", p)
		}
	}
	var exit error
	if c.onExit == "drop" && c.attach == "tcx" {
		exit = errors.New("on-exit drop: nothing stays to drop with after attach tcx; use clsact")
	}
	var reconcile error
	if c.reconcile <= 0 {
		reconcile = fmt.Errorf("reconcile %s: want a positive duration", c.reconcile)
	}
	var wait error
	if c.unknownWait < 0 || c.unknownWait > server.MaxUnknownWait {
		wait = fmt.Errorf("unknown-wait %s: want 0 to %s", c.unknownWait, server.MaxUnknownWait)
	}
	var rate error
	if _, ok := server.ParseRateLimit(c.rpsLimit); !ok {
		rate = fmt.Errorf("rps-limit %q: want two positive numbers, \"rate,burst\"", c.rpsLimit)
	}
	var admin error
	if _, _, err := net.SplitHostPort(c.adminAddr); c.adminAddr != "" && err != nil {
		admin = fmt.Errorf("admin %q: want host:port", c.adminAddr)
	}
	var region error
	if c.region == "" || strings.ContainsAny(c.region, ":/ ") {
		region = fmt.Errorf("region %q: want a name without ':', '/' and spaces", c.region)
	}
	var account error
	if len(c.account) != 12 || strings.Trim(c.account, "0123456789") != "" {
		account = fmt.Errorf("account %q: want 12 digits", c.account)
	}
	_, proxy := c.engineSocket()
	return errors.Join(
		oneOf("attach", c.attach, "auto", "tcx", "clsact"),
		oneOf("on-exit", c.onExit, "open", "drop"),
		oneOf("host-route", c.hostRoute, "on", "off"),
		oneOf("stats-source", c.statsSource, "auto", "cgroup", "docker"),
		oneOf("log-level", c.logLevel, levels...),
		oneOf("log-format", c.logFormat, "console", "json"),
		bridges, exit, reconcile, region, account, wait, rate, proxy, admin,
		atLeast("max-addresses", c.maxAddresses, 1),
		atLeast("max-conns-per-task", c.maxConns, 1),
		agentForm("agent-url", c.agentURL),
		agentForm("agent-introspection-url", c.introspection),
	)
}

// agentForm wants the form that the packages want, in terms of the flag.
func agentForm(name, v string) error {
	u, err := url.Parse(v)
	if v == "" || err == nil && u.Scheme == "http" && u.Hostname() != "" && strings.Trim(u.Path, "/") == "" && u.RawQuery == "" && u.User == nil {
		return nil
	}
	return fmt.Errorf("%s %q: want http://host:port, or nothing", name, v)
}

// agents is a variable of the agent's where metad's own values are stricter. For the agent a value that makes no
// sense stands for the default: metad must start on every host that the agent starts on.
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
func withAgents(own cli.ValueSourceChain, name string, read func(string) string) cli.ValueSourceChain {
	own.Chain = slices.Insert(own.Chain, 1, cli.ValueSource(agents{cli.EnvVar(name), name, read}))
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

// agentsLevel reads a level of the agent's, which has crit beside metad's own.
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

// engineSocket returns the Docker Engine's socket, if there is to be a proxy in front of it. To have DOCKER_HOST
// name the proxy is what its clients are told to do: metad itself would ask itself without end.
func (c *config) engineSocket() (string, error) {
	if c.proxySocket == "" {
		return "", nil
	}
	socket, ok := strings.CutPrefix(c.dockerHost, "unix://")
	if !ok {
		return "", fmt.Errorf("docker-proxy %q: needs a unix socket to stand in front of; docker-host is %q", c.proxySocket, c.dockerHost)
	}
	if resolved(socket) == resolved(c.proxySocket) {
		return "", fmt.Errorf("docker-host %q is metad's own proxy: want the Docker Engine's socket (is DOCKER_HOST set?)", c.dockerHost)
	}
	return socket, nil
}

// resolved returns p without symbolic links among its directories: /var/run is one to /run.
func resolved(p string) string {
	if dir, err := filepath.EvalSymlinks(filepath.Dir(p)); err == nil {
		return filepath.Join(dir, filepath.Base(p))
	}
	return filepath.Clean(p)
}

func (c *config) logger() (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(c.logLevel)
	if err != nil {
		return nil, fmt.Errorf("log-level: %w", err)
	}
	zc := zap.NewProductionConfig()
	zc.Level = zap.NewAtomicLevelAt(level)
	zc.Encoding = c.logFormat
	zc.DisableStacktrace, zc.DisableCaller = true, true
	zc.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	if c.logFormat == "console" {
		zc.EncoderConfig.ConsoleSeparator = " "
	}
	return zc.Build()
}

// configFile is the YAML file, read at the first look.
type configFile struct {
	path   string
	read   bool
	values map[string]string
	err    error
}

// load reads the file; a missing one is an error only where it was asked for by name.
func (f *configFile) load() {
	if f.read {
		return
	}
	f.read = true
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) && f.path == defaultConfigFile {
		return
	}
	if err != nil {
		f.err = fmt.Errorf("config: %w", err)
		return
	}
	var m map[string]any
	if err := yaml.Unmarshal(b, &m); err != nil {
		f.err = fmt.Errorf("config %q: %w", f.path, err)
		return
	}
	known := map[string]bool{}
	for _, fl := range new(config).flags() {
		known[fl.Names()[0]] = true
	}
	f.values = make(map[string]string, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if !known[k] || k == "config" {
			f.err = errors.Join(f.err, fmt.Errorf("config %q: unknown key %q", f.path, k))
			continue
		}
		switch v := m[k].(type) {
		case []any:
			parts := make([]string, len(v))
			for i := range v {
				parts[i] = fmt.Sprint(v[i])
			}
			f.values[k] = strings.Join(parts, ",")
		case map[string]any:
			f.err = errors.Join(f.err, fmt.Errorf("config %q: %s: want a value or a list", f.path, k))
		case nil:
		default:
			f.values[k] = fmt.Sprint(v)
		}
	}
}

// fileSource is one key of the file as a source of a flag's value.
type fileSource struct {
	file *configFile
	key  string
}

func (s *fileSource) Lookup() (string, bool) {
	s.file.load()
	v, ok := s.file.values[s.key]
	return v, ok
}
func (s *fileSource) String() string   { return "config file" }
func (s *fileSource) GoString() string { return "&fileSource{" + s.key + "}" }
