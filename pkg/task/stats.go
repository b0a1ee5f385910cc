package task

import (
	"sync/atomic"
	"time"
)

// Sample is one rendered statistics document of one container. Immutable once stored.
type Sample struct {
	// v4's form: the Engine API's stats object and network_rate_stats; never empty, no trailing
	// newline
	JSON []byte
	// JSON[:V2] and "}" are the form of v2 and v3: the object without network_rate_stats
	V2   int
	Read time.Time // when the counters were read
}

// StatsCell passes the sampler's last sample of one container to any number of readers. All methods
// are safe for concurrent use, take no lock and do not allocate.
type StatsCell struct {
	sample atomic.Pointer[Sample]
	asked  atomic.Int64
	notify atomic.Pointer[chan<- struct{}]

	answered atomic.Int64 // Unix ns of the first answer; 0: none, -1: taken
}

// silence is the shortest time without a request after which Ask notifies the sampler.
const silence = int64(5 * time.Second)

// Load returns the last sample, or nil before the first and after the container stopped.
func (c *StatsCell) Load() *Sample { return c.sample.Load() }

// Store publishes s; nil removes the last sample.
func (c *StatsCell) Store(s *Sample) { c.sample.Store(s) }

// Ask records a request for this container's statistics at time now, in Unix nanoseconds. The
// sampler keeps a container hot while there are requests. Ask notifies it of a request after
// silence.
func (c *StatsCell) Ask(now int64) {
	before := c.asked.Swap(now)
	if ago := now - before; 0 <= ago && ago < silence {
		return
	}
	if ch := c.notify.Load(); ch != nil {
		select {
		case *ch <- struct{}{}:
		default:
		}
	}
}

// Notify makes Ask send to ch at a request after silence, if ch has room.
func (c *StatsCell) Notify(ch chan<- struct{}) { c.notify.Store(&ch) }

// Asked returns the time of the last Ask in Unix nanoseconds, 0 if there was none.
func (c *StatsCell) Asked() int64 { return c.asked.Load() }

// Answered records that the container got an answer at time now, in Unix nanoseconds. Only the
// first one counts.
func (c *StatsCell) Answered(now int64) {
	if c.answered.Load() == 0 {
		c.answered.CompareAndSwap(0, now)
	}
}

// TakeFirstAnswer returns the time of the container's first answer, in Unix nanoseconds, to the
// first caller after it. To all others it returns 0.
func (c *StatsCell) TakeFirstAnswer() int64 {
	at := c.answered.Load()
	if at <= 0 || !c.answered.CompareAndSwap(at, -1) {
		return 0
	}
	return at
}
