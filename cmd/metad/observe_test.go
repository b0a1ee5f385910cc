package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/bpf"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// fullMap is a kernel map without room, unless room is set.
type fullMap struct{ room bool }

func (m *fullMap) Put(netip.Addr, *bpf.TaskValue) error {
	if !m.room {
		return errors.New("map full")
	}
	return nil
}
func (*fullMap) Delete(netip.Addr) error                        { return nil }
func (*fullMap) Entries() (map[netip.Addr]bpf.TaskValue, error) { return nil, nil }

// metad is ready only when a complete list is known and packets come here.
func TestReady(t *testing.T) {
	p := &publisher{log: zap.NewNop(), table: lookup.New(&fullMap{room: true}, zap.NewNop())}
	f := func(what, want string) {
		t.Helper()
		if err := p.ready(); (err == nil) != (want == "") || err != nil &&
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", what, err, want)
		}
	}
	const noList, notHere = "the Docker Engine has not answered yet",
		"packets are not redirected"
	f("at the start", noList)
	p.to(filling)
	if err := p.serve(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	f("serving without a list", noList)
	p.to(filling)
	p.apply(nil)
	f("filling, with a list", notHere)
	p.to(serving)
	f("serving", "")
	if err := p.offer(); err != nil {
		t.Fatal(err)
	}
	f("offering", "")
	p.to(replaced)
	f("replaced", notHere)
	p.to(stopping)
	f("stopping", notHere)
}

func TestTasksOfTheTable(t *testing.T) {
	cell := new(task.StatsCell)
	cell.Store(&task.Sample{JSON: []byte(`{"read":"x"}`), V2: len(`{"read":"x"`)})
	table := lookup.New(&fullMap{room: true}, zap.NewNop())
	err := table.Apply([]*task.Task{{ID: "t1", ARN: "arn:t1", Family: "web", Revision: "3",
		KnownStatus: task.StatusRunning,
		Endpoints: []task.Endpoint{{Addr: netip.MustParseAddr("172.17.0.2"), Ifindex: 12,
			MAC: [6]byte{2, 0x42, 0xac, 0x11, 0, 2}}},
		Containers: []*task.Container{{ID: "c1", Name: "app", Type: task.TypeNormal,
			KnownStatus: task.StatusRunning, Stats: cell}, {ID: "c2", Name: "new"}}}})
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{tasks: &publisher{table: table}}
	asked := map[netip.Addr]loader.TaskCounters{}
	f := func(stats bool, want string) {
		t.Helper()
		if got, err := json.Marshal(d.shown(stats, asked).Tasks); err != nil ||
			string(got) != want {
			t.Errorf("stats %v: got %s, %v\nwant %s", stats, got, err, want)
		}
	}
	const head = `[{"ARN":"arn:t1","ID":"t1","Family":"web","Revision":"3","Status":"RUNNING","Tag":1,` +
		`"Endpoints":[{"Address":"172.17.0.2","MAC":"02:42:ac:11:00:02","Ifindex":12%s}],"Containers":[{"ID":"c1","Name":"app","Type":"NORMAL","Status":"RUNNING"`
	const tail = `},{"ID":"c2","Name":"new","Type":"","Status":""}]}]`
	f(false, fmt.Sprintf(head, "")+tail)
	if cell.Asked() != 0 {
		t.Error("a list without statistics asks for them")
	}
	f(true, fmt.Sprintf(head, "")+`,"Stats":{"read":"x"}`+tail)
	if cell.Asked() == 0 {
		t.Error("a list with statistics does not ask for them")
	}
	asked[netip.MustParseAddr("172.17.0.2")] = loader.TaskCounters{Connections: 7}
	f(true, fmt.Sprintf(head, `,"Connections":7`)+`,"Stats":{"read":"x"}`+tail)
}

// An address that cannot be served is logged once, however often it is tried.
func TestUnservedIsToldOnce(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	kernel := &fullMap{}
	p := &publisher{log: zap.New(core), table: lookup.New(kernel, zap.NewNop()), state: filling}
	tasks := []*task.Task{{ID: "t1", ARN: "arn:t1",
		Endpoints: []task.Endpoint{{Addr: netip.MustParseAddr("172.17.0.2"), Ifindex: 12}}}}
	for range 3 {
		p.apply(tasks)
		p.retry()
	}
	kernel.room = true
	for range 3 {
		p.retry()
	}
	var got []string
	for _, e := range logs.All() {
		got = append(got, e.Message)
	}
	equal(t, got, "some addresses are not served", "all addresses are served again")
}
