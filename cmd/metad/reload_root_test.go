//go:build root && systemd

package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"metad/internal/expect"
	"metad/internal/testdocker"
)

// A reload under load fails no request and keeps the process. What the file says counts from then
// on; what needs a restart stays and is named; a file with an error changes nothing.
func TestRootReload(t *testing.T) {
	const reloads = 5
	h := testdocker.Start(t)
	putAgentBehind(t, h) // its answer would mean that packets went past metad
	d := newProcess(t, h)
	file := filepath.Join(d.dir, "metad.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("cluster: zero\n")
	d.start("--config", file)
	d.waitReady()
	plain := h.Run(t, testdocker.Container{})
	cluster := func(want string) {
		t.Helper()
		expect.Until(t, "cluster "+want, func() bool {
			out, _, err := h.TryExec(plain, "timeout", "8", "wget", "-qO-",
				"http://169.254.170.2/v2/metadata")
			return err == nil && strings.Contains(out, `"Cluster":"`+want+`"`)
		})
	}
	cluster("zero")
	l := startLoad(t, h, 2, 32)
	hangUp := func() {
		t.Helper()
		if err := d.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	for i := range reloads {
		name := string(rune('a' + i))
		write("cluster: " + name + "\nmax-addresses: 77\n")
		hangUp()
		cluster(name)
		n := l.requests()
		expect.Until(t, "requests", func() bool { return l.requests() >= n+500 })
	}
	write("cluster: wrong\nrps-limit: many\n")
	hangUp()
	expect.Until(t, "the refusal", func() bool {
		return strings.Contains(d.out.String(), "refused, the old one stays")
	})
	cluster(string(rune('a' + reloads - 1)))
	l.end()
	t.Logf("%d reloads: %d requests, %d right, %d wrong, %d by the agent, %d failed, %d "+
		"slower than a second", reloads, l.requests(), l.right, len(l.wrong), l.agent,
		len(l.failed), len(l.slow))
	if l.right != l.requests() {
		t.Errorf("first of the wrong: %v, of the failed: %v", first(l.wrong),
			first(l.failed))
	}
	if n := strings.Count(d.out.String(), `"need_restart": ["max-addresses"]`); n < reloads {
		t.Errorf("max-addresses named %d times, want %d", n, reloads)
	}
	if code := d.stop(); code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
}
