package server

import (
	"net"
	"testing"
	"time"

	"metad/pkg/task"
)

// counted returns the answers to requests for route, by the first digit of the status.
func (h *host) counted(t *testing.T, route string) (all [6]uint64) {
	t.Helper()
	for i := range h.Metrics().Routes {
		if m := &h.Metrics().Routes[i]; m.Route == route {
			var n uint64
			for class := range m.Answers {
				all[class] = m.Answers[class].Load()
				n += all[class]
			}
			// what could not be read has no time
			if route != OtherRoute && m.Took.Count() != n {
				t.Errorf("%s: %d durations of %d answers", route, m.Took.Count(), n)
			}
			return all
		}
	}
	t.Fatalf("no route %s", route)
	return all
}

// Every answer of metad's own is counted once, for its path and the class of its status, and so are
// the bytes; a path that is none of metad's, and what is no request, under one name for all.
func TestRequestsAreCounted(t *testing.T) {
	tk := newTask()
	tk.Containers[0].Stats.Store(&task.Sample{JSON: []byte("{}"), V2: 1,
		Read: time.Now().Add(-3 * time.Second)})
	h := newHost(t, testConfig(), tk)
	f := func(route string, want ...uint64) {
		t.Helper()
		if got := h.counted(t, route); got != [6]uint64(want) {
			t.Errorf("%s: got %v, want %v", route, got, want)
		}
	}
	h.get(t, addrT, "/v2/metadata")
	h.get(t, addrT, "/v2/metadata")
	h.get(t, addrU, "/v2/metadata")
	f("/v2/metadata", 0, 0, 2, 0, 1, 0)
	h.get(t, addrT, "/v4/containers/app")
	f("/v4/{container}", 0, 0, 1, 0, 0, 0)
	h.get(t, addrT, "/v2/stats/"+idA)
	f("/v2/stats/{docker id}", 0, 0, 1, 0, 0, 0)
	h.get(t, addrT, "/nothing")
	h.get(t, addrT, "//v2")
	h.send(t, addrT, "no request\r\n\r\n")
	f(OtherRoute, 0, 0, 0, 1, 2, 0)
	if n := h.Metrics().SampleAge.Count(); n != 1 {
		t.Errorf("got %d ages of samples, want 1", n)
	}
	if c := h.Counters(); c.Received == 0 || c.Sent < c.Received {
		t.Errorf("got %d bytes received, %d sent", c.Received, c.Sent)
	}
}

// The first answer about a container of the task that asks is its first answer; one that another
// task asks for is not.
func TestFirstAnswer(t *testing.T) {
	tk, other := newTask(), newOther()
	tk.Containers[0].EndpointID = "0123"
	h := newHost(t, testConfig(), tk, other)
	cell := tk.Containers[0].Stats
	h.get(t, addrB, "/v4/0123")
	h.get(t, addrT, "/v4/containers/nobody")
	if at := cell.TakeFirstAnswer(); at != 0 {
		t.Errorf("another's question: answered at %d", at)
	}
	before := time.Now().UnixNano()
	h.get(t, addrT, "/v4/containers/app")
	if at := cell.TakeFirstAnswer(); at < before {
		t.Errorf("its own question: answered at %d, want %d or later", at, before)
	}
	h.get(t, addrT, "/v4/containers/app")
	if at := cell.TakeFirstAnswer(); at != 0 {
		t.Errorf("taken already: answered at %d", at)
	}
}

// What becomes of a request for the agent is counted by outcome, and not as an answer of metad's.
func TestAgentRequestsAreCounted(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig()
	cfg.AgentURL = "http://" + ln.Addr().String()
	cfg.AgentTimeout = 30 * time.Second
	h := newHost(t, cfg, newTask())
	go func() {
		for _, answer := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
			"nonsense\r\n\r\n"} {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 4096))
			_, _ = c.Write([]byte(answer))
			_ = c.Close()
		}
	}()
	h.get(t, addrT, "/v1/credentials")
	h.get(t, addrT, "/v1/credentials")
	_ = ln.Close()
	h.get(t, addrT, "/v1/credentials")
	want := map[string]uint64{"answered": 1, "failed": 1, "absent": 1}
	eventually(t, "every exchange ended", func() bool { return h.Metrics().Requests.Took.Count() == 3 })
	for i, outcome := range AgentOutcomes {
		if got := h.Metrics().Requests.Outcomes[i].Load(); got != want[outcome] {
			t.Errorf("%s: got %d, want %d", outcome, got, want[outcome])
		}
	}
	// nothing listened: metad's own 404
	if got := h.counted(t, OtherRoute); got != [6]uint64{4: 1} {
		t.Errorf("answers of metad's own: got %v, want one 404", got)
	}
}
