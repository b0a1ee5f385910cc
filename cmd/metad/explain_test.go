package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"go.uber.org/zap"

	"metad/bpf"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// Each verdict of the programs has a meaning, and no other has.
func TestMeanings(t *testing.T) {
	spec, err := bpf.LoadMetad()
	if err != nil {
		t.Fatal(err)
	}
	var e *btf.Enum
	if err := spec.Types.TypeByName("verdict", &e); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, v := range e.Values {
		if v.Value < uint64(bpf.VerdictLimit) {
			names[strings.ToLower(strings.TrimPrefix(v.Name, "VERDICT_"))] = true
		}
	}
	for name := range names {
		if meanings[name] == "" {
			t.Errorf("%s has no meaning", name)
		}
	}
	for name := range meanings {
		if !names[name] {
			t.Errorf("%s is no verdict", name)
		}
	}
}

// healthy is a situation in which the container web, on port 12, is answered.
func healthy(t *testing.T) situation {
	t.Helper()
	addr, mac := netip.MustParseAddr("172.17.0.2"), [6]byte{2, 0, 0, 0, 0, 2}
	cell := new(task.StatsCell)
	cell.Store(&task.Sample{JSON: []byte("{}"), V2: 1, Read: time.Now()})
	c := &task.Container{ID: "aabbccdd", Name: "web", DockerName: "shop-web-1", PID: 7,
		KnownStatus: task.StatusRunning, EndpointID: "e1", Stats: cell}
	table := lookup.New(&fullMap{room: true}, zap.NewNop())
	if err := table.Apply([]*task.Task{{ID: "t1", ARN: "arn:t1", Family: "shop",
		Containers: []*task.Container{c},
		Endpoints: []task.Endpoint{{Addr: addr, Ifindex: 12, MAC: mac,
			Container: c.ID}}}}); err != nil {
		t.Fatal(err)
	}
	return situation{docker: true, views: table.Views(),
		ports: []loader.Port{{Name: "veth12", Ifindex: 12, Bridge: 3}},
		entries: map[netip.Addr]bpf.TaskValue{addr: {Tag: table.Views()[0].Tag, Ifindex: 12,
			Mac: mac}},
		device: func(int) (string, string) { return "veth12", "docker0" },
		holder: func(id string) *lookup.ContainerView {
			_, c := table.Endpoint([]byte(id))
			return c
		},
		agent: agentNone, now: time.Now()}
}

// Each fault is a step that is not ok, says what to do, and makes the exit code; without a fault
// every step is ok, however the container is named.
func TestExplain(t *testing.T) {
	f := func(what string, fault func(*situation), want ...string) {
		t.Helper()
		s := healthy(t)
		fault(&s)
		report := explain(what, s)
		var out bytes.Buffer
		if _, err := report.WriteTo(&out); err != nil {
			t.Fatal(err)
		}
		if len(want) == 0 && report.Status() != 0 || len(want) > 0 && report.Status() == 0 {
			t.Errorf("%s, %v: got status %v\n%s", what, want, report.Status(), &out)
		}
		for _, w := range want {
			if !strings.Contains(out.String(), w) {
				t.Errorf("%s: want %q in\n%s", what, w, &out)
			}
		}
	}
	addr := netip.MustParseAddr("172.17.0.2")
	for _, what := range []string{"web", "shop-web-1", "aabb", "aabbccdd", "172.17.0.2"} {
		f(what, func(*situation) {})
	}
	f("aab", func(*situation) {}, `no container "aab"`)
	f("172.17.0.9", func(*situation) {}, "is no task's; metad does not remember")
	f("172.17.0.9", func(s *situation) {
		s.events = []event{{Verdict: "port_unknown", Addr: "172.17.0.9", Device: "veth5"}}
	}, "it asked at 00:00:00, at veth5")
	f("web", func(s *situation) { s.docker = false }, "warn  docker", "the Engine is away")
	f("web", func(s *situation) { s.packets = errors.New("not armed") }, "fail  metad", "not armed")
	f("web", func(s *situation) { s.ports = nil }, "fail  port", `add "docker0" to --bridges`)
	f("web", func(s *situation) { s.ports[0].Err = errors.New("busy") }, "fail  port", "has no program: busy")
	f("web", func(s *situation) { s.device = func(int) (string, string) { return "", "" } }, "fail  port", "is gone")
	f("web", func(s *situation) { s.entries = nil }, "fail  map", "no entry")
	f("web", func(s *situation) { s.entries[addr] = bpf.TaskValue{Tag: 99, Ifindex: 13} }, "fail  map", "gives 172.17.0.2 to tag 99")
	f("web", func(s *situation) {
		s.events = []event{{Verdict: "port_wrong_mac", Addr: "172.17.0.2", Ifindex: 12,
			Task: "t1"}}
	}, "warn  dropped", "not its own MAC")
	f("web", func(s *situation) {
		// while it started
		s.events = []event{{Verdict: "port_unknown", Addr: "172.17.0.2", Ifindex: 12}}
	})
	f("web", func(s *situation) { s.holder = func(string) *lookup.ContainerView { return nil } }, "warn  endpoint id")
	f("web", func(s *situation) { s.agent = agentForeign }, "warn  agent", "another user")
	f("web", func(s *situation) { s.agent = agentSilent }, "warn  agent", "does not answer")
	f("web", func(s *situation) { s.views[0].Task.Containers[0].Stats.Store(nil) }, "warn  statistics", "no sample yet")
}

// A follower gets what happened before and what happens then; one that does not read misses some
// and holds nobody up.
func TestEventsAreFollowed(t *testing.T) {
	var l eventLog
	for i := range keptEvents + 1 {
		l.add(loader.Event{Ifindex: i})
	}
	so, news, end := l.follow()
	for i := range 2 * keptEvents {
		l.add(loader.Event{Ifindex: i})
	}
	if len(so) != keptEvents || so[0].Ifindex != 1 || len(news) != keptEvents {
		t.Errorf("got %d so far from %d, %d new", len(so), so[0].Ifindex, len(news))
	}
	end()
	if len(l.followers) != 0 {
		t.Error("a follower that left is still there")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w := httptest.NewRecorder()
	show := func(e loader.Event) event { return eventOf(e, nil) }
	l.handler(show).ServeHTTP(w, httptest.NewRequest("GET", "/events?follow=1",
		nil).WithContext(ctx))
	dec, n := json.NewDecoder(w.Body), 0
	for ; dec.More(); n++ {
		var e event
		if err := dec.Decode(&e); err != nil {
			t.Fatal(err)
		}
	}
	if n != keptEvents {
		t.Errorf("got %d lines, want %d", n, keptEvents)
	}
}

// What the commands print holds nothing that a terminal obeys.
func TestLookCommandsArePrintable(t *testing.T) {
	const evil = "a\x1b[2Jb\nc"
	var out bytes.Buffer
	for _, err := range []error{
		printMap(&out, []mapEntry{{Address: "172.17.0.2", Task: evil, Device: evil}}, time.Now()),
		printEvent(&out, event{Verdict: evil, Addr: evil, Device: evil, Task: evil, MAC: evil}),
		printVerdicts(&out, []verdict{{Name: evil, Packets: 1, Meaning: evil}}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(out.String(), "\n"); strings.Contains(out.String(), "\x1b") ||
		n != 5 {
		t.Errorf("got %d lines: %q", n, out.String())
	}
}
