package server

import "sync/atomic"

// bucket is a token bucket kept as one number (the generic cell rate algorithm): the time at which
// it will be full again. Safe for concurrent use, takes no lock.
type bucket struct {
	fullAt atomic.Int64 // ns
}

// take takes a token at time now (ns) and returns 0, or returns the time (ns) until there is one.
func (b *bucket) take(now int64, limit RateLimit) (wait int64) {
	token := int64(1e9) / int64(limit.PerSecond)
	for {
		old := b.fullAt.Load()
		next := max(old, now) + token
		if over := next - now - token*int64(limit.Burst); over > 0 {
			return over
		}
		if b.fullAt.CompareAndSwap(old, next) {
			return 0
		}
	}
}

// reserve takes cost (ns) at time now (ns), also if the bucket has less, with room for burst (ns).
// It returns the time (ns) until the bucket would have had it; not positive: it had.
func (b *bucket) reserve(now, cost, burst int64) (wait int64) {
	for {
		old := b.fullAt.Load()
		next := max(old, now) + cost
		if b.fullAt.CompareAndSwap(old, next) {
			return next - now - burst
		}
	}
}

// full reports whether the bucket is full at time now (ns).
func (b *bucket) full(now int64) bool { return b.fullAt.Load() <= now }
