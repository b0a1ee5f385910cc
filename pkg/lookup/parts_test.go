package lookup

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
)

// parts is a map, and changing the next one changes none of those before it.
func TestParts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var p parts[uint32, int]
	model := map[uint32]int{}
	for i := range 300 {
		before, had := p, maps.Clone(model)
		p = p.next()
		for range r.IntN(8) {
			k := r.Uint32N(200)
			if r.IntN(3) == 0 {
				p.delete(tagPart(k), k)
				delete(model, k)
			} else {
				p.set(tagPart(k), k, i)
				model[k] = i
			}
		}
		if got := maps.Collect(p.all()); !maps.Equal(got, model) {
			t.Fatalf("got %v, want %v", got, model)
		}
		if got := maps.Collect(before.all()); !maps.Equal(got, had) {
			t.Fatalf("what was there before: got %v, want %v", got, had)
		}
	}
}

// Endpoint ids, which end in the task's id and ten digits, are spread over the parts, and a reader
// that has bytes finds the part that a writer chose by a string.
func TestIDPart(t *testing.T) {
	used := map[int]int{}
	for i := range 1000 {
		id := fmt.Sprintf("cd189a933e5849daa93386466019ab50-%010d", i*7919)
		if idPart(id) != idPart([]byte(id)) {
			t.Fatal("a string and its bytes are in different parts")
		}
		used[idPart(id)]++
	}
	for part, n := range used {
		if n > 100 {
			t.Errorf("%d of 1000 ids are in part %d", n, part)
		}
	}
}
