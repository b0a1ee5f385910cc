package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"metad/pkg/loader"
	"metad/pkg/server"
)

// validate names every field with an invalid value. The packages check their own.
func (c *config) validate() error {
	if err := c.file.err; err != nil {
		return err
	}
	_, proxy := c.engineSocket()
	return errors.Join(
		oneOf("attach", c.attach, "auto", "tcx", "clsact"),
		oneOf("on-exit", c.onExit, "open", "drop"),
		oneOf("host-route", c.hostRoute, "on", "off"),
		oneOf("nri", c.nri, "auto", "on", "off"),
		oneOf("stats-source", c.statsSource, "auto", "cgroup", "docker"),
		oneOf("log-level", c.logLevel, levels...),
		oneOf("log-format", c.logFormat, "console", "json"),
		c.validateDataPath(),
		c.validateTasks(),
		c.validateRequests(),
		c.validateContainerMetrics(),
		proxy,
	)
}

func (c *config) validateContainerMetrics() error {
	if c.containerMetrics && c.disableMetrics {
		return errors.New("container-metrics: there are none with disable-metrics")
	}
	return nil
}

func (c *config) validateDataPath() error {
	var errs []error
	for _, p := range c.bridges {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			errs = append(errs, fmt.Errorf("bridges: bad pattern %q", p))
		}
	}
	if c.onExit == string(loader.OnExitDrop) && c.attach == string(loader.AttachTCX) {
		errs = append(errs, errors.New(
			"on-exit drop: nothing stays to drop with after attach tcx; use clsact"))
	}
	return errors.Join(append(errs, atLeast("max-addresses", c.maxAddresses, 1))...)
}

func (c *config) validateTasks() error {
	var errs []error
	if c.reconcile <= 0 {
		errs = append(errs, fmt.Errorf("reconcile %s: want a positive duration",
			c.reconcile))
	}
	if c.region == "" || strings.ContainsAny(c.region, ":/ ") {
		errs = append(errs, fmt.Errorf("region %q: want a name without ':', '/' and spaces",
			c.region))
	}
	if len(c.account) != 12 || strings.Trim(c.account, "0123456789") != "" {
		errs = append(errs, fmt.Errorf("account %q: want 12 digits", c.account))
	}
	return errors.Join(errs...)
}

func (c *config) validateRequests() error {
	var errs []error
	if c.unknownWait < 0 || c.unknownWait > server.MaxUnknownWait {
		errs = append(errs, fmt.Errorf("unknown-wait %s: want 0 to %s", c.unknownWait,
			server.MaxUnknownWait))
	}
	if _, ok := server.ParseRateLimit(c.rpsLimit); !ok {
		errs = append(errs,
			fmt.Errorf("rps-limit %q: want two positive numbers, \"rate,burst\"",
				c.rpsLimit))
	}
	if _, _, err := net.SplitHostPort(c.introspect); c.introspect != "" && err != nil {
		errs = append(errs, fmt.Errorf("introspection %q: want host:port", c.introspect))
	}
	if _, _, err := net.SplitHostPort(c.adminAddr); c.adminAddr != "" && err != nil {
		errs = append(errs, fmt.Errorf("admin %q: want host:port", c.adminAddr))
	}
	return errors.Join(append(errs,
		atLeast("max-conns-per-task", c.maxConns, 1),
		agentForm("agent-url", c.agentURL),
		agentForm("agent-introspection-url", c.introspection),
	)...)
}

func oneOf(name, v string, of ...string) error {
	if slices.Contains(of, v) {
		return nil
	}
	return fmt.Errorf("%s %q: want one of %s", name, v, strings.Join(of, ", "))
}

func atLeast(name string, v, least int) error {
	if v >= least {
		return nil
	}
	return fmt.Errorf("%s %d: want at least %d", name, v, least)
}

// agentForm checks the form that the packages require. Its error names the flag.
func agentForm(name, v string) error {
	u, err := url.Parse(v)
	if v == "" || err == nil && u.Scheme == "http" && u.Hostname() != "" &&
		strings.Trim(u.Path, "/") == "" && u.RawQuery == "" && u.User == nil {
		return nil
	}
	return fmt.Errorf("%s %q: want http://host:port, or nothing", name, v)
}

// engineSocket returns the Docker Engine's socket, if there is a proxy in front of it. Clients of
// the proxy set DOCKER_HOST to the proxy. If metad itself read that, it would connect to itself
// without end.
func (c *config) engineSocket() (string, error) {
	if c.proxySocket == "" {
		return "", nil
	}
	socket, ok := strings.CutPrefix(c.dockerHost, "unix://")
	if !ok {
		return "", fmt.Errorf(
			"docker-proxy %q: needs a unix socket to stand in front of; docker-host "+
				"is %q",
			c.proxySocket, c.dockerHost)
	}
	if resolved(socket) == resolved(c.proxySocket) {
		return "", fmt.Errorf(
			"docker-host %q is metad's own proxy: want the Docker Engine's socket "+
				"(is DOCKER_HOST set?)",
			c.dockerHost)
	}
	return socket, nil
}

// resolved returns p without symbolic links among its directories: /var/run is a link to /run.
func resolved(p string) string {
	if dir, err := filepath.EvalSymlinks(filepath.Dir(p)); err == nil {
		return filepath.Join(dir, filepath.Base(p))
	}
	return filepath.Clean(p)
}
