package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Each value comes with its source: what would be used if metad serve were started the same way.
func TestConfigCommandNamesSources(t *testing.T) {
	file := filepath.Join(t.TempDir(), "metad.yaml")
	if err := os.WriteFile(file, []byte("cluster: c\nbridges: [a, b]\nregion: r\n"+
		"unknown-wait: 1ms\npprof: true\nadmin: off\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("METAD_REGION", "from-metad")
	t.Setenv("METAD_RECONCILE", "") // an empty duration is none
	t.Setenv("METAD_AVAILABILITY_ZONE", "")
	t.Setenv("ECS_LOGLEVEL", "crit")
	code, out, errs := command("config", "-o", "json", "--config", file, "--account",
		"111122223333", "--selinux", "--max-conns-per-task", "1024")
	var all []setting
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != codeOK {
		t.Fatalf("got %d %s %v", code, errs, err)
	}
	got := map[string]setting{}
	for _, s := range all {
		got[s.Key] = s
	}
	for _, want := range []setting{
		{"config", file, "flag"},
		{"cluster", "c", file},
		{"bridges", "a,b", file},
		{"unknown-wait", "1ms", file},
		{"pprof", "true", file},
		{"admin", off, file},
		{"region", "from-metad", "METAD_REGION"},
		{"availability-zone", "", "METAD_AVAILABILITY_ZONE"},
		{"log-level", "error", "ECS_LOGLEVEL"},
		{"account", "111122223333", "flag"},
		{"selinux", "true", "flag"},
		{"max-conns-per-task", "1024", "flag"},
		{"reconcile", "30s", "default"},
		{"rps-limit", off, "default"},
		{"host-route", "on", "default"},
	} {
		if got[want.Key] != want {
			t.Errorf("%s: got %+v, want %+v", want.Key, got[want.Key], want)
		}
	}
	if len(all) != len(new(config).flags()) {
		t.Errorf("got %d values, want all %d", len(all), len(new(config).flags()))
	}
	if code, out, errs := command("config", "--config", file, "--attach", "xdp"); code !=
		codeError || !strings.Contains(out, "cluster") || !strings.Contains(errs, `"xdp"`) {
		t.Errorf("a bad value: got %d %s %s", code, out, errs)
	}
}

// Everything that is wrong with a file is named with its line, whatever the environment says.
func TestConfigCheck(t *testing.T) {
	t.Setenv("METAD_ATTACH", "from the environment")
	file := filepath.Join(t.TempDir(), "metad.yaml")
	f := func(content string, wantCode int, want ...string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		code, out, errs := command("config", "--check", file)
		all := strings.TrimPrefix(out+errs, "metad: ")
		lines := strings.Split(strings.TrimSpace(all), "\n")
		if code != wantCode || len(lines) != len(want) {
			t.Errorf("%q: got %d %q, want %d %q", content, code, lines, wantCode, want)
			return
		}
		for i, w := range want {
			if !strings.HasPrefix(lines[i], file+w) {
				t.Errorf("%q: got %q, want %q", content, lines[i], file+w)
			}
		}
	}
	f("cluster: c\n", codeOK, ": ok")
	f("", codeOK, ": ok")
	f("# a comment\nclutser: x\nattach: xdp\nunknown-wait: soon\n\nrps-limit: off\n"+
		"account: 12\nregion:\n", codeError,
		`:2: unknown key "clutser"`, `:8: region: empty`, `:4: unknown-wait "soon"`,
		`:3: attach "xdp"`, `:7: account "12"`)
	f("cluster: c\ndocker-host: tcp://127.0.0.1:2375\n", codeError, ":2: docker-proxy ")
	f("a: b: c", codeError, ": yaml: ")
	f("\x1b[2J: x", codeError, ": yaml: ")
	if code, _, errs := command("config", "--check", file+"x"); code != codeError ||
		!strings.Contains(errs, "no such file") {
		t.Errorf("no file: got %d %s", code, errs)
	}
}
