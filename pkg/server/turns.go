package server

import (
	"sync/atomic"
	"time"
)

// A request that a client sends before it has the answer to its last one costs the client almost
// nothing, and metad as much as any other. metad answers aheadPerSecond of them, about a twentieth
// of a core, and each source has an equal part of that. The others wait; none is refused.
const (
	aheadPerSecond = 2000
	aheadBurst     = 32      // requests of one source at once that do not wait
	aheadBytes     = 8 << 10 // bytes of an answer that cost as much as a request
)

// aheadToken is the cost of one such request, in nanoseconds, while only one source sends them.
const aheadToken = int64(time.Second / aheadPerSecond)

// maxPause is the longest wait before a request checks whether the server is stopping.
const maxPause = 100 * time.Millisecond

// turns delays requests that are sent ahead. It is safe for concurrent use and takes no lock.
type turns struct {
	pause   func(time.Duration)
	sources atomic.Int64  // that have a request waiting
	delayed atomic.Uint64 // requests
}

// await delays a request of p until its turn, or until the server is stopping. bytes is the length
// of the answer before. n sources that want more than they get have an nth part each, on any number
// of connections.
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
