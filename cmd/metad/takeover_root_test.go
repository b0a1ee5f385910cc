//go:build root

package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"metad/internal/testdocker"
)

// One of two is killed at one moment after the other of a takeover: the one that is left answers,
// and knows tasks that come afterwards.
func TestRootTakeoverKilled(t *testing.T) {
	const rounds, step = 16, 40 * time.Millisecond // a takeover takes some 300 ms
	h := testdocker.Start(t)
	putAgentBehind(t, h)
	d := startMetad(t, h)
	l := startLoad(t, h, 2, 16)
	outcome := map[string]int{}
	for i := range rounds {
		next := &process{t: t, host: h, dir: d.dir, pins: d.pins}
		t.Cleanup(next.kill)
		next.start()
		time.Sleep(time.Duration(i/2) * step)
		victim, other, what := next, d, "new one killed: "
		if i%2 == 1 {
			victim, other, what = d, next, "old one killed: "
		}
		victim.kill()
		survivor := other
		if victim == next {
			// The old one serves, unless it had left all to the other already and is
			// about to end.
			select {
			case <-d.done:
				what += "it was over"
				survivor = &process{t: t, host: h, dir: d.dir, pins: d.pins}
				t.Cleanup(survivor.kill)
				survivor.start()
			case <-time.After(1500 * time.Millisecond):
				what += "the old one serves"
			}
		} else {
			what += "the new one serves"
		}
		outcome[what]++
		survivor.waitReady()
		n := l.rightNow()
		waitFor(t, "right answers after round "+fmt.Sprint(i), func() bool { return l.rightNow() > n+100 })
		if i%4 > 1 {
			task := h.RunTask(t, testdocker.Task{ID: fmt.Sprint("late-", i),
				Containers: []testdocker.Container{{Name: "app"}}})
			waitFor(t, "a task that came later", func() bool {
				out, _, err := h.TryExec(task.Containers[0], "wget", "-qO-",
					"http://169.254.170.2/v2/metadata")
				return err == nil && strings.Contains(out, task.ARN)
			})
		}
		d = survivor
	}
	l.end()
	hung := l.hung()
	t.Logf("%v: %d requests, %d right, %d by the agent, %d wrong, %d refused or reset, %d "+
		"slower than a second, %d hung",
		outcome, l.requests(), l.right, l.agent, len(l.wrong), len(l.failed), len(l.slow),
		len(hung))
	// Connections that a killed process had are reset, not left hanging; were its links to go
	// first, every round would leave many.
	if len(l.wrong) > 0 || len(hung) > 0 {
		t.Errorf("wrong: %v, hung: %v", first(l.wrong), first(hung))
	}
	if code := d.stop(); code != 0 {
		t.Errorf("the last one: got exit code %d, want 0\n%s", code, d.out)
	}
}

func (l *load) rightNow() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.right
}
