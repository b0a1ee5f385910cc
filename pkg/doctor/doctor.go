// Package doctor checks what could keep metad from working on this host, and says what to do about
// it. It changes nothing.
package doctor

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Status is the severity of a finding. The values are the exit codes that monitoring systems
// expect.
type Status int

// A check's possible outcomes.
const (
	OK   Status = iota // nothing to do
	Warn               // metad works, but not as well, or not everywhere
	Fail               // metad does not work
)

var statusNames = []string{"ok", "warn", "fail"}

func (s Status) String() string { return statusNames[s] }

// MarshalText implements encoding.TextMarshaler.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Status) UnmarshalText(b []byte) error {
	i := slices.Index(statusNames, string(b))
	if i < 0 {
		return fmt.Errorf("no status %q", b)
	}
	*s = Status(i)
	return nil
}

// Check is one finding.
type Check struct {
	Name   string // of the thing that was checked: "kernel", "bridge docker0"
	Status Status
	Found  string // one line
	Do     string // what to do about it; empty when there is nothing
}

// Report is all findings, in the order of the checks.
type Report []Check

// Status returns the worst status found; it is the exit code of `metad doctor`.
func (r Report) Status() Status {
	worst := OK
	for _, c := range r {
		worst = max(worst, c.Status)
	}
	return worst
}

// WriteTo prints a line for each finding, and under it what to do.
func (r Report) WriteTo(w io.Writer) (int64, error) {
	width := 0
	for _, c := range r {
		width = max(width, len(c.Name))
	}
	var b strings.Builder
	for _, c := range r {
		fmt.Fprintf(&b, "%-4s  %-*s  %s\n", c.Status, width, c.Name, c.Found)
		if c.Do != "" {
			fmt.Fprintf(&b, "      %-*s  → %s\n", width, "", c.Do)
		}
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

// Config holds the values of the flags of `metad serve` with these names.
type Config struct {
	Bridges          []string // patterns, as in path.Match
	Attach           string   // "auto", "tcx" or "clsact"
	PinDir           string
	DockerHost       string // "unix:///…" or "tcp://…"
	NRISocket        string
	AgentURL         string // empty: no agent is asked
	IntrospectionURL string // empty: no agent is asked
	AdminSocket      string // path
}

// Run makes every check and returns the findings. A check that cannot be made is a finding, not an
// error. Network namespace and capabilities are the calling thread's. A check that asks another
// process waits two seconds at most, and not longer than ctx.
func Run(ctx context.Context, cfg Config) Report { return run(ctx, cfg, thisHost()) }

func run(ctx context.Context, cfg Config, h *host) Report {
	var r Report
	for _, check := range []func(context.Context, Config, *host) []Check{
		checkKernel, checkCapabilities, checkBTF, checkBPFFS, checkCgroup, checkProof,
		checkRunning, checkBridges, checkUnwatched, checkCrowd, checkBridgeNetfilter,
		checkAddress,
		checkRules, checkDocker, checkNRI, checkAgent,
	} {
		r = append(r, check(ctx, cfg, h)...)
	}
	return r
}
