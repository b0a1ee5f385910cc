package lookup

import (
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"metad/pkg/task"
)

// newContainer is a running container with an id made of name, which is its endpoint id too.
func newContainer(name string) *task.Container {
	return &task.Container{ID: strings.Repeat(name, 64/len(name)), Name: name,
		DockerName: "docker-" + name, EndpointID: "id-" + name,
		KnownStatus: task.StatusRunning, Stats: &task.StatsCell{}}
}

func with(tk *task.Task, containers ...*task.Container) *task.Task {
	tk.Containers = containers
	return tk
}

func joining(c, of *task.Container) *task.Container {
	c.NetworkMode = "container:" + of.ID
	return c
}

func stopped(c *task.Container) *task.Container {
	c.KnownStatus = task.StatusStopped
	return c
}

// at is the endpoint n, behind port n, in the namespace of c.
func at(n int, c *task.Container) task.Endpoint {
	ep := endpoint(n, n)
	ep.Container = c.ID
	return ep
}

// An endpoint id names its container from the first publication on until one in which the container
// has stopped or is gone.
func TestEndpoint(t *testing.T) {
	table := New(newFakeKernel(), zap.NewNop())
	f := func(id string, tk *task.Task, c *task.Container) {
		t.Helper()
		v, cv := table.Endpoint([]byte(id))
		switch {
		case (v == nil) != (tk == nil) || (cv == nil) != (c == nil):
			t.Errorf("%s: got %v, %v", id, v, cv)
		case v != nil && (v.Task != tk || cv.Container != c ||
			cv != v.Container([]byte(c.ID))):
			t.Errorf("%s: got container %s of %s", id, cv.ID, v.Task.ID)
		}
	}
	f("id-a", nil, nil)
	a, b, c := newContainer("a"), newContainer("b"), newContainer("c")
	one, two := with(newTask("1"), a, b), with(newTask("2"), c)
	apply(t, table, one, two)
	f("id-a", one, a)
	f("id-b", one, b)
	f("id-c", two, c)
	f("id-d", nil, nil)
	f("", nil, nil)

	ended := *a
	one = with(newTask("1"), stopped(&ended), b)
	apply(t, table, one, two)
	f("id-a", nil, nil)
	f("id-b", one, b)

	apply(t, table, one)
	f("id-c", nil, nil)
	if n := table.EndpointConflicts(); n != 0 {
		t.Errorf("got %d conflicts, want 0", n)
	}
}

// An id that two containers hold, of one task or of two, is neither's and is counted once; the
// other one's end gives it back.
func TestEndpointHeldTwice(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	table := New(newFakeKernel(), zap.New(core))
	a, thief := newContainer("a"), newContainer("b")
	thief.EndpointID = a.EndpointID
	for i, copies := range [][]*task.Task{
		{with(newTask("1"), a, thief)},
		{with(newTask("1"), a), with(newTask("2"), thief)},
	} {
		for range 2 { // the second time is no news
			apply(t, table, copies...)
			if v, c := table.Endpoint([]byte("id-a")); v != nil || c != nil {
				t.Errorf("held twice: got %v, %v", v, c)
			}
		}
		if n := table.EndpointConflicts(); n != uint64(i+1) || logs.Len() != i+1 {
			t.Errorf("got %d conflicts and %d lines, want %d", n, logs.Len(), i+1)
		}
		ended := *thief
		apply(t, table, with(newTask("1"), a), with(newTask("2"), stopped(&ended)))
		if _, c := table.Endpoint([]byte("id-a")); c == nil || c.Container != a {
			t.Errorf("held once: got %v", c)
		}
	}
	if line := logs.All()[0]; strings.Contains(line.Message, "id-a") ||
		slices.ContainsFunc(line.Context,
			func(f zapcore.Field) bool { return f.String == "id-a" }) {
		t.Errorf("the log has the id, which opens the container's documents: %v", line)
	}
}

// What an earlier process left is found by its endpoint ids and addresses at once.
func TestRestoreContainers(t *testing.T) {
	k := newFakeKernel()
	a := newContainer("a")
	tk := with(newTask("1", at(2, a)), a)
	before := New(k, zap.NewNop())
	apply(t, before, tk)
	after := New(k, zap.NewNop())
	if err := after.Restore([]Saved{{before.Views()[0].Tag, tk}}); err != nil {
		t.Fatal(err)
	}
	v, c := after.Endpoint([]byte("id-a"))
	if c == nil || c.Container != a || v != after.Resolve(0, addr(2)) || v.Only(addr(2)) != c {
		t.Errorf("got %v, %v", v, c)
	}
}

// A name is the one of the task definition before it is Docker's, and of a running container before
// a stopped one.
func TestNamed(t *testing.T) {
	a, b, old := newContainer("a"), newContainer("b"), stopped(newContainer("c"))
	b.DockerName = "a"
	old.Name, old.DockerName = "b", "before"
	creating := &task.Container{Name: "creating"}
	v := newView(1, with(newTask("1"), old, a, b, creating))
	f := func(name string, want *task.Container) {
		t.Helper()
		got := v.Named([]byte(name))
		if (got == nil) != (want == nil) || got != nil && got.Container != want {
			t.Errorf("%q: got %v, want %v", name, got, want)
		}
	}
	f("a", a)
	f("b", b)
	f("docker-a", a)
	f("before", old)
	f("docker-b", nil)
	f("creating", nil)
	f("", nil)
}

// A packet from an address names a container only if no other can have sent it.
func TestOnly(t *testing.T) {
	f := func(name string, want *task.Container, tasks ...*task.Task) {
		t.Helper()
		table := New(newFakeKernel(), zap.NewNop())
		apply(t, table, tasks...)
		v := table.Resolve(0, addr(2))
		if v == nil {
			t.Fatalf("%s: no task", name)
		}
		got := v.Only(addr(2))
		if (got == nil) != (want == nil) || got != nil &&
			(got.Container != want || got != v.Container([]byte(want.ID))) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
		if got := v.Only(addr(99)); got != nil {
			t.Errorf("%s: of an address that is not the task's: got %v", name, got)
		}
	}
	pause := func() *task.Container {
		c := newContainer("f")
		c.Type = task.TypeCNIPause
		return c
	}
	a, b, p := newContainer("a"), newContainer("b"), pause()
	f("alone", a, with(newTask("1", at(2, a)), a))
	f("a container with another address", a, with(newTask("1", at(2, a), at(3, b)), a, b))
	f("a container on the host's network", a, with(newTask("1", at(2, a)), a, b))
	f("a guest", nil, with(newTask("1", at(2, a)), a, joining(newContainer("b"), a)))
	f("a guest that has stopped", a, with(newTask("1", at(2, a)), a, stopped(joining(newContainer("b"), a))))
	f("another task's guest", nil, with(newTask("1", at(2, a)), a), with(newTask("2"), joining(newContainer("b"), a)))
	f("another container's guest", a, with(newTask("1", at(2, a), at(3, b)), a, b, joining(newContainer("c"), b)))
	guest := joining(newContainer("c"), p)
	f("a pause container and one guest", guest, with(newTask("1", at(2, p)), p, guest))
	f("a pause container and two guests", nil, with(newTask("1", at(2, p)), p, guest, joining(newContainer("d"), p)))
	f("a pause container and another task's guest", nil, with(newTask("1", at(2, p)), p), with(newTask("2"), guest))
	f("a pause container alone", nil, with(newTask("1", at(2, p)), p))
	f("a guest of a guest", nil, with(newTask("1", at(2, p)), p, guest, joining(newContainer("d"), guest)))
	byName, short := newContainer("c"), newContainer("c")
	byName.NetworkMode, short.NetworkMode = "container:docker-a", "container:aaaaaaaaaaaa"
	f("a guest by Docker's name", nil, with(newTask("1", at(2, a)), a, byName))
	f("a guest by a short id", nil, with(newTask("1", at(2, a)), a, short))
	f("a namespace of nobody's", nil, with(newTask("1", endpoint(2, 2)), a))
	f("a namespace of a container that is gone", nil, with(newTask("1", at(2, b)), a))
}

// A guest that comes or goes changes the answer of a view whose task has not changed, and nothing
// else of it.
func TestGuestOfUnchangedTask(t *testing.T) {
	table := New(newFakeKernel(), zap.NewNop())
	a := newContainer("a")
	one := with(newTask("1", at(2, a)), a)
	two := with(newTask("2"), joining(newContainer("b"), a))
	apply(t, table, one)
	alone := table.Resolve(0, addr(2))
	apply(t, table, one, two)
	shared := table.Resolve(0, addr(2))
	if alone.Only(addr(2)) == nil || shared.Only(addr(2)) != nil || shared.Tag != alone.Tag ||
		shared.Task != alone.Task {
		t.Errorf("got %v, then %v", alone.Only(addr(2)), shared.Only(addr(2)))
	}
	if table.Views()[0] != shared {
		t.Error("by tag there is another view than by address")
	}
	apply(t, table, one, two)
	if v := table.Resolve(0, addr(2)); v != shared {
		t.Error("nothing changed: the view is another one")
	}
	apply(t, table, one)
	if v := table.Resolve(0, addr(2)); v.Only(addr(2)) == nil {
		t.Error("the guest has gone: got nobody")
	}
}

func TestContainerAllocs(t *testing.T) {
	table := New(newFakeKernel(), zap.NewNop())
	a, b := newContainer("a"), newContainer("b")
	apply(t, table, with(newTask("1", at(2, a), at(3, b)), a, b))
	v, from := table.Resolve(0, addr(2)), addr(3)
	known, unknown, name := []byte("id-b"), []byte("id-c"), []byte("docker-b")
	for what, f := range map[string]func(){
		"Endpoint":      func() { table.Endpoint(known) },
		"Endpoint miss": func() { table.Endpoint(unknown) },
		"Named":         func() { v.Named(name) },
		"Named miss":    func() { v.Named(unknown) },
		"Only":          func() { v.Only(from) },
		"Document":      func() { v.Document(task.V4).Segments() },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: got %v allocs, want 0", what, n)
		}
	}
}
