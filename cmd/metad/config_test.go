package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v3"
)

// parse runs the flags of serve alone and returns what came of them.
func parse(t *testing.T, args ...string) (*config, error) {
	t.Helper()
	var c config
	cmd := &cli.Command{
		Flags:     c.flags(),
		Writer:    &bytes.Buffer{},
		ErrWriter: &bytes.Buffer{},
		Action:    func(context.Context, *cli.Command) error { return c.validate() },
	}
	err := cmd.Run(context.Background(), append([]string{"metad"}, args...))
	return &c, err
}

func TestConfigPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "metad.yaml")
	yaml := "cluster: from-file\nregion: eu-west-1\nbridges: [br0, \"x-*\"]\nunknown-wait: " +
		"100ms\ntrust-bridge: true\n"
	if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("METAD_CONFIG", file)

	c, err := parse(t)
	if err != nil {
		t.Fatal(err)
	}
	if c.cluster != "from-file" || !slices.Equal(c.bridges, []string{"br0", "x-*"}) ||
		c.unknownWait != 100*time.Millisecond || !c.trustBridge {
		t.Errorf("file: got %+v", c)
	}
	t.Setenv("ECS_CLUSTER", "from-ecs")
	if c, _ = parse(t); c.cluster != "from-ecs" {
		t.Errorf("ECS_CLUSTER over the file: got %q", c.cluster)
	}
	t.Setenv("METAD_CLUSTER", "from-metad")
	if c, _ = parse(t); c.cluster != "from-metad" {
		t.Errorf("METAD_CLUSTER over ECS_CLUSTER: got %q", c.cluster)
	}
	if c, _ = parse(t, "--cluster", "from-flag"); c.cluster != "from-flag" {
		t.Errorf("flag over all: got %q", c.cluster)
	}
	if c.region != "eu-west-1" {
		t.Errorf("region from the file: got %q", c.region)
	}
}

func TestConfigErrorsNameTheField(t *testing.T) {
	file := filepath.Join(t.TempDir(), "metad.yaml")
	f := func(yaml string, args []string, want string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := parse(t, append(args, "--config", file)...); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("yaml %q, args %q: got %v, want an error with %q", yaml, args, err,
				want)
		}
	}
	f("clutser: x", nil, `unknown key "clutser"`)
	f("cluster: {a: b}", nil, "cluster: want a value or a list")
	f("\t", nil, "config")
	f("", []string{"--attach", "xdp"}, `attach "xdp"`)
	f("", []string{"--on-exit", "shut"}, `on-exit "shut"`)
	f("", []string{"--account", "12"}, `account "12"`)
	f("", []string{"--region", "a:b"}, `region "a:b"`)
	f("", []string{"--stats-source", "guess"}, `stats-source "guess"`)
	f("unknown-wait: soon", nil, "unknown-wait")
	f("", []string{"--unknown-wait", "2s"}, "unknown-wait 2s: want 0 to 400ms")
	f("unknown-wait: -1ms", nil, "unknown-wait -1ms")
	f("", []string{"--max-conns-per-task", "0"}, "max-conns-per-task 0: want at least 1")
	f("", []string{"--max-addresses", "0"}, "max-addresses 0: want at least 1")
	f("", []string{"--reconcile", "0s"}, "reconcile 0s")
	f("", []string{"--bridges", "[x"}, `bridges: bad pattern "[x"`)
	f("", []string{"--on-exit", "drop", "--attach", "tcx"}, "on-exit drop")
	f("", []string{"--container-metrics", "--disable-metrics"}, "container-metrics: there are none")
	f("", []string{"--admin", "51683"}, `admin "51683": want host:port`)
	f("", []string{"--docker-host", "tcp://127.0.0.1:2375"}, `docker-proxy "/run/metad/docker.sock": needs a unix socket`)
	f("", []string{"--docker-host", "unix:///run/metad/docker.sock"}, "is metad's own proxy")
	f("", []string{"--log-level", "crit"}, `log-level "crit"`)
	for _, rate := range []string{"garbage", "40", "0,60", "40,-1"} {
		f("", []string{"--rps-limit", rate}, `rps-limit "`+rate+`"`)
		f(`rps-limit: "`+rate+`"`, nil, `rps-limit "`+rate+`"`)
	}
	for _, url := range []string{"localhost:51679", "https://127.0.0.1:51679", "http://:51679",
		"http://127.0.0.1:51679/v2", "http://u@127.0.0.1"} {
		f("", []string{"--agent-url", url}, `agent-url "`+url+`"`)
		f("", []string{"--agent-introspection-url", url}, `agent-introspection-url "`+url+`"`)
	}
	if _, err := parse(t, "--docker-host", "tcp://127.0.0.1:2375", "--docker-proxy",
		""); err != nil {
		t.Errorf("without a proxy: got %v", err)
	}
	dir, link := t.TempDir(), filepath.Join(t.TempDir(), "run")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	f("", []string{"--docker-host", "unix://" + link + "/docker.sock", "--docker-proxy", dir + "/docker.sock"}, "is metad's own proxy")
	if _, err := parse(t, "--config", filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file asked for by name that is not there: got no error")
	}
}

// A scalar of the file is the text that stands there, whatever YAML would make of it, and "off"
// switches off what can be.
func TestConfigFileScalarsAreText(t *testing.T) {
	file := filepath.Join(t.TempDir(), "metad.yaml")
	f := func(yaml string, get func(*config) string, want string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := parse(t, "--config", file); err != nil || get(c) != want {
			t.Errorf("%q: got %q, %v, want %q", yaml, get(c), err, want)
		}
	}
	account := func(c *config) string { return c.account }
	f("account: 012345670123", account, "012345670123")
	f("account: 098765432109", account, "098765432109")
	f("account: '111122223333'", account, "111122223333")
	f("cluster: 0123", func(c *config) string { return c.cluster }, "0123")
	f("cluster: 1e3", func(c *config) string { return c.cluster }, "1e3")
	f("cluster: yes", func(c *config) string { return c.cluster }, "yes")
	f("host-route: off", func(c *config) string { return c.hostRoute }, "off")
	f("docker-proxy: off", func(c *config) string { return c.proxySocket }, "")
	f("admin: off", func(c *config) string { return c.adminAddr }, "")
	f("agent-url: off", func(c *config) string { return c.agentURL }, "")
	f("agent-introspection-url: off", func(c *config) string { return c.introspection }, "")
	f("rps-limit: off", func(c *config) string { return c.rpsLimit }, "")
	f("bridges: [0x10, br-1]", func(c *config) string { return strings.Join(c.bridges, " ") }, "0x10 br-1")
	f("# nothing\n", account, "000000000000")
	f("", account, "000000000000")
}

// An empty value, a list for a key that has none, and a key given twice are errors that name the
// key.
func TestConfigFileNamesTheKey(t *testing.T) {
	f := func(yaml, want string) {
		t.Helper()
		if _, err := parseConfig([]byte(yaml)); err == nil || !strings.Contains(err.Error(),
			want) {
			t.Errorf("%q: got %v, want %q", yaml, err, want)
		}
	}
	for _, empty := range []string{"docker-proxy:", `docker-proxy: ""`, "docker-proxy: ~",
		"docker-proxy: null", "docker-proxy: []", "docker-proxy: [a, ]\ncluster: [~]"} {
		f(empty, ": empty")
	}
	f("agent-url:", "agent-url: empty")
	f("cluster: a\ncluster: b", "cluster")
	f("- cluster", "want the flags' names as keys")
	f("bridges: [[a]]\ncluster: {a: b}", "cluster: want a value or a list")
}

// The agent starts with any value of its own variables (L09), so metad does.
func TestConfigOfTheAgent(t *testing.T) {
	t.Setenv("METAD_CONFIG", os.DevNull)
	f := func(get func(*config) string, flag, metad, ecs, value, want string) {
		t.Helper()
		t.Setenv(ecs, value)
		if metad != "" {
			t.Setenv(flag, metad)
			defer os.Unsetenv(flag)
		}
		if c, err := parse(t); err != nil || get(c) != want {
			t.Errorf("%s=%q %s=%q: got %q, %v, want %q", flag, metad, ecs, value,
				get(c), err, want)
		}
	}
	rate := func(metad, value, want string) {
		t.Helper()
		f(func(c *config) string { return c.rpsLimit }, "METAD_RPS_LIMIT", metad, "ECS_TASK_METADATA_RPS_LIMIT", value, want)
	}
	rate("", "", "")
	rate("", "100, 150", "100,150")
	rate("", "garbage", "40,60")
	rate("", "0,5", "40,60")
	rate("10,20", "garbage", "10,20")
	level := func(metad, value, want string) {
		t.Helper()
		f(func(c *config) string { return c.logLevel }, "METAD_LOG_LEVEL", metad, "ECS_LOGLEVEL", value, want)
	}
	level("", "debug", "debug")
	level("", "WARN", "warn")
	level("", "crit", "error")
	level("", "loud", "info")
	level("debug", "crit", "debug")
	selinux := func(metad, value, want string) {
		t.Helper()
		f(func(c *config) string { return fmt.Sprint(c.selinux) }, "METAD_SELINUX", metad, "ECS_SELINUX_CAPABLE", value, want)
	}
	selinux("", "", "false")
	selinux("", " true ", "true")
	selinux("", "yes", "false")
	selinux("false", "true", "false")
}

func TestHelpNamesTheVariables(t *testing.T) {
	var out, errs bytes.Buffer
	if code := run(context.Background(), []string{"metad", "serve", "--help"}, &out,
		&errs); code != 0 {
		t.Fatalf("got %d %s", code, errs.String())
	}
	for _, name := range []string{"METAD_RPS_LIMIT", "ECS_TASK_METADATA_RPS_LIMIT",
		"ECS_LOGLEVEL", "ECS_DISABLE_METRICS", "ECS_CLUSTER", "DOCKER_HOST"} {
		if !strings.Contains(out.String(), "$"+name) {
			t.Errorf("the help lacks %s", name)
		}
	}
}

func TestRunExitCodes(t *testing.T) {
	var out, errs bytes.Buffer
	if code := run(context.Background(), []string{"metad", "version"}, &out,
		&errs); code != 0 || !strings.HasPrefix(out.String(), "metad ") {
		t.Errorf("version: got %d %q", code, out.String())
	}
	f := func(want string, args ...string) {
		t.Helper()
		out.Reset()
		errs.Reset()
		if code := run(context.Background(), append([]string{"metad"}, args...), &out,
			&errs); code != 1 || out.Len() > 0 || errs.String() != want+"\n" {
			t.Errorf("%q: got %d, stdout %q, stderr %q, want 1 and the line %q", args,
				code, out.String(), errs.String(), want)
		}
	}
	f(`metad: attach "xdp": want one of auto, tcx, clsact`, "serve", "--attach", "xdp")
	f("metad: flag provided but not defined: -bogus; metad serve --help lists the flags",
		"serve", "--bogus")
	f(`metad: output "xml": want one of table, json, yaml`, "version", "-o", "xml")
	f(`metad: no command "bogus"; metad --help lists them`, "bogus")
	f(`metad: tasks: unexpected argument "all"`, "tasks", "all")
	f(`metad: serve: unexpected argument "x"`, "serve", "x")
	f(`metad: every 0s: want a positive duration`, "top", "--every", "0s")
}

// What an entrypoint goes by.
func TestWaitFileExitCodes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "metadata.json")
	f := func(content, variable string, want int, message string, args ...string) {
		t.Helper()
		t.Setenv("ECS_CONTAINER_METADATA_FILE", variable)
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var errs bytes.Buffer
		code := run(context.Background(), append([]string{"metad", "wait-file", "--timeout",
			"50ms"}, args...), &bytes.Buffer{}, &errs)
		if code != want || !strings.Contains(errs.String(), message) ||
			(message == "") != (errs.Len() == 0) {
			t.Errorf("%q, variable %q, args %q: got %d %q, want %d %q", content,
				variable, args, code, errs.String(), want, message)
		}
	}
	ready := `{"MetadataFileStatus": "READY"}`
	f(ready, file, 0, "")
	f(ready, "", 0, "", file)
	f(ready, "/nonexistent", 0, "", file)
	f("{}", file, 1, "metad: wait for metadata file "+file)
	f(ready[:9], file, 1, "metad: wait for metadata file "+file)
	f(ready, file+"x", 1, "no such file")
	f(ready, "", 1, "ECS_CONTAINER_METADATA_FILE is not set")
	f(ready, "", 1, "unexpected argument", file, file)
}
