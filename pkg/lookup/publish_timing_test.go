package lookup

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// BenchmarkApply publishes a set of many tasks of which one has changed.
func BenchmarkApply(b *testing.B) {
	for _, n := range []int{100, 1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			set := make([]*task.Task, n)
			for i := range set {
				id := fmt.Sprintf("%032x", i)
				set[i] = newTask(id,
					task.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 0,
						byte(i >> 8), byte(i)}), Ifindex: 10 + i})
				for j := range 3 {
					set[i].Containers = append(set[i].Containers,
						&task.Container{ID: fmt.Sprintf("%s%032x", id, j),
							EndpointID: fmt.Sprintf("%s-%d", id, j)})
				}
			}
			table := New(heldMap{}, zap.NewNop())
			if err := table.Apply(set); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i = (i + 7) % n
				changed := *set[i]
				set = slices.Clone(set)
				set[i] = &changed
				if err := table.Apply(set); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
