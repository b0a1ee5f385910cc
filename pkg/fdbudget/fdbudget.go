// Package fdbudget shares out the file descriptors that the process may have open.
//
// Connections, network namespaces, links and files that are open for a moment come first: they do
// not ask. A descriptor that only saves work, such as a file that stays open between two readings,
// is kept out of what is left, and given back when the others need more.
package fdbudget

import (
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// countEvery is the shortest time between two counts of the open descriptors.
	countEvery = 100 * time.Millisecond
	// countShare bounds what counting costs: one part in so many of the time. Before Linux 6.2
	// the directory of all descriptors has to be read, which takes milliseconds where there are
	// thousands.
	countShare = 500
	// exhausted is how long nothing is kept after the process had no descriptor left.
	exhausted = 10 * time.Second
)

// Budget is the descriptors of one process. Its methods are safe for concurrent use.
type Budget struct {
	limit int
	spare int // stay free for those that do not ask, beyond what they have open now
	count func() (int, error)

	kept atomic.Int64
	room atomic.Int64 // how many may be kept

	mu   sync.Mutex // guards what follows
	next time.Time  // of the next count
	open int        // at the last count
}

// New returns a budget of limit descriptors. count returns how many are open now.
func New(limit int, count func() (int, error)) *Budget {
	b := &Budget{limit: limit, spare: max(limit/8, min(256, limit/4)), count: count}
	b.update()
	return b
}

// Process returns the budget of this process, by its RLIMIT_NOFILE at the first call.
var Process = sync.OnceValue(func() *Budget {
	limit := unix.Rlimit{Cur: 1024} // the least that systems give
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	return New(int(min(limit.Cur, math.MaxInt32)), openCount)
})

// Keep asks for n descriptors to keep open. Who gets them gives them back by Drop.
func (b *Budget) Keep(n int) bool {
	b.update()
	// A little less than there is, or at the edge one would be kept and given back all the
	// time.
	if kept := b.kept.Add(int64(n)); kept > b.room.Load()-int64(b.spare/8) {
		b.kept.Add(-int64(n))
		return false
	}
	return true
}

// Drop gives n descriptors back that are closed now.
func (b *Budget) Drop(n int) { b.kept.Add(-int64(n)) }

// Over reports whether more descriptors are kept than there is room for: who keeps some should
// close and Drop them. It does not allocate.
func (b *Budget) Over() bool {
	b.update()
	return b.kept.Load() > b.room.Load()
}

// Exhausted tells that the process had no descriptor left (EMFILE). For a while there is no room.
func (b *Budget) Exhausted() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.room.Store(0)
	b.next = time.Now().Add(exhausted)
}

// Usage is how a budget is used, in descriptors.
type Usage struct {
	Limit int
	Open  int // at the last count, kept ones included
	Kept  int
	Room  int // how many may be kept
}

// Usage returns how the budget is used now.
func (b *Budget) Usage() Usage {
	b.update()
	b.mu.Lock()
	defer b.mu.Unlock()
	return Usage{Limit: b.limit, Open: b.open, Kept: int(b.kept.Load()),
		Room: int(b.room.Load())}
}

// update counts the open descriptors if the last count is old.
func (b *Budget) update() {
	b.mu.Lock()
	defer b.mu.Unlock()
	start := time.Now()
	if start.Before(b.next) {
		return
	}
	open, err := b.count()
	took := time.Since(start)
	if err != nil { // most likely for want of a descriptor
		b.room.Store(0)
		b.next = start.Add(exhausted)
		return
	}
	b.next = start.Add(max(countEvery, countShare*took))
	b.open = open
	others := int64(open) - b.kept.Load()
	b.room.Store(max(0, int64(b.limit-b.spare)-others))
}

// openCount returns how many descriptors this process has open.
func openCount() (int, error) {
	const dir = "/proc/self/fd"
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, fmt.Errorf("count descriptors: %w", err)
	}
	if st.Size > 0 { // since Linux 6.2 (fs/proc/fd.c: proc_fd_getattr)
		return int(st.Size), nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return 0, fmt.Errorf("count descriptors: %w", err)
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	return len(names) - 1, err // f itself
}
