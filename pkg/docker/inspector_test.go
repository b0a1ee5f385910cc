package docker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// inspected is an inspector whose looks a test answers, with a clock of its own: time passes only
// while everything waits.
type inspected struct {
	*inspector
	t       testing.TB
	ctx     context.Context
	begun   []string              // ids, in the order in which their looks began
	asked   chan string           // ids, when a look begins
	answers map[string]chan error // a look at a container without one ends at once
}

// inspect runs f in a bubble of its own.
func inspect(t *testing.T, f func(*inspected)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		i := &inspected{t: t, ctx: ctx, asked: make(chan string, 1000),
			answers: map[string]chan error{}}
		i.inspector = newInspector(func(ctx context.Context, f *finding) {
			i.asked <- f.id
			if answer := i.answers[f.id]; answer != nil {
				select {
				case f.err = <-answer:
				case <-ctx.Done():
					f.err = ctx.Err()
				}
			}
		}, func(string) (*description, int) { return nil, 0 })
		f(i)
		cancel()
		i.close()
	})
}

// hold makes the looks at a container wait for an answer.
func (i *inspected) hold(id string) chan error {
	i.answers[id] = make(chan error)
	return i.answers[id]
}

// settle does what is to be done until nothing moves but the clock.
func (i *inspected) settle() {
	for {
		i.dispatch(i.ctx)
		synctest.Wait()
		select {
		case id := <-i.asked:
			i.begun = append(i.begun, id)
		case f := <-i.findings:
			i.done(f)
			if f.err != nil {
				i.failed(f.id)
			} else {
				i.succeeded(f.id)
			}
		case again := <-i.due:
			again()
		default:
			return
		}
	}
}

func (i *inspected) wantBegun(ids ...string) {
	i.t.Helper()
	i.settle()
	if !slices.Equal(i.begun, ids) {
		i.t.Errorf("looks: got %v, want %v", i.begun, ids)
	}
	i.begun = nil
}

// TestInspectorPriorities: a container is looked at in the line of the highest priority that it is
// wanted at, once.
func TestInspectorPriorities(t *testing.T) {
	inspect(t, func(i *inspected) {
		var full []chan error
		for n := range places[priorityRecheck] {
			full = append(full, i.hold(fmt.Sprint("full", n)))
			i.want(fmt.Sprint("full", n), priorityRecheck)
		}
		i.settle()
		i.begun = nil
		i.want("a", priorityRecheck)
		i.want("b", priorityRecheck)
		i.want("b", priorityEvent)
		i.wantBegun("b")
		i.want("b", priorityCreated) // and it may be looked at again
		i.wantBegun("b")
		full[0] <- nil
		i.wantBegun("a")
	})
}

// TestInspectorWantedMeanwhile: what is wanted while a look is under way is looked at once more
// after it, and not beside it.
func TestInspectorWantedMeanwhile(t *testing.T) {
	inspect(t, func(i *inspected) {
		answer := i.hold("a")
		i.want("a", priorityRecheck)
		i.wantBegun("a")
		i.want("a", priorityEvent)
		i.want("a", priorityRecheck)
		i.wantBegun()
		answer <- nil
		i.wantBegun("a")
		answer <- nil
		i.wantBegun()
	})
}

// TestInspectorRetries: a failed look is taken again, later each time, at most 10 s later; and not
// before if nothing happens.
func TestInspectorRetries(t *testing.T) {
	inspect(t, func(i *inspected) {
		answer := i.hold("a")
		i.want("a", priorityEvent)
		i.wantBegun("a")
		last := time.Duration(0)
		for range 12 {
			answer <- errors.New("no answer")
			i.wantBegun()
			failed := time.Now()
			again := <-i.due
			if d := time.Since(failed); d < last || d > 10*time.Second {
				t.Fatalf("looked again after %v, the time before after %v", d, last)
			} else {
				last = d
			}
			again()
			i.wantBegun("a")
		}
		answer <- nil
		i.settle()
		if got := i.subjects["a"].tries; got != 0 {
			t.Errorf("%d tries are counted after one that succeeded", got)
		}
	})
}

// TestInspectorForgets: a container that is gone is not looked at again, and what a look finds
// after that is nobody's, also if there is another interest in the same id by then.
func TestInspectorForgets(t *testing.T) {
	inspect(t, func(i *inspected) {
		answer := i.hold("a")
		i.want("a", priorityEvent)
		i.wantBegun("a")
		i.forget("a")
		i.want("a", priorityEvent)
		i.dispatch(i.ctx)
		answer <- nil // to either
		f := <-i.findings
		if wanted := i.done(f); wanted != (f.subject == i.subjects["a"]) {
			t.Errorf("a look that was forgotten is wanted: %v", wanted)
		}
		answer <- nil
		i.settle()
		i.forget("a")
		if len(i.subjects) != 0 {
			t.Errorf("left: %v", i.subjects)
		}
	})
}

// TestInspectorTimeout: a look ends although the Engine does not answer.
func TestInspectorTimeout(t *testing.T) {
	inspect(t, func(i *inspected) {
		i.hold("a")
		i.want("a", priorityEvent)
		i.wantBegun("a")
		time.Sleep(inspectTimeout - time.Millisecond)
		if i.settle(); i.failures.Load() != 0 {
			t.Error("given up before its time")
		}
		time.Sleep(2 * time.Millisecond)
		if i.settle(); i.failures.Load() != 1 {
			t.Error("not given up")
		}
	})
}
