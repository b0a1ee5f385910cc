package task

import (
	"testing"
	"time"
)

// The first question after a while is told of, and no other; telling never waits.
func TestAskNotifies(t *testing.T) {
	var c StatsCell
	c.Ask(1) // nobody to tell
	ch := make(chan struct{}, 1)
	c.Notify(ch)
	start := time.Now().UnixNano()
	for _, q := range []struct {
		at   time.Duration
		told bool
	}{
		{0, true}, {0, false}, {time.Second, false}, {5900 * time.Millisecond, false}, {10900 * time.Millisecond, true},
		{11 * time.Second, false}, {time.Second, true} /* the clock was put back */, {2 * time.Second, false}, {time.Hour, true},
	} {
		c.Ask(start + int64(q.at))
		if c.Asked() != start+int64(q.at) {
			t.Errorf("at %v: got %v", q.at, c.Asked())
		}
		select {
		case <-ch:
			if !q.told {
				t.Errorf("at %v: told, want not", q.at)
			}
		default:
			if q.told {
				t.Errorf("at %v: not told", q.at)
			}
		}
	}
	c.Ask(start + int64(2*time.Hour))
	c.Ask(start + int64(3*time.Hour)) // the channel is full
	if n := testing.AllocsPerRun(100, func() { c.Ask(time.Now().UnixNano()) }); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}
