package server

import "sync"

// shares bound the number of things at a time, in total and for each source. A source may hold as
// many as are free. So n sources that want all of them hold an n+1st part each, and a new source
// still gets its own part. This is the dynamic threshold of shared packet buffers (Choudhury and
// Hahne, 1998). Safe for concurrent use.
type shares struct {
	max int

	mu    sync.Mutex // guards what follows
	taken int
	held  map[source]int
}

func newShares(max int) *shares { return &shares{max: max, held: map[source]int{}} }

// take takes one for src, or returns false.
func (s *shares) take(src source) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[src] >= s.max-s.taken {
		return false
	}
	s.held[src]++
	s.taken++
	return true
}

// give returns one that src has taken.
func (s *shares) give(src source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken--
	if s.held[src]--; s.held[src] == 0 {
		delete(s.held, src)
	}
}

// count returns how many are taken.
func (s *shares) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken
}
