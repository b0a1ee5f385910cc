package stats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"metad/pkg/task"
)

// fakeSource hands out feeds whose CPU total is the number of the reading.
type fakeSource struct {
	err     error            // of Open
	fail    map[string]error // of Sample, by container
	opened  int
	closed  int
	feeds   map[string]*fakeFeed
	deliver map[string]func(*Counters)
}

func newFakeSource() *fakeSource {
	return &fakeSource{feeds: map[string]*fakeFeed{}, fail: map[string]error{},
		deliver: map[string]func(*Counters){}}
}

type fakeFeed struct {
	src   *fakeSource
	id    string
	reads []time.Time
	hot   []bool
}

func (s *fakeSource) Open(_ *task.Task, c *task.Container, deliver func(*Counters)) (Feed, error) {
	fakes.Lock()
	defer fakes.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	s.opened++
	f := &fakeFeed{src: s, id: c.ID}
	s.feeds[c.ID], s.deliver[c.ID] = f, deliver
	return f, nil
}

func (f *fakeFeed) Sample(hot bool) (*Counters, error) {
	fakes.Lock()
	defer fakes.Unlock()
	f.hot = append(f.hot, hot)
	f.reads = append(f.reads, time.Now())
	return &Counters{Read: time.Now(), CPU: CPU{Total: uint64(len(f.reads))}}, f.src.fail[f.id]
}

func (f *fakeFeed) Close() { f.src.closed++ }

func aContainer(id string) *task.Container {
	return &task.Container{ID: id, DockerName: "name-" + id, PID: 7, Stats: new(task.StatsCell)}
}

func aTask(containers ...*task.Container) *task.Task {
	return &task.Task{ID: "t", Containers: containers}
}

// running starts a sampler that ends with the test's bubble.
func running(t *testing.T, cfg Config, sources ...Source) *Sampler {
	s := New(cfg, sources...)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return s
}

type document struct {
	Read    time.Time `json:"read"`
	PreRead time.Time `json:"preread"`
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	CPU     struct {
		Usage struct {
			Total uint64 `json:"total_usage"`
		} `json:"cpu_usage"`
	} `json:"cpu_stats"`
	PreCPU struct {
		Usage struct {
			Total uint64 `json:"total_usage"`
		} `json:"cpu_usage"`
	} `json:"precpu_stats"`
}

func decode(t testing.TB, s *task.Sample) (d document) {
	t.Helper()
	if s == nil {
		t.Fatal("no sample")
	}
	if err := json.Unmarshal(s.JSON, &d); err != nil {
		t.Fatalf("%v: %s", err, s.JSON)
	}
	return d
}

// S05, S06: nothing before the first sample with a past; then a real precpu_stats, before the
// container is two seconds old.
func TestFirstSampleHasAPast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(100 * time.Millisecond)
		if got := c.Stats.Load(); got != nil {
			t.Errorf("after 0.1 s: got %s, want none", got.JSON)
		}
		sleep(1900 * time.Millisecond)
		d := decode(t, c.Stats.Load())
		if d.ID != "a" || d.Name != "/name-a" {
			t.Errorf("got id %q, name %q", d.ID, d.Name)
		}
		if d.CPU.Usage.Total != 2 || d.PreCPU.Usage.Total != 1 ||
			d.Read.Sub(d.PreRead) != prime {
			t.Errorf("got %+v, want the second reading and the first %v before it", d,
				prime)
		}
	})
}

// S17: a second between samples while somebody asks.
func TestHotAndCold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(10 * time.Minute)
		f := src.feeds["a"]
		if n := len(f.reads); n != 8 {
			t.Errorf("unasked for 10 minutes: got %d samples, want 2 and one each 90 s",
				n)
		}
		f.reads = nil
		c.Stats.Ask(time.Now().UnixNano())
		asked := time.Now()
		sleep(30 * time.Second)
		if len(f.reads) == 0 {
			t.Fatal("asked, and not sampled in 30 s")
		}
		if first := f.reads[0].Sub(asked); first > together {
			t.Errorf("first sample %v after the question, want it within %v", first,
				together)
		}
		for i := 1; i < len(f.reads); i++ {
			if d := f.reads[i].Sub(f.reads[i-1]); d > hotInterval {
				t.Errorf("hot: %v between two samples, want at most %v", d,
					hotInterval)
			}
		}
		if n := len(f.reads); n < 30 || n > 32 {
			t.Errorf("hot for 30 s: got %d samples", n)
		}
		sleep(2 * time.Minute)
		f.reads, f.hot = nil, nil
		sleep(5 * time.Minute)
		if n := len(f.reads); n < 3 || n > 4 {
			t.Errorf("cold again for 5 minutes: got %d samples, want one each 90 s", n)
		}
		for _, hot := range f.hot {
			if hot {
				t.Error("the source was told that the container is hot")
			}
		}
	})
}

// A question is noticed at once, also in a cell that took another one's place.
func TestAskedInNewCell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(10 * time.Second)
		again := *c
		again.Stats = new(task.StatsCell)
		s.Apply([]*task.Task{aTask(&again)})
		sleep(time.Second)
		f := src.feeds["a"]
		n := len(f.reads)
		again.Stats.Ask(time.Now().UnixNano())
		sleep(2 * together)
		if len(f.reads) != n+1 {
			t.Errorf("got %d samples, want one more than %d", len(f.reads), n)
		}
	})
}

// A client that asks once a minute gets a sample of the last second.
func TestAskedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := running(t, Config{}, newFakeSource())
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		for i := range 5 {
			sleep(time.Minute)
			age := time.Since(c.Stats.Load().Read)
			c.Stats.Ask(time.Now().UnixNano())
			if i > 0 && age > 1200*time.Millisecond {
				t.Errorf("question %d: sample is %v old", i, age)
			}
		}
	})
}

// At the request the clock was an hour ahead; then it was corrected.
func TestQuestionFromTheFuture(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c := aContainer("a")
		c.Stats.Ask(time.Now().Add(time.Hour).UnixNano())
		s.Apply([]*task.Task{aTask(c)})
		sleep(50 * time.Second)
		if n := len(src.feeds["a"].reads); n > 2 {
			t.Errorf("got %d samples in 50 s, want those of a cold container", n)
		}
	})
}

// Each second has its containers in groups, one after the other, however they came and went.
func TestHotContainersAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		var cs []*task.Container
		for i := range 8 * group {
			cs = append(cs, aContainer(fmt.Sprint(i)))
			cs[i].Stats.Ask(time.Now().UnixNano())
		}
		check := func(cs []*task.Container) {
			t.Helper()
			s.Apply([]*task.Task{aTask(cs...)})
			sleep(5 * time.Second)
			per := map[time.Duration]int{}
			for _, c := range cs {
				reads := src.feeds[c.ID].reads
				per[reads[len(reads)-1].Sub(s.epoch)%hotInterval/slot]++
				for i := 1; i < len(reads); i++ {
					if d := reads[i].Sub(reads[i-1]); d > hotInterval+
						2*together {
						t.Errorf("container %s: %v between two samples",
							c.ID, d)
					}
				}
			}
			if len(per) != len(cs)/group {
				t.Errorf("%d containers: sampled in %d slots, want %d", len(cs),
					len(per), len(cs)/group)
			}
			for slot, n := range per {
				if n != group {
					t.Errorf("%d containers: %d in slot %d, want %d", len(cs),
						n, slot, group)
				}
			}
		}
		check(cs)
		var every4th []*task.Container
		for i := 0; i < len(cs); i += 4 {
			every4th = append(every4th, cs[i])
		}
		check(every4th)
	})
}

// S07, S08: a stopped container has no numbers, and what its source says later changes nothing.
func TestStoppedContainerHasNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		a, b := aContainer("a"), aContainer("b")
		s.Apply([]*task.Task{aTask(a, b)})
		sleep(2 * time.Second)
		decode(t, a.Stats.Load())
		stopped := *a
		stopped.PID = 0
		s.Apply([]*task.Task{aTask(&stopped, b)})
		if got := a.Stats.Load(); got != nil {
			t.Errorf("stopped: got %s, want none", got.JSON)
		}
		src.deliver["a"](&Counters{Read: time.Now()})
		src.deliver["a"](&Counters{Read: time.Now()})
		sleep(5 * time.Minute)
		if got := a.Stats.Load(); got != nil {
			t.Errorf("after a late delivery: got %s, want none", got.JSON)
		}
		decode(t, b.Stats.Load())
		if src.closed != 1 {
			t.Errorf("got %d feeds closed, want 1", src.closed)
		}
	})
}

// The same container, started again: its counters begin anew, and the last life's never show.
func TestRestartedContainerBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(5 * time.Minute)
		again := *c
		again.PID = 8
		s.Apply([]*task.Task{aTask(&again)})
		if got := c.Stats.Load(); got != nil {
			t.Errorf("just restarted: got %s, want none", got.JSON)
		}
		sleep(2 * time.Second)
		if d := decode(t, c.Stats.Load()); d.CPU.Usage.Total != 2 ||
			d.PreCPU.Usage.Total != 1 {
			t.Errorf("got %+v, want the new life's first two readings", d)
		}
	})
}

// Its task's pause container was restarted: the counters go on, only the network is found anew.
func TestRestartedPauseKeepsTheSample(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c, pause := aContainer("a"), aContainer("p")
		pause.Type, pause.NetworkMode = task.TypeCNIPause, "none"
		s.Apply([]*task.Task{aTask(c, pause)})
		sleep(2 * time.Second)
		before := decode(t, c.Stats.Load())
		again := *pause
		again.PID = 9
		s.Apply([]*task.Task{aTask(c, &again)})
		sleep(time.Second)
		if d := decode(t, c.Stats.Load()); d.PreRead != before.Read {
			t.Errorf("got preread %v, want %v", d.PreRead, before.Read)
		}
		if src.opened != 4 || src.closed != 2 {
			t.Errorf("got %d feeds opened and %d closed, want 4 and 2", src.opened,
				src.closed)
		}
	})
}

func TestFailureTakesTheSampleBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c, other := aContainer("a"), aContainer("b")
		s.Apply([]*task.Task{aTask(c, other)})
		c.Stats.Ask(time.Now().UnixNano())
		sleep(3 * time.Second)
		last := decode(t, c.Stats.Load())
		src.fail["a"] = fmt.Errorf("memory.stat: %w", errDamaged)
		sleep(5 * time.Second)
		if got := c.Stats.Load(); got != nil {
			t.Errorf("got %s, want none", got.JSON)
		}
		if n := s.Metrics().Damaged.Load(); n < 5 || n > 10 {
			t.Errorf("got %d damaged in 5 s, want about one a second", n)
		}
		decode(t, other.Stats.Load())
		if src.closed < 5 {
			t.Errorf("got %d feeds closed, want each one that failed", src.closed)
		}
		src.fail["a"] = nil
		sleep(1100 * time.Millisecond)
		if d := decode(t, c.Stats.Load()); !d.PreRead.Equal(last.Read) &&
			d.PreRead.Before(last.Read) {
			t.Errorf("got preread %v, want the last good sample's %v", d.PreRead,
				last.Read)
		}
		src.fail["a"] = errGone
		sleep(2 * time.Second)
		if n := s.Metrics().Gone.Load(); n == 0 {
			t.Error("a container that is gone was not counted")
		}
	})
}

// A container whose process is not there yet is found as soon as it is.
func TestOpenIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		src.err = errors.New("no such process")
		s := running(t, Config{}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(400 * time.Millisecond)
		src.err = nil
		sleep(1600 * time.Millisecond)
		decode(t, c.Stats.Load())
		if s.Metrics().Failed.Load() == 0 {
			t.Error("the failure was not counted")
		}
		src.err = errors.New("never")
		d := aContainer("d")
		s.Apply([]*task.Task{aTask(c, d)})
		before := s.Metrics().Failed.Load()
		sleep(time.Hour)
		if n := s.Metrics().Failed.Load() - before; n > 80 {
			t.Errorf("%d attempts in an hour, want them to become rare", n)
		}
	})
}

func TestSecondSourceServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newFakeSource(), newFakeSource()
		first.err = errNotOurs
		s := running(t, Config{}, first, second)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(2 * time.Second)
		decode(t, c.Stats.Load())
	})
}

func TestApplyUnchangedKeepsFeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c := aContainer("a")
		tk := aTask(c)
		for range 10 {
			s.Apply([]*task.Task{tk})
			sleep(500 * time.Millisecond)
		}
		renamed := *c
		renamed.DockerName = "other"
		renamed.Stats = c.Stats
		s.Apply([]*task.Task{aTask(&renamed)})
		sleep(2 * time.Minute)
		if d := decode(t, c.Stats.Load()); d.Name != "/other" {
			t.Errorf("got name %q, want the new one", d.Name)
		}
		if src.opened != 1 || src.closed != 0 {
			t.Errorf("got %d feeds opened and %d closed, want 1 and 0", src.opened,
				src.closed)
		}
	})
}

func TestStopEmptiesCells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := New(Config{}, src)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(ctx) }()
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(2 * time.Second)
		sub := s.Subscribe("a")
		cancel()
		<-done
		if c.Stats.Load() != nil || src.closed != 1 {
			t.Errorf("after Run: sample %v, %d feeds closed; want none and 1",
				c.Stats.Load(), src.closed)
		}
		if _, err := sub.Next(t.Context()); !errors.Is(err, io.EOF) {
			t.Errorf("subscription: got %v, want EOF", err)
		}
		s.Apply([]*task.Task{aTask(c)}) // no effect, no leak
		if s.Subscribe("a") != nil {
			t.Error("a stopped sampler took a subscription")
		}
	})
}

func TestSubscribe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		if s.Subscribe("nope") != nil {
			t.Error("subscribed to a container that does not run")
		}
		sleep(90*time.Second + 37*time.Millisecond) // cold, and the last sample is old
		sub := s.Subscribe("a")
		start := time.Now()
		var seen []uint64
		for range 5 {
			sample, err := sub.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if age := time.Since(sample.Read); age > time.Second {
				t.Errorf("got a sample %v old", age)
			}
			seen = append(seen, decode(t, sample).CPU.Usage.Total)
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("5 samples took %v", d)
		}
		for i := 1; i < len(seen); i++ {
			if seen[i] != seen[i-1]+1 {
				t.Errorf("got readings %v, want each one once", seen)
			}
		}
		// A slow reader gets the newest, not a backlog.
		sleep(10*time.Second + 5*time.Millisecond)
		sample, _ := sub.Next(t.Context())
		if n := decode(t, sample).CPU.Usage.Total; n < seen[4]+9 {
			t.Errorf("after 10 s: got reading %d, want the newest", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		if _, err := sub.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the context's error", err)
		}
		cancel()
		// It ends with the container.
		time.AfterFunc(100*time.Millisecond, func() { s.Apply(nil) })
		for {
			if _, err := sub.Next(t.Context()); err != nil {
				if !errors.Is(err, io.EOF) {
					t.Errorf("got %v, want EOF", err)
				}
				break
			}
		}
		sub.Close()
	})
}

func TestClosedSubscriptionLetsTheContainerCool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFakeSource()
		s := running(t, Config{}, src)
		s.Apply([]*task.Task{aTask(aContainer("a"))})
		sleep(2 * time.Second)
		sub := s.Subscribe("a")
		sleep(10 * time.Second)
		if n := len(src.feeds["a"].reads); n < 11 {
			t.Errorf("subscribed for 10 s: got %d samples", n)
		}
		sub.Close()
		sleep(time.Second)
		src.feeds["a"].reads = nil
		sleep(50 * time.Second)
		if n := len(src.feeds["a"].reads); n > 1 {
			t.Errorf("not subscribed for 50 s: got %d samples", n)
		}
	})
}

// A cell keeps the bytes that a reader holds as they were.
func TestSampleIsImmutable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := running(t, Config{}, newFakeSource())
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		c.Stats.Ask(time.Now().UnixNano())
		sleep(2 * time.Second)
		held := c.Stats.Load()
		text := strings.Clone(string(held.JSON))
		sleep(30 * time.Second)
		if c.Stats.Load() == held || string(held.JSON) != text {
			t.Error("a sample changed in its reader's hands")
		}
	})
}

// fakes orders the sampler's use of the fakes after what a test did to them before it slept.
var fakes sync.Mutex

// sleep lets d pass and everything that falls due by then happen.
func sleep(d time.Duration) {
	fakes.Lock()
	//lint:ignore SA2001 it is all about the order
	fakes.Unlock()
	time.Sleep(d)
	synctest.Wait()
}
