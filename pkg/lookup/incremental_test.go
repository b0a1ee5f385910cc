package lookup

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/task"
)

func byARN(a, b *task.Task) int { return cmp.Compare(a.ARN, b.ARN) }

// heldMap is a kernel map that can be looked into.
type heldMap map[netip.Addr]bpf.MetadTaskValue

func (m heldMap) Put(a netip.Addr, v *bpf.MetadTaskValue) error { m[a] = *v; return nil }
func (m heldMap) Delete(a netip.Addr) error                     { delete(m, a); return nil }
func (m heldMap) Entries() (map[netip.Addr]bpf.MetadTaskValue, error) {
	return nil, nil
}

// Whatever sets a table was given before, it says of the last one what a table says that has seen
// no other, except of an address that two claim.
func TestHistoryDoesNotShow(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := func(i int) *task.Task {
		tk := &task.Task{ARN: fmt.Sprintf("arn:task/%d", i), ID: fmt.Sprint(i)}
		for j := range 1 + r.IntN(3) {
			c := &task.Container{ID: fmt.Sprintf("%061x%03x", 0xabc000+i, j),
				DockerName: fmt.Sprintf("name-%d-%d", i, j),
				Stats:      &task.StatsCell{}, PID: 1,
				EndpointID: [...]string{"", fmt.Sprint(i, "-", j),
					fmt.Sprint(r.IntN(6))}[r.IntN(3)],
				Type: [...]task.ContainerType{task.TypeNormal,
					task.TypeCNIPause}[r.IntN(3)/2],
				KnownStatus: [...]task.Status{task.StatusRunning,
					task.StatusStopped}[r.IntN(8)/7],
				Cgroup: task.Cgroup{ID: [...]uint64{0,
					uint64(100 + 10*i + j)}[r.IntN(2)], Level: 3}}
			if j > 0 { // in the network of another container, of its own task mostly
				of := i
				if r.IntN(3) == 0 {
					of = r.IntN(8)
				}
				id := fmt.Sprintf("%061x%03x", 0xabc000+of, r.IntN(3))
				name := fmt.Sprintf("name-%d-%d", of, r.IntN(2))
				c.NetworkMode = [...]string{"container:" + id, "container:" + name,
					"bridge"}[r.IntN(3)]
			}
			tk.Containers = append(tk.Containers, c)
		}
		tk.Endpoints = []task.Endpoint{
			{Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + r.IntN(12))}), Ifindex: 10 + i, Container: tk.Containers[0].ID}}
		return tk
	}
	says := func(table *Table, disputed map[netip.Addr]bool) map[string]string {
		out := map[string]string{}
		s := table.snap.Load()
		for _, v := range s.tags.all() {
			addr := v.Task.Endpoints[0].Addr
			owner, _ := s.byAddr(addr)
			who := "nobody"
			if c := v.Only(addr); c != nil {
				who = c.ID
			}
			out[v.Task.ARN] = fmt.Sprintf("%s is at %v: %v", who, addr,
				disputed[addr] || owner.view == v)
		}
		return out
	}
	kernel := heldMap{}
	table := New(kernel, zap.NewNop())
	table.NameContainers(newFakeContainers())
	tasks := map[int]*task.Task{}
	for range 1000 {
		for range 1 + r.IntN(3) {
			if i := r.IntN(8); tasks[i] != nil && r.IntN(3) == 0 {
				delete(tasks, i)
			} else {
				tasks[i] = random(i)
			}
		}
		set := slices.SortedFunc(maps.Values(tasks), byARN)
		if r.IntN(4) == 0 {
			if err := table.PortGone(10 + r.IntN(8)); err != nil {
				t.Fatal(err)
			}
			wantWhole(t, table)
			for i := range 8 {
				if err := table.PortCame(10 + i); err != nil {
					t.Fatal(err)
				}
				wantWhole(t, table)
			}
		}
		freshKernel := heldMap{}
		fresh := New(freshKernel, zap.NewNop())
		for _, tb := range []*Table{table, fresh} {
			if err := tb.Apply(set); err != nil {
				t.Fatal(err)
			}
		}
		wantWhole(t, table)
		claimed, disputed := map[netip.Addr]bool{}, map[netip.Addr]bool{}
		for _, tk := range set {
			a := tk.Endpoints[0].Addr
			claimed[a], disputed[a] = true, claimed[a]
		}
		if got, want := says(table, disputed), says(fresh, disputed); !maps.Equal(got,
			want) {
			t.Fatalf("got\n%v\nwant\n%v", got, want)
		}
		if !slices.Equal(slices.Sorted(addrs(kernel, disputed)),
			slices.Sorted(addrs(freshKernel, disputed))) {
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

// wantWhole checks that publishing only what had changed has led to what publishing everything
// leads to: the claims are those of the tasks, and a whole publication finds nothing to do.
func wantWhole(t *testing.T, table *Table) {
	t.Helper()
	if table.failed {
		return // something is left to do
	}
	made := newClaims()
	for _, tk := range table.shown {
		made.add(table.tags[tk.ARN], tk)
	}
	if got, want := sorted(table.claims), sorted(made); !reflect.DeepEqual(got, want) {
		t.Fatalf("got claims\n%v\nwant\n%v", got, want)
	}
	if len(table.tags) != len(table.shown) {
		t.Fatalf("got %d tags, want %d", len(table.tags), len(table.shown))
	}
	before := table.snap.Load()
	all := guestsOf(slices.Collect(maps.Values(maps.Collect(before.tags.all()))))
	for _, v := range before.tags.all() {
		if v.withAskers(all) != v {
			t.Fatalf("task %s: who may ask is not what the containers of all tasks say",
				v.Task.ARN)
		}
	}
	type told struct{ dispute, copied, gone, written, provable any }
	state := func() told {
		yes, no := table.Provable()
		return told{maps.Clone(table.dispute), maps.Clone(table.copied),
			maps.Clone(table.gone), maps.Clone(table.written), [2]int{yes, no}}
	}
	was := state()
	wasNamed := maps.Clone(table.containers.written)
	if !table.applied {
		return
	}
	table.failed, table.containers.behind = true, table.containers.kernel != nil
	if err := table.Retry(); err != nil {
		t.Fatal(err)
	}
	after := table.snap.Load()
	if !maps.Equal(maps.Collect(before.tags.all()), maps.Collect(after.tags.all())) ||
		!maps.Equal(maps.Collect(before.addrs.all()), maps.Collect(after.addrs.all())) ||
		!maps.Equal(maps.Collect(before.endpoints.all()),
			maps.Collect(after.endpoints.all())) {
		t.Fatalf("a whole publication gives readers something else:\n%v\n%v", before, after)
	}
	if is := state(); !reflect.DeepEqual(was, is) {
		t.Fatalf("a whole publication leads from\n%v\nto\n%v", was, is)
	}
	if !maps.Equal(wasNamed, table.containers.written) {
		t.Fatalf("a whole publication names other containers:\n%v\n%v", wasNamed,
			table.containers.written)
	}
}

// sorted returns the claims as maps of lists in order.
func sorted(cs claims) [5]map[string][]string {
	var out [5]map[string][]string
	put := func(i int, key, value any) {
		if out[i] == nil {
			out[i] = map[string][]string{}
		}
		k := fmt.Sprint(key)
		out[i][k] = append(out[i][k], fmt.Sprint(value))
		slices.Sort(out[i][k])
	}
	for a, list := range cs.addrs {
		for _, c := range list {
			put(0, a, c)
		}
	}
	for p, list := range cs.ports {
		for _, a := range list {
			put(1, p, a)
		}
	}
	for id, list := range cs.ids {
		for _, tag := range list {
			put(2, id, tag)
		}
	}
	for id, tag := range cs.containers {
		put(3, id, tag)
	}
	for ref, list := range cs.guests {
		for _, tag := range list {
			put(4, ref, tag)
		}
	}
	return out
}
