package server

import "sync"

// waiting counts the requests that wait for their task to appear. Safe for concurrent use.
type waiting struct {
	max int

	mu sync.Mutex // guards what follows
	n  int
	on map[source]int // requests that wait for a source's task
}

// begin admits one more waiter for src, and calls look if it is the only one. It returns false when
// there are too many.
func (w *waiting) begin(src source, look func()) bool {
	w.mu.Lock()
	if w.n >= w.max {
		w.mu.Unlock()
		return false
	}
	w.n++
	w.on[src]++
	first := w.on[src] == 1
	w.mu.Unlock()
	if first {
		look()
	}
	return true
}

func (w *waiting) end(src source) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n--
	if w.on[src]--; w.on[src] == 0 {
		delete(w.on, src)
	}
}

func (w *waiting) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n
}

// slots bound how many of a thing there are at a time.
type slots chan struct{}

func (s slots) take() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s slots) give() { <-s }
