// Package stats samples the containers' counters and renders each sample once, before any request,
// as the Engine API's stats object.
//
// One Sampler serves the whole host. It stores what it renders in each container's task.StatsCell,
// where the server finds it without a lock and without waiting. The numbers come from a Source: the
// kernel's cgroup files, or the Engine's own stream.
package stats

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"metad/pkg/fdbudget"
	"metad/pkg/task"

	"go.uber.org/zap"
)

// Source opens containers for sampling.
type Source interface {
	// Open starts to follow a running container of t. deliver takes samples that arrive at
	// other times than a call of Sample. It copies the counters, and may be called from any
	// goroutine and after Close.
	Open(t *task.Task, c *task.Container, deliver func(*Counters)) (Feed, error)
}

// Feed follows one container. Its methods are called under the sampler's lock, so they may wait
// only for local files.
type Feed interface {
	// Sample takes a sample. hot: a client wants one each second. It returns the counters,
	// valid until the next call, or nil if they will be delivered.
	Sample(hot bool) (*Counters, error)
	Close()
}

// Config is the sampler's timing. Zero values take the defaults.
type Config struct {
	// HotFor is how long after a request a container is sampled each second. With the default,
	// 65 s, one request a minute keeps it hot.
	HotFor time.Duration
	// Cold is the time between two samples without requests; default 90 s.
	Cold time.Duration

	// Keep has the newest counters kept beside what is rendered of them, for EachKept.
	Keep bool

	Log    *zap.Logger      // nil: none
	Budget *fdbudget.Budget // that of the sources; nil: the process's
}

const (
	hotInterval = time.Second
	// The hot containers are sampled in groups, which are spread over the slots of a second. A
	// large group is cheap, because each group starts with cold processor caches: in groups of
	// 5 a sample costs twice as much as in groups of 50. A small group frees the processor
	// sooner: 128 take about 10 ms.
	slots = 10
	slot  = hotInterval / slots
	group = 128
	// together is how late a container may be sampled, or a request noticed, so that several
	// are done at once.
	together = slot / 5
	// prime is the time from a container's first sample to its second. The first is not shown;
	// the second has a real precpu_stats. The host's CPU time moves in steps of 10 ms, so it
	// is precise to 2 %.
	prime = 500 * time.Millisecond
	// retry is the time to the second attempt to sample a container; it doubles from there.
	retry = 100 * time.Millisecond
	// burst is the time between first samples if many containers appear at once.
	burst = time.Millisecond
)

// Metrics counts what the sampler did since its start.
type Metrics struct {
	Samples atomic.Uint64 // rendered
	// not rendered: a file was missing, cut off, huge, or in another format
	Damaged atomic.Uint64
	Gone    atomic.Uint64 // not rendered: the container had ended
	Short   atomic.Uint64 // not rendered: the process had no file descriptor free
	Failed  atomic.Uint64 // not rendered: anything else, such as a container that was not found
}

// Sampler keeps the statistics of all containers. Its methods are safe for concurrent use.
type Sampler struct {
	cfg     Config
	sources []Source
	epoch   time.Time // what "now" and "due" count from; monotonic
	metrics Metrics
	wake    chan struct{} // there is something new to do
	asked   chan struct{} // for a container that was cold

	// guards what follows, the entries, their feeds, and what the feeds share
	mu      sync.Mutex
	stopped bool
	applied []*task.Task      // by the last Apply
	entries map[string]*entry // by container id
	added   []*entry          // not in order yet
	order   []*entry          // the same; replaced, not changed, by Apply
	scratch []byte
	short   shortage
}

// entry is a container being sampled.
type entry struct {
	task *task.Task
	c    *task.Container
	cell *task.StatsCell
	name string // as the Engine prints it, with a slash

	feed     Feed // nil: not open
	feedGen  int  // tells a feed's late deliveries from its successor's
	phase    time.Duration
	due      time.Duration
	hot      bool
	failures uint // in a row
	waits    uint // in a row: its interfaces were not listed yet

	// last is the newest sample, shown or not. Its cpu_stats are the precpu_stats of the next.
	last             *task.Sample
	cpuStart, cpuEnd int
	net              traffic   // of the newest sample
	kept             *Counters // of the newest sample, with Config.Keep
	rendered         int       // samples since the container started, or metad did; up to 2

	subscribers int
	news        chan struct{} // closed at the next sample and at the end; nil: nobody waits
	ended       bool
}

// New returns a sampler that takes each container from the first of sources that can open it. Run
// does the work.
func New(cfg Config, sources ...Source) *Sampler {
	if cfg.HotFor == 0 {
		cfg.HotFor = 65 * time.Second
	}
	if cfg.Cold == 0 {
		cfg.Cold = 90 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Budget == nil {
		cfg.Budget = fdbudget.Process()
	}
	return &Sampler{
		cfg: cfg, sources: sources,
		epoch:   time.Now(),
		wake:    make(chan struct{}, 1),
		asked:   make(chan struct{}, 1),
		entries: make(map[string]*entry),
		short:   shortage{log: cfg.Log, budget: cfg.Budget},
	}
}

// Metrics returns the counters, which go on counting.
func (s *Sampler) Metrics() *Metrics { return &s.metrics }

// Apply makes the running containers of tasks the ones that are sampled. The set is the whole set:
// a container that is not in it, or does not run, has its cell emptied before Apply returns. tasks
// are ordered by ARN; one whose pointer has not changed costs a comparison.
func (s *Sampler) Apply(tasks []*task.Task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return
	}
	var changed, before []*task.Task
	for was, is := range task.Diff(s.applied, tasks) {
		if was != nil {
			before = append(before, was)
		}
		if is != nil {
			changed = append(changed, is)
		}
	}
	s.applied = tasks
	added, due := s.add(changed)
	ended := s.drop(before)
	if added > 0 || ended > 0 {
		s.arrange(added)
	}
	if added > 0 || due {
		s.signal()
	}
}

// add follows the running containers of tasks that are new or have changed. It returns how many
// containers are new, and whether another one is due now.
func (s *Sampler) add(changed []*task.Task) (added int, due bool) {
	now := time.Since(s.epoch)
	for _, t := range changed {
		for _, c := range t.Containers {
			if c.ID == "" || !c.Running() || c.Stats == nil {
				continue
			}
			e := s.entries[c.ID]
			if e != nil {
				due = s.change(e, t, c, now) || due
				continue
			}
			e = &entry{
				task: t, c: c, cell: c.Stats, name: "/" + c.DockerName,
				due: now + time.Duration(added)*burst,
			}
			added++
			c.Stats.Notify(s.asked)
			s.entries[c.ID] = e
			s.added = append(s.added, e)
		}
	}
	return added, due
}

// drop ends the containers of tasks that are gone, or have changed, and are no other task's now. It
// returns how many.
func (s *Sampler) drop(tasks []*task.Task) (ended int) {
	for _, t := range tasks {
		for _, c := range t.Containers {
			if e := s.entries[c.ID]; e != nil && e.task == t {
				s.end(e)
				delete(s.entries, c.ID)
				ended++
			}
		}
	}
	return ended
}

// arrange makes a new order of sampling. A pass may still use the old one.
func (s *Sampler) arrange(added int) {
	order := make([]*entry, 0, len(s.order)+added)
	for _, list := range [][]*entry{s.order, s.added} {
		for _, e := range list {
			if !e.ended {
				e.phase = time.Duration(len(order)/group%slots) * slot
				order = append(order, e)
			}
		}
	}
	clear(s.added)
	s.order, s.added = order, s.added[:0]
}

// change gives e a new description of its container. It returns whether e is due now.
func (s *Sampler) change(e *entry, t *task.Task, c *task.Container, now time.Duration) (due bool) {
	oldNet, _ := netProcess(e.task, e.c)
	newNet, _ := netProcess(t, c)
	restarted := e.c.PID != c.PID || !e.c.StartedAt.Equal(c.StartedAt)
	if restarted {
		// Its counters start from zero: no number of its former life may show.
		e.cell.Store(nil)
		e.rendered = 0
	}
	if restarted || oldNet.PID != newNet.PID {
		s.closeFeed(e)
		due = true
	}
	if e.cell != c.Stats {
		e.cell.Store(nil)
		e.cell = c.Stats
		e.cell.Notify(s.asked)
		due = true // it may have been asked for before
	}
	if due {
		e.due, e.failures = now, 0
	}
	e.task, e.c, e.name = t, c, "/"+c.DockerName
	return due
}

func (s *Sampler) closeFeed(e *entry) {
	if e.feed != nil {
		e.feed.Close()
		e.feed = nil
	}
	e.feedGen++
}

// end stops following a container.
func (s *Sampler) end(e *entry) {
	e.ended = true
	s.closeFeed(e)
	e.cell.Store(nil)
	e.announce()
}

// announce wakes the goroutines that wait for a sample.
func (e *entry) announce() {
	if e.news != nil {
		close(e.news)
		e.news = nil
	}
}

func (s *Sampler) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run samples until ctx is done, then empties all cells and ends all subscriptions.
func (s *Sampler) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last time.Time
	asked := false
	for {
		select {
		case <-ctx.Done():
			s.stop()
			return
		case <-s.wake:
			timer.Reset(max(0, together-time.Since(last)))
		case <-s.asked:
			asked = true
			timer.Reset(max(0, together-time.Since(last)))
		case <-timer.C:
			last = time.Now()
			timer.Reset(s.pass(asked))
			asked = false
		}
	}
}

func (s *Sampler) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	for _, e := range s.order {
		s.end(e)
	}
	clear(s.entries)
	s.applied = nil
	s.order = nil
}

// pass samples every container that is due and returns the time until the next pass. asked: cold
// containers may have been asked for.
func (s *Sampler) pass(asked bool) time.Duration {
	clock := time.Now()
	now, wall := clock.Sub(s.epoch), clock.UnixNano()
	next := now + s.cfg.Cold
	s.mu.Lock()
	for _, e := range s.order {
		if e.ended {
			continue // Apply has replaced the list meanwhile
		}
		sampled := false
		if e.due <= now || e.hot || asked || e.subscribers > 0 {
			sampled = s.step(e, now, wall)
		}
		if sampled {
			// Unlocked between two containers, so that Apply does not wait for a
			// thousand of them.
			s.mu.Unlock()
			s.mu.Lock()
		}
		next = min(next, e.due)
	}
	s.mu.Unlock()
	return max(next-time.Since(s.epoch), together)
}

// step samples e if it is due, and sets its next time.
func (s *Sampler) step(e *entry, now time.Duration, wall int64) (sampled bool) {
	if hot := e.subscribers > 0 || s.askedFor(e, wall); hot != e.hot {
		// Both changes take effect at once. A client gets a fresh sample soon, and a
		// source closes the stream or the files that it keeps open for a hot container.
		e.hot, e.due = hot, now
	}
	if e.due > now {
		return false
	}
	err := s.sample(e)
	if errors.Is(err, errNotYet) {
		e.due = now + together<<min(e.waits, 4)
		e.waits++
		return true
	}
	e.waits = 0
	switch {
	case err != nil:
		s.failed(e, err)
		e.due = now + min(retry<<min(e.failures, 16), s.interval(e))
		e.failures++
	case e.rendered < 2:
		e.failures = 0
		e.due = now + prime
	case e.hot:
		e.failures = 0
		e.due = now.Truncate(hotInterval) + e.phase
		if e.due <= now {
			e.due += hotInterval
		}
	default:
		e.failures = 0
		e.due = now + s.cfg.Cold
	}
	return true
}

func (s *Sampler) interval(e *entry) time.Duration {
	if e.hot {
		return hotInterval
	}
	return s.cfg.Cold
}

// askedFor reports whether there was a request for e within HotFor. A clock that was set back does
// not keep a container hot for long.
func (s *Sampler) askedFor(e *entry, wall int64) bool {
	at := e.cell.Asked()
	if at == 0 {
		return false
	}
	ago := time.Duration(wall - at)
	return ago < s.cfg.HotFor && ago > -s.cfg.HotFor
}

// sample takes a sample from e's feed, which it opens if necessary, and publishes it.
func (s *Sampler) sample(e *entry) error {
	if e.feed == nil {
		if err := s.open(e); err != nil {
			return err
		}
	}
	c, err := e.feed.Sample(e.hot)
	if err != nil {
		return err
	}
	if c != nil {
		s.publish(e, c)
	}
	return nil
}

func (s *Sampler) open(e *entry) error {
	var errs []error
	gen := e.feedGen
	deliver := func(c *Counters) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !e.ended && e.feedGen == gen {
			s.publish(e, c)
		}
	}
	for _, src := range s.sources {
		feed, err := src.Open(e.task, e.c, deliver)
		if err == nil {
			e.feed = feed
			return nil
		}
		if errors.Is(err, errGone) || isShort(err) {
			return err // no other source can help
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// failed removes e's sample: no numbers are better than old or wrong ones. The next attempt opens
// the feed again. If the process has no descriptor free, e keeps its last sample, which has the
// time of its reading.
func (s *Sampler) failed(e *entry, err error) {
	s.closeFeed(e)
	if isShort(err) {
		s.metrics.Short.Add(1)
		s.short.failed(err)
		return
	}
	e.cell.Store(nil)
	switch {
	case errors.Is(err, errGone):
		s.metrics.Gone.Add(1)
		return
	case errors.Is(err, errDamaged):
		s.metrics.Damaged.Add(1)
	default:
		s.metrics.Failed.Add(1)
	}
	if e.failures == 0 {
		s.cfg.Log.Warn("cannot sample container", zap.String("container", e.c.ID),
			zap.String("task", e.task.ID), zap.Error(err))
	}
}

// publish renders c as e's newest sample.
//
// Each sample has its own memory, of exactly its size. A slow connection may hold the bytes of a
// sample for any time, so a buffer could not be reused; the garbage collector frees it.
func (s *Sampler) publish(e *entry, c *Counters) {
	var prev previous
	if e.last != nil {
		prev = previous{read: e.last.Read, cpu: e.last.JSON[e.cpuStart:e.cpuEnd],
			net: e.net}
	}
	s.scratch, e.cpuStart, e.cpuEnd = appendSample(s.scratch[:0], e.c.ID, e.name, c, prev)
	var v2 int
	s.scratch, v2 = appendRates(s.scratch, c, prev)
	e.net = trafficOf(c.Networks)
	if s.cfg.Keep {
		e.keep(c)
	}
	sample := &task.Sample{JSON: make([]byte, len(s.scratch)), V2: v2, Read: c.Read}
	copy(sample.JSON, s.scratch)
	e.last = sample
	s.metrics.Samples.Add(1)
	if e.rendered == 0 {
		e.rendered = 1
		return
	}
	e.rendered = 2
	e.cell.Store(sample)
	e.announce()
}
