package main

import (
	"encoding/json"
	"errors"
	"net/netip"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"metad/bpf"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// fullMap is a kernel map without room, unless room is set.
type fullMap struct{ room bool }

func (m *fullMap) Put(netip.Addr, *bpf.MetadTaskValue) error {
	if !m.room {
		return errors.New("map full")
	}
	return nil
}
func (*fullMap) Delete(netip.Addr) error                             { return nil }
func (*fullMap) Entries() (map[netip.Addr]bpf.MetadTaskValue, error) { return nil, nil }

func TestReady(t *testing.T) {
	open, closed := make(chan struct{}), make(chan struct{})
	close(closed)
	f := func(synced chan struct{}, armed, want bool) {
		t.Helper()
		if err := ready(synced, armed); (err == nil) != want {
			t.Errorf("synced %v, armed %v: got %v", synced == closed, armed, err)
		}
	}
	f(open, false, false)
	f(open, true, false)
	f(closed, false, false)
	f(closed, true, true)
}

func TestTasksOfTheTable(t *testing.T) {
	cell := new(task.StatsCell)
	cell.Store(&task.Sample{JSON: []byte(`{"read":"x"}`), V2: len(`{"read":"x"`)})
	table := lookup.New(&fullMap{room: true}, zap.NewNop())
	err := table.Apply([]*task.Task{{ID: "t1", ARN: "arn:t1", Family: "web", Revision: "3", KnownStatus: task.StatusRunning,
		Endpoints:  []task.Endpoint{{Addr: netip.MustParseAddr("172.17.0.2"), Ifindex: 12, MAC: [6]byte{2, 0x42, 0xac, 0x11, 0, 2}}},
		Containers: []*task.Container{{ID: "c1", Name: "app", Type: task.TypeNormal, KnownStatus: task.StatusRunning, Stats: cell}, {ID: "c2", Name: "new"}}}})
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{table: table}
	f := func(stats bool, want string) {
		t.Helper()
		if got, err := json.Marshal(d.tasks(stats).Tasks); err != nil || string(got) != want {
			t.Errorf("stats %v: got %s, %v\nwant %s", stats, got, err, want)
		}
	}
	const head = `[{"ARN":"arn:t1","ID":"t1","Family":"web","Revision":"3","Status":"RUNNING","Tag":1,` +
		`"Endpoints":[{"Address":"172.17.0.2","MAC":"02:42:ac:11:00:02","Ifindex":12}],"Containers":[{"ID":"c1","Name":"app","Type":"NORMAL","Status":"RUNNING"`
	const tail = `},{"ID":"c2","Name":"new","Type":"","Status":""}]}]`
	f(false, head+tail)
	f(true, head+`,"Stats":{"read":"x"}`+tail)
}

// What cannot be served is told once, however often it is tried.
func TestUnservedIsToldOnce(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	kernel := &fullMap{}
	d := &daemon{table: lookup.New(kernel, zap.NewNop()), log: zap.New(core)}
	tasks := []*task.Task{{ID: "t1", ARN: "arn:t1", Endpoints: []task.Endpoint{{Addr: netip.MustParseAddr("172.17.0.2"), Ifindex: 12}}}}
	for range 3 {
		d.logServed(d.table.Apply(tasks))
		d.logServed(d.table.Retry())
	}
	kernel.room = true
	for range 3 {
		d.logServed(d.table.Retry())
	}
	var got []string
	for _, e := range logs.All() {
		got = append(got, e.Message)
	}
	equal(t, got, "some addresses are not served", "all addresses are served again")
}
