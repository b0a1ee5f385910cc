package server

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"metad/pkg/task"
)

// However much the others want, a source that holds none gets one, as long as there are not as many
// sources as there is of the thing; and one alone gets half.
func TestShares(t *testing.T) {
	source := func(i int) source { return source{tag: uint32(i)} }
	for _, greedy := range []int{1, 2, 8, 100} {
		s := newShares(1024)
		for range 1024 { // turn by turn, each as much as it can
			for i := range greedy {
				s.take(source(i))
			}
		}
		if n := s.count(); greedy == 1 && n != 512 {
			t.Errorf("one alone has %d, want 512", n)
		}
		late := source(greedy)
		for range 1024 / (greedy + 1) / 2 {
			if !s.take(late) {
				t.Fatalf("%d others: a late one gets only %d, with %d taken",
					greedy, s.held[late], s.count())
			}
		}
		for i := range greedy + 1 {
			for range s.held[source(i)] {
				s.give(source(i))
			}
		}
		if s.count() != 0 || len(s.held) != 0 {
			t.Errorf("%d left, of %d", s.count(), len(s.held))
		}
	}
	s := newShares(1)
	if !s.take(source(1)) || s.take(source(2)) || s.take(source(1)) {
		t.Error("of one there is not one")
	}
}

// crowd is n tasks, each with an address and a container of its own.
func crowd(n int) (tasks []*task.Task, addrs []netip.Addr) {
	for i := range n {
		tk := newOther()
		tk.ARN = fmt.Sprintf("%s%d", tk.ARN[:len(tk.ARN)-1], i)
		tk.Containers = []*task.Container{running(fmt.Sprintf("%064x", i+1), "c")}
		addr := netip.AddrFrom4([4]byte{127, 1, 1, byte(i + 1)})
		tk.Endpoints = []task.Endpoint{{Addr: addr, Ifindex: 100 + i,
			Container: tk.Containers[0].ID}}
		tasks, addrs = append(tasks, tk), append(addrs, addr)
	}
	return tasks, addrs
}

// Eight tasks whose uploads stall cannot take a ninth task's way to its credentials.
func TestStalledUploadsStarveNobody(t *testing.T) {
	tasks, addrs := crowd(9)
	cfg := newAgent(t).config()
	cfg.MaxForwards, cfg.AgentTimeout = 90, time.Hour // the stalled ones stay
	h := newHost(t, cfg, tasks...)
	for i := range 8 * 10 { // as many as each of the eight can have
		c := h.dial(t, addrs[i%8])
		_, _ = io.WriteString(c,
			"PUT /api/e/x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n"+
				strings.Repeat("x", 9000))
		eventually(t, "passed on", func() bool { return h.forwards.count() == i+1 })
	}
	for i := range 8 {
		if r := h.get(t, addrs[i], "/api/e/x"); r.StatusCode != 503 {
			t.Errorf("one more of a task that has ten: got %d", r.StatusCode)
		}
	}
	want(t, h.get(t, addrs[8], "/v2/credentials/"+credentialsID), 200, typeJSON, credentials)
}

// Two tasks cannot hold all streams.
func TestStreamShares(t *testing.T) {
	tasks, addrs := crowd(3)
	f := &fakeSamples{}
	cfg := testConfig()
	cfg.Samples, cfg.MaxStreams = f, 12
	h := newHost(t, cfg, tasks...)
	opened := [3]int{}
	for i := range 3 {
		if i == 2 {
			i = 0 // the first once more, for what the second may have left
		}
		for range 12 {
			c := h.dial(t, addrs[i])
			_, _ = c.Write(request("/v4/stats?stream=true"))
			if resp := head(t, bufio.NewReader(c)); resp.StatusCode == 200 {
				opened[i]++
			}
		}
	}
	c := h.dial(t, addrs[2])
	_, _ = c.Write(request("/v4/stats?stream=true"))
	if resp := head(t, bufio.NewReader(c)); resp.StatusCode != 200 {
		t.Errorf("a third task gets %d; the others have %v", resp.StatusCode, opened)
	}
	if opened[0] == 12 || opened[0]+opened[1] < 8 {
		t.Errorf("got %v", opened)
	}
}

// lineOf reads one line of a stream.
func lineOf(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("got %q, %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}
