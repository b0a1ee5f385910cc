package lookup

import (
	"testing"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// A view's channel is closed by the first publication without that view, for everybody who asked,
// and by no other; of a view that is no more it is closed at once.
func TestChanged(t *testing.T) {
	table := New(newFakeKernel(), zap.NewNop())
	one, two := newTask("a", endpoint(1, 1)), newTask("b", endpoint(2, 2))
	set := func(tasks ...*task.Task) {
		t.Helper()
		apply(t, table, tasks...)
	}
	set(one, two)
	view := table.Views()[0]
	first, second, other := table.Changed(view), table.Changed(view),
		table.Changed(table.Views()[1])
	is := func(ch <-chan struct{}, want bool) {
		t.Helper()
		select {
		case <-ch:
			if !want {
				t.Error("told of a change")
			}
		default:
			if want {
				t.Error("not told of a change")
			}
		}
	}
	set(one, two)
	is(first, false)
	again := *one
	set(&again, two)
	is(first, true)
	is(second, true)
	is(other, false)
	is(table.Changed(view), true)
	next := table.Changed(table.Views()[0])
	set(two)
	is(next, true)
	is(other, false)
	if n := len(table.watched); n != 1 {
		t.Errorf("%d views watched, want 1", n)
	}
}
