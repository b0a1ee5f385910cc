package lookup

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/task"
)

// heldMap is a kernel map that can be looked into.
type heldMap map[netip.Addr]bpf.MetadTaskValue

func (m heldMap) Put(a netip.Addr, v *bpf.MetadTaskValue) error { m[a] = *v; return nil }
func (m heldMap) Delete(a netip.Addr) error                     { delete(m, a); return nil }
func (m heldMap) Entries() (map[netip.Addr]bpf.MetadTaskValue, error) {
	return nil, nil
}

// Whatever sets a table was given before, it says of the last one what a table says that has seen no other, except
// of an address that two claim.
func TestHistoryDoesNotShow(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := func(i int) *task.Task {
		tk := &task.Task{ARN: fmt.Sprintf("arn:task/%d", i), ID: fmt.Sprint(i)}
		for j := range 1 + r.IntN(3) {
			c := &task.Container{ID: fmt.Sprintf("%061x%03x", 0xabc000+i, j), DockerName: fmt.Sprintf("name-%d-%d", i, j), Stats: &task.StatsCell{}}
			if j > 0 { // in the network of another container, of its own task mostly
				of := i
				if r.IntN(6) == 0 {
					of = r.IntN(8)
				}
				c.NetworkMode = [...]string{"container:" + fmt.Sprintf("%061x%03x", 0xabc000+of, 0), "container:" + fmt.Sprintf("name-%d-0", of), "bridge"}[r.IntN(3)]
			}
			tk.Containers = append(tk.Containers, c)
		}
		tk.Endpoints = []task.Endpoint{{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + r.IntN(12))}), Ifindex: 10 + i, Container: tk.Containers[0].ID}}
		return tk
	}
	says := func(table *Table, disputed map[netip.Addr]bool) map[string]string {
		out := map[string]string{}
		s := table.snap.Load()
		for _, v := range s.byTag {
			addr := v.Task.Endpoints[0].Addr
			who := "nobody"
			if c := v.Only(addr); c != nil {
				who = c.ID
			}
			out[v.Task.ARN] = fmt.Sprintf("%s is at %v: %v", who, addr, disputed[addr] || s.byAddr[addr].view == v)
		}
		return out
	}
	kernel := heldMap{}
	table := New(kernel, zap.NewNop())
	tasks := map[int]*task.Task{}
	for range 500 {
		for range 1 + r.IntN(3) {
			if i := r.IntN(8); tasks[i] != nil && r.IntN(3) == 0 {
				delete(tasks, i)
			} else {
				tasks[i] = random(i)
			}
		}
		set := slices.Collect(maps.Values(tasks))
		freshKernel := heldMap{}
		fresh := New(freshKernel, zap.NewNop())
		for _, tb := range []*Table{table, fresh} {
			if err := tb.Apply(set); err != nil {
				t.Fatal(err)
			}
		}
		claimed, disputed := map[netip.Addr]bool{}, map[netip.Addr]bool{}
		for _, tk := range set {
			a := tk.Endpoints[0].Addr
			claimed[a], disputed[a] = true, claimed[a]
		}
		if got, want := says(table, disputed), says(fresh, disputed); !maps.Equal(got, want) {
			t.Fatalf("got\n%v\nwant\n%v", got, want)
		}
		if !slices.Equal(slices.Sorted(addrs(kernel, disputed)), slices.Sorted(addrs(freshKernel, disputed))) {
			t.Fatalf("the kernel has %v, want %v", kernel, freshKernel)
		}
	}
}

// addrs are the map's entries without their tags, and without those that are left out.
func addrs(m heldMap, out map[netip.Addr]bool) iter.Seq[string] {
	return func(yield func(string) bool) {
		for a, v := range m {
			if !out[a] && !yield(fmt.Sprint(a, v.Ifindex, v.TaskId)) {
				return
			}
		}
	}
}
