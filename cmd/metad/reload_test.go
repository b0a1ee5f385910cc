package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// reloaded is a metad that runs with a file, as far as a reload needs one.
type reloaded struct {
	t    *testing.T
	path string
	d    *daemon
	logs *observer.ObservedLogs
}

func newReloaded(t *testing.T, file string, args ...string) (*reloaded, []string) {
	t.Helper()
	r := &reloaded{t: t, path: filepath.Join(t.TempDir(), "metad.yaml")}
	r.write(file)
	args = append([]string{"metad", "serve", "--config", r.path}, args...)
	c, err := parseServe(args)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.logger(); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zap.DebugLevel)
	r.d, r.logs = &daemon{cfg: c, log: zap.New(core)}, logs
	return r, args
}

func (r *reloaded) write(file string) {
	r.t.Helper()
	if err := os.WriteFile(r.path, []byte(file), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// said returns the fields of the last line of the log, which has the message.
func (r *reloaded) said(message string) map[string]any {
	r.t.Helper()
	all := r.logs.All()
	if len(all) == 0 || all[len(all)-1].Message != message {
		r.t.Fatalf("got %+v, want %q", all, message)
	}
	return all[len(all)-1].ContextMap()
}

// keys are the names that a field of said has.
func keys(field any) (names []string) {
	list, _ := field.([]any)
	for _, name := range list {
		names = append(names, name.(string))
	}
	return names
}

// A reload says by key what has changed and what needs a restart. The log's level changes at once;
// for anything else metad has to execute itself, but not for what needs a restart.
func TestReload(t *testing.T) {
	const before = "cluster: one\nlog-level: info\n"
	for _, c := range []struct {
		name, file string
		now, later []string
		execute    bool
	}{
		{"nothing", before, nil, nil, false},
		{"level", "cluster: one\nlog-level: debug\n", []string{"log-level"}, nil, false},
		{"two", "cluster: two\nrps-limit: 40,60\n",
			[]string{"cluster", "rps-limit"}, nil, true},
		{"later", before + "pin-dir: /sys/fs/bpf/other\nmax-addresses: 9\n", nil,
			[]string{"max-addresses", "pin-dir"}, false},
		{"both", before + "bridges: [br0]\nattach: clsact\n", []string{"bridges"},
			[]string{"attach"}, true},
		// a flag of the command line wins over the file
		{"hidden", before + "region: eu-west-1\n", nil, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, args := newReloaded(t, before, "--region", "us-east-2")
			r.write(c.file)
			if got := r.d.reload(args); got != c.execute {
				t.Errorf("execute: got %v, want %v", got, c.execute)
			}
			said := r.said("configuration read again")
			now, later := keys(said["changed"]), keys(said["need_restart"])
			if !slices.Equal(now, c.now) || !slices.Equal(later, c.later) {
				t.Errorf("got %v, %v, want %v, %v", now, later, c.now, c.later)
			}
			debug := r.d.cfg.level.Enabled(zap.DebugLevel)
			if debug != (c.name == "level") {
				t.Errorf("debug is logged: %v", debug)
			}
		})
	}
}

// A file with an error is refused as a whole, by the name of the key, and the old configuration
// stays.
func TestReloadRefused(t *testing.T) {
	for _, c := range []struct{ file, key string }{
		{"cluster: two\nlog-level: debug\nrps-limit: many\n", "rps-limit"},
		{"log-level: debug\nclutser: two\n", "clutser"},
		{"log-level: debug\nunknown-wait: soon\n", "unknown-wait"},
		{"log-level: debug\ndocker-host: 'nowhere://'\ndocker-proxy: off\n", "docker-host"},
	} {
		r, args := newReloaded(t, "cluster: one\n")
		r.write(c.file)
		if r.d.reload(args) {
			t.Errorf("%q: executes", c.file)
		}
		said := r.said("the new configuration is refused, the old one stays")
		if err, _ := said["error"].(string); !strings.Contains(err, c.key) {
			t.Errorf("%q: got %q, want %s named", c.file, err, c.key)
		}
		if r.d.cfg.cluster != "one" || r.d.cfg.level.Enabled(zap.DebugLevel) {
			t.Errorf("%q: has an effect", c.file)
		}
	}
}
