package task

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// Diff tells each change between two sets once and nothing else: with it the first set becomes the
// second.
func TestDiff(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	now := map[string]*Task{}
	set := func() []*Task {
		return slices.SortedFunc(maps.Values(now), func(a, b *Task) int {
			return cmp.Compare(a.ARN, b.ARN)
		})
	}
	for range 1000 {
		before := set()
		model := maps.Clone(now)
		for range r.IntN(5) {
			arn := fmt.Sprint(r.IntN(12))
			switch r.IntN(3) {
			case 0:
				delete(now, arn)
			default:
				now[arn] = &Task{ARN: arn}
			}
		}
		for was, is := range Diff(before, set()) {
			if was == is {
				t.Fatalf("%v has not changed", was)
			}
			if was != nil {
				if model[was.ARN] != was {
					t.Fatalf("%v was not there", was)
				}
				delete(model, was.ARN)
			}
			if is != nil {
				if model[is.ARN] != nil {
					t.Fatalf("%v is still there", is.ARN)
				}
				model[is.ARN] = is
			}
		}
		if !maps.Equal(model, now) {
			t.Fatalf("got %v, want %v", model, now)
		}
	}
}
