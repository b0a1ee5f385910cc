package server

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"
)

// pauses records what turns would have waited.
type pauses struct {
	mu  sync.Mutex
	all []time.Duration
}

func (p *pauses) pause(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, d)
}

func (p *pauses) sum() (sum time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.all {
		sum += d
	}
	return sum
}

// newPaused is a host with a time that stands still, and its pauses.
func newPaused(t testing.TB) (*host, *pauses) {
	h := newStopped(t, testConfig(), newTask(), newOther())
	p := &pauses{}
	h.turns.pause = p.pause
	h.now = (&fakeClock{}).of(h.start)
	return h, p
}

// A client that waits for each answer waits for nothing else, however fast it asks and on however
// many connections, and whatever another task does.
func TestWaitingClientIsNotDelayed(t *testing.T) {
	h, p := newPaused(t)
	h.turns.sources.Add(100)
	for range 4 {
		c := newLoopConn(addrT)
		h.serveLoop(t, c)
		for range 1000 {
			c.get(request("/v2/metadata"))
		}
	}
	if n := h.Counters().Delayed; n != 0 || p.sum() != 0 {
		t.Errorf("%d of 4000 requests were delayed, by %v", n, p.sum())
	}
}

// A client that sends ahead is answered all that it asks, in its turn: after a burst, each request
// waits as long as all of its task's together may cost, on however many connections.
func TestRequestsSentAhead(t *testing.T) {
	const conns, each = 4, 100
	batch := bytes.Repeat(request("/v2/metadata/x"), each) // short answers
	for name, sources := range map[string]int64{"alone": 0, "one of 10": 10} {
		t.Run(name, func(t *testing.T) {
			h, p := newPaused(t)
			h.turns.sources.Add(sources)
			for range conns {
				c := newLoopConn(addrT)
				h.serveLoop(t, c)
				if got := bytes.Count(c.get(batch),
					[]byte("HTTP/1.1 ")); got != each {
					t.Fatalf("%d requests sent ahead: %d answers", each, got)
				}
			}
			token := time.Duration(aheadToken * max(1, sources))
			// on each connection one request is not ahead of anything
			ahead := conns * (each - 1)
			n := time.Duration(ahead - aheadBurst)
			// time stands still: each waits for all before it
			if want := token * n * (n + 1) / 2; p.sum() != want {
				t.Errorf("waited %v, want %v", p.sum(), want)
			}
			if got := h.Counters().Delayed; got != uint64(n) {
				t.Errorf("%d delayed, want %d", got, n)
			}
			if got := h.turns.sources.Load(); got != sources {
				t.Errorf("%d sources wait at the end, want %d", got, sources)
			}
		})
	}
}

// Requests so long that each needs a read of its own are sent ahead all the same.
func TestLongRequestsSentAhead(t *testing.T) {
	h, _ := newPaused(t)
	long := fmt.Sprintf(
		"GET /v2/metadata HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%[2]s", 12<<10,
		strings.Repeat("x", 12<<10))
	c := newLoopConn(addrT)
	h.serveLoop(t, c)
	c.get([]byte(strings.Repeat(long, 200)))
	if got := h.Counters().Delayed; got < 100 {
		t.Errorf("%d of 200 delayed", got)
	}
}

// A long answer costs as much as several short ones.
func TestLongAnswersSentAhead(t *testing.T) {
	wait := func(bytes int64) time.Duration {
		h, p := newPaused(t)
		var peer peer
		for range 100 {
			h.turns.await(&peer, bytes, 0, &h.stopping)
		}
		return p.sum()
	}
	if short, long := wait(100), wait(1<<20); long < 100*short {
		t.Errorf("answers of a megabyte wait %v, short ones %v", long, short)
	}
}

// A task whose requests wait does not make another's wait, and a server that stops lets them go.
func TestDelayedNeighbour(t *testing.T) {
	h, _ := newPaused(t)
	release := make(chan struct{})
	h.turns.pause = func(time.Duration) { <-release }
	h.listen(t)
	attacker := h.dial(t, addrT)
	go func() { _, _ = io.Copy(io.Discard, attacker) }()
	if _, err := attacker.Write(bytes.Repeat(request("/v2/metadata"), 1000)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a request waits", func() bool { return h.Counters().Delayed > 0 })
	for range 100 {
		if r := h.get(t, addrB, "/v2/metadata"); r.StatusCode != 200 {
			t.Fatalf("the neighbour got %s", r.Status)
		}
	}
	h.stopping.Store(true)
	close(release)
	eventually(t, "the delayed connection closed", func() bool { return h.Counters().Open == 0 })
}
