package stats

import (
	"encoding/json"
	"math"
	"testing"
	"time"

	"metad/pkg/task"
)

// V09: a v4 sample ends in network_rate_stats once there are two samples to compare. Without it, it
// is the sample of v2.
func TestV09NetworkRates(t *testing.T) {
	at := time.Unix(1700000000, 0)
	before := func(rx, tx uint64) previous {
		return previous{read: at, net: traffic{true, rx, tx}}
	}
	f := func(name string, nets []Network, after time.Duration, prev previous, want string) {
		t.Helper()
		c := &Counters{Read: at.Add(after), Networks: nets}
		v2, _, _ := appendSample(nil, "id", "/name", c, prev)
		doc := string(v2)
		got, n := appendRates(v2, c, prev)
		if string(got[:n])+"}" != doc {
			t.Errorf("%s: for v2 got %s}, want %s", name, got[:n], doc)
		}
		if !json.Valid(got) {
			t.Errorf("%s: %s", name, got)
		}
		if rates := string(got[n:]); rates != want+"}" {
			t.Errorf("%s: got %s, want %s}", name, rates, want)
		}
	}
	two := []Network{{Name: "eth0", RxBytes: 1000, TxBytes: 10}, {Name: "eth1", RxBytes: 500}}
	f("sum of interfaces", two, 2*time.Second, before(500, 5), `,"network_rate_stats":{"rx_bytes_per_sec":500,"tx_bytes_per_sec":2.5}`)
	f("nothing moved", two, time.Second, before(1500, 10), `,"network_rate_stats":{"rx_bytes_per_sec":0,"tx_bytes_per_sec":0}`)
	f("a first sample", two, 0, previous{}, "")
	f("no network now", nil, time.Second, before(0, 0), "")
	f("no network before", two, time.Second, previous{read: at}, "")
	f("an interface has gone", two, time.Second, before(2000, 5), "")
	f("an interface has gone, by what was sent", two, time.Second, before(0, 50), "")
	f("no time has passed", two, 0, before(0, 0), "")
	f("the clock was put back", two, -time.Second, before(0, 0), "")
	f("much in a moment", []Network{{RxBytes: math.MaxUint64}}, time.Nanosecond, before(0, 0),
		`,"network_rate_stats":{"rx_bytes_per_sec":18446744073709550000000000000,"tx_bytes_per_sec":0}`)
}

// V09: the sampler compares the two last samples of a container; one that was started again begins
// anew.
func TestSamplesHaveRates(t *testing.T) {
	s := New(Config{})
	e := &entry{c: &task.Container{ID: "a"}, cell: &task.StatsCell{}}
	at := time.Unix(1700000000, 0)
	f := func(after time.Duration, rx uint64, want float64) {
		t.Helper()
		s.publish(e, &Counters{Read: at.Add(after),
			Networks: []Network{{Name: "eth0", RxBytes: rx}}})
		var doc struct {
			Rates *struct {
				Rx *float64 `json:"rx_bytes_per_sec"`
			} `json:"network_rate_stats"`
		}
		if err := json.Unmarshal(e.last.JSON, &doc); err != nil {
			t.Fatal(err)
		}
		if (doc.Rates == nil) != (want < 0) || doc.Rates != nil && *doc.Rates.Rx != want {
			t.Errorf("after %v: got %s, want %v", after, e.last.JSON[e.last.V2:], want)
		}
		if v2 := append(append([]byte{}, e.last.JSON[:e.last.V2]...),
			'}'); !json.Valid(v2) {
			t.Errorf("for v2 got %s", v2)
		}
	}
	f(0, 1000, -1)
	f(time.Second, 1500, 500)
	f(3*time.Second, 1500, 0)
	f(4*time.Second, 20, -1) // its counters began anew
	f(5*time.Second, 120, 100)
}

// Rates cost a sample no allocation.
func TestRatesDoNotAllocate(t *testing.T) {
	c := &Counters{Read: time.Unix(10, 0),
		Networks: []Network{{Name: "eth0", RxBytes: 1 << 40, TxBytes: 12345}}}
	prev := previous{read: time.Unix(9, 500), net: traffic{true, 7, 9}}
	buf := make([]byte, 0, 8<<10)
	if n := testing.AllocsPerRun(100, func() {
		doc, _, _ := appendSample(buf[:0], "id", "/name", c, prev)
		appendRates(doc, c, prev)
	}); n != 0 {
		t.Errorf("got %v allocs, want 0", n)
	}
}
