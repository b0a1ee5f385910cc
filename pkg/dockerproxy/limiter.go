package dockerproxy

import (
	"sync"
	"time"
)

// limiter lets ten warnings through in ten seconds and counts the others.
type limiter struct {
	now func() time.Time

	mu    sync.Mutex // guards what follows
	since time.Time
	n     int
	held  int
}

// allow reports whether to log, and if so how many were held back since the last time.
func (l *limiter) allow() (ok bool, held int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.now(); now.Sub(l.since) > 10*time.Second {
		l.since, l.n = now, 0
	}
	if l.n++; l.n > 10 {
		l.held++
		return false, 0
	}
	held, l.held = l.held, 0
	return true, held
}
