package child

import (
	"os/exec"
	"strings"
	"testing"
	"time"

	"metad/internal/expect"
)

// A process that handles SIGTERM ends with its own exit code, and all its output is kept.
func TestStop(t *testing.T) {
	script := `trap 'echo stopped; exit 7' TERM; echo started >&2; while :; do sleep 0.01; done`
	p := Start(t, exec.Command("/bin/sh", "-c", script), nil)
	t.Cleanup(p.Kill)
	expect.Until(t, "the first output", func() bool {
		return strings.Contains(p.Out.String(), "started")
	})
	p.Stop(t, time.Minute)
	if code, out := p.Cmd.ProcessState.ExitCode(), p.Out.String(); code != 7 ||
		out != "started\nstopped\n" || p.Out.Tail(3) != "ed\n" {
		t.Errorf("got exit code %d, output %q", code, out)
	}
}

// A process is gone after Kill, and Kill may be called again.
func TestKill(t *testing.T) {
	p := Start(t, exec.Command("sleep", "1000"), func(start func() error) error {
		return start()
	})
	p.Kill()
	p.Kill()
	if p.Cmd.ProcessState.Success() {
		t.Error("got success, want the end by a signal")
	}
}
