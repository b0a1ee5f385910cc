package docker

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"metad/pkg/task"
)

// The set that is published after any changes is all tasks, ordered by ARN, and the sets before it
// stay as they were.
func TestSetIsWhole(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	s := &state{tasks: map[string]*task.Task{}}
	var last, copied []*task.Task
	for range 500 {
		for range r.IntN(6) {
			arn := fmt.Sprint(r.IntN(20))
			if delete(s.tasks, arn); r.IntN(3) > 0 {
				s.tasks[arn] = &task.Task{ARN: arn}
			}
			s.renewed = append(s.renewed, arn)
		}
		set := s.set()
		if !slices.Equal(last, copied) {
			t.Fatal("a set that was published has changed")
		}
		for i, tk := range set {
			if s.tasks[tk.ARN] != tk || i > 0 && set[i-1].ARN >= tk.ARN {
				t.Fatalf("%d: %s is not a task or not in order", i, tk.ARN)
			}
		}
		if len(set) != len(s.tasks) {
			t.Fatalf("got %d tasks, want %d", len(set), len(s.tasks))
		}
		last, copied = set, slices.Clone(set)
	}
}
