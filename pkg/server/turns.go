package server

import (
	"sync/atomic"
	"time"
)

// Requests that a client sends before it has the answer to its last one cost it almost nothing, and
// metad as much as any other. In all, metad answers so many of them a second, about a twentieth of
// a core, and each source has an equal part of that. The others wait; none is refused.
const (
	aheadPerSecond = 2000
	aheadBurst     = 32      // requests at once that wait for nothing, of each source
	aheadBytes     = 8 << 10 // so many bytes of an answer cost as much as a request
)

// aheadToken is what one such request costs, in nanoseconds, as long as one source alone sends
// them.
const aheadToken = int64(time.Second / aheadPerSecond)

// maxPause is how long a request waits before it looks whether the server is stopping.
const maxPause = 100 * time.Millisecond

// turns delays the requests that are sent ahead. Safe for concurrent use, takes no lock.
type turns struct {
	pause   func(time.Duration)
	sources atomic.Int64  // that have a request waiting
	delayed atomic.Uint64 // requests
}

// await makes a request of p wait until it is its turn, or until the server is stopping. bytes is
// how long the answer to the request before it was. n sources that want more than they get have an
// nth part each, on however many connections.
func (t *turns) await(p *peer, bytes, now int64, stopping *atomic.Bool) {
	token := aheadToken * max(1, t.sources.Load())
	wait := time.Duration(p.ahead.reserve(now, token*(1+bytes/aheadBytes), token*aheadBurst))
	if wait <= 0 {
		return
	}
	t.delayed.Add(1)
	if p.delayed.Add(1) == 1 {
		t.sources.Add(1)
	}
	for ; wait > 0 && !stopping.Load(); wait -= maxPause {
		t.pause(min(wait, maxPause))
	}
	if p.delayed.Add(-1) == 0 {
		t.sources.Add(-1)
	}
}
