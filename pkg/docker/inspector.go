package docker

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"metad/pkg/task"
)

// priority is the queue in which a container waits for its look.
type priority int

const (
	// The Engine did not answer the last look. In this queue no other container waits for it.
	prioritySlow     priority = iota
	priorityRecheck           // the list has it
	priorityCreated           // just created
	priorityEvent             // something has happened to it
	priorityStarting          // about to run
	priorities
)

// places is the number of concurrent looks of each queue. The Engine holds a container's lock
// during its start, so a look at a container that is about to start takes that long.
var places = [priorities]int{
	prioritySlow: 4, priorityRecheck: 8, priorityCreated: 64, priorityEvent: 16,
	priorityStarting: 16,
}

const (
	inspectTimeout = 10 * time.Second
	// A look that takes longer than slowAfter gives up its place, as long as no more than
	// maxOvertime do.
	slowAfter   = 200 * time.Millisecond
	maxOvertime = 48
)

// inspector runs looks: it inspects containers and reads their network namespaces. It decides the
// order, how many run at once, and when to try again. A container has one look at a time, and
// another one if it was wanted meanwhile.
//
// Its methods belong to one goroutine, which calls dispatch after them, and done for each of
// findings.
type inspector struct {
	// look takes a look. It runs concurrently, changes only the finding, and ends with ctx.
	look func(context.Context, *finding)
	// known returns the input of a look: the last description of a container, nil if there is
	// none, and the process of a container that is about to run, otherwise 0.
	known func(id string) (*description, int)

	findings chan *finding // has room for all that can be under way
	due      chan func()   // timers whose time has come: to be called

	lines    [priorities]line
	overtime int // looks that go on and have no place any more
	subjects map[string]*subject
	looks    sync.WaitGroup
	ended    chan struct{}

	inspects, failures atomic.Uint64
}

// line is the queue of the containers that wait for a look of one priority.
type line struct {
	ids  []string
	busy int
}

// subject is a container that waits for a look, has one, or had one.
type subject struct {
	id       string
	waits    bool     // in line, or will when the present look is done
	line     priority // of those it is wanted in, the highest
	inspect  bool     // the next look is at what the Engine says too
	looking  bool
	outdated bool // what the present look finds in the namespace is of before
	// the Engine did not answer in time: until it does, only its slowest line will do
	slow   bool
	tries  int // failed looks in a row
	awaits int // looks at a namespace that was not connected yet
	retry  *time.Timer
}

// finding is the result of one look.
type finding struct {
	id        string
	inspected bool // else only the namespace was read
	newborn   int  // process of a container that does not run yet: its namespace was read
	desc      *description
	ns        *namespace
	cgroup    task.Cgroup // zero if it has none of its own
	err       error       // the Engine's
	nsErr     error
	outdated  bool // the container has ended since the look began: ns is of before

	subject  *subject
	line     priority
	overtime bool // it has given its place to another
	over     bool
	timer    *time.Timer // to overtime
}

func newInspector(look func(context.Context, *finding), known func(string) (*description,
	int)) *inspector {
	room := maxOvertime
	for _, n := range places {
		room += n
	}
	return &inspector{look: look, known: known, findings: make(chan *finding, room),
		due:      make(chan func()),
		subjects: map[string]*subject{}, ended: make(chan struct{})}
}

// want queues a look at the container: an inspect, and its namespace if it has one.
func (in *inspector) want(id string, p priority) {
	in.subject(id).inspect = true
	in.wantNamespace(id, p)
}

// wantNamespace queues a look at the container's namespace.
func (in *inspector) wantNamespace(id string, p priority) {
	s := in.subject(id)
	s.stopRetry()
	if s.slow {
		p = prioritySlow
	}
	if s.waits && s.line >= p {
		return
	}
	// An old entry in another queue is skipped when its turn comes.
	s.waits, s.line = true, p
	if !s.looking {
		in.lines[p].ids = append(in.lines[p].ids, id)
	}
}

func (in *inspector) subject(id string) *subject {
	s := in.subjects[id]
	if s == nil {
		s = &subject{id: id}
		in.subjects[id] = s
	}
	return s
}

// busy reports whether the container has a look or waits for one.
func (in *inspector) busy(id string) bool {
	s := in.subjects[id]
	return s != nil && (s.waits || s.looking)
}

// hasEnded is called when the container has ended. What a running look finds in its namespace is
// out of date.
func (in *inspector) hasEnded(id string) {
	if s := in.subjects[id]; s != nil {
		s.outdated = s.looking
	}
}

// forget removes a container that is gone.
func (in *inspector) forget(id string) {
	if s := in.subjects[id]; s != nil {
		s.stopRetry()
		delete(in.subjects, id)
	}
}

// failed queues another look for later, and returns how many looks in a row have failed.
func (in *inspector) failed(id string) (tries int) {
	in.failures.Add(1)
	return in.again(id)
}

// again queues another look for later, each time in a row with a longer delay. It returns the
// number of times.
func (in *inspector) again(id string) (tries int) {
	s := in.subject(id)
	s.tries++
	in.retryIn(s, backoff(20*time.Millisecond, s.tries, 10*time.Second), func() {
		in.want(id, priorityRecheck)
	})
	return s.tries
}

// succeeded is called after a look without failure.
func (in *inspector) succeeded(id string) { in.subject(id).tries = 0 }

// await has the namespace read again soon, at the latest after longest. Another program is about
// to connect it, and does not report that.
func (in *inspector) await(id string, p priority, longest time.Duration) {
	s := in.subject(id)
	in.retryIn(s, backoff(2*time.Millisecond, s.awaits, longest), func() {
		in.wantNamespace(id, p)
	})
	s.awaits++
}

// later has the namespace read after d, unless there is a look at the container before.
func (in *inspector) later(id string, d time.Duration) {
	if s := in.subject(id); s.retry == nil {
		in.retryIn(s, d, func() { in.wantNamespace(id, priorityRecheck) })
	}
}

// connected resets the delay of await.
func (in *inspector) connected(id string) { in.subject(id).awaits = 0 }

// retryIn has f called after d, unless there is a look at the container before.
func (in *inspector) retryIn(s *subject, d time.Duration, f func()) {
	if s.waits {
		return
	}
	s.stopRetry()
	var t *time.Timer
	t = in.after(d, func() {
		if s.retry == t {
			f()
		}
	})
	s.retry = t
}

// after sends f on due after d.
func (in *inspector) after(d time.Duration, f func()) *time.Timer {
	return time.AfterFunc(d, func() {
		select {
		case in.due <- f:
		case <-in.ended:
		}
	})
}

func (s *subject) stopRetry() {
	if s.retry != nil {
		s.retry.Stop()
		s.retry = nil
	}
}

// dispatch starts looks while there are free places.
func (in *inspector) dispatch(ctx context.Context) {
	for p := priorities - 1; p >= 0; p-- {
		l := &in.lines[p]
		for l.busy < places[p] && len(l.ids) > 0 {
			s := in.subjects[l.ids[0]]
			l.ids = l.ids[1:]
			if s != nil && s.waits && s.line == p && !s.looking {
				in.start(ctx, s)
			}
		}
	}
}

// start starts the next look at s.
func (in *inspector) start(ctx context.Context, s *subject) {
	f := &finding{id: s.id, subject: s, line: s.line, inspected: s.inspect}
	f.desc, f.newborn = in.known(s.id)
	if f.inspected {
		in.inspects.Add(1)
	}
	s.waits, s.looking, s.outdated, s.inspect = false, true, false, false
	in.lines[f.line].busy++
	f.timer = in.after(slowAfter, func() { in.takesLong(f) })
	in.looks.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
		defer cancel()
		in.look(ctx, f)
		in.findings <- f
	})
}

// takesLong frees the place of a look that takes long.
func (in *inspector) takesLong(f *finding) {
	if !f.over && f.line != prioritySlow && in.overtime < maxOvertime {
		f.overtime = true
		in.overtime++
		in.lines[f.line].busy--
	}
}

// done ends the look with the finding f, and reports whether the finding is still of use.
func (in *inspector) done(f *finding) bool {
	f.timer.Stop()
	if f.over = true; f.overtime {
		in.overtime--
	} else {
		in.lines[f.line].busy--
	}
	s := f.subject
	if in.subjects[f.id] != s {
		return false
	}
	f.outdated, s.looking = s.outdated, false
	if f.inspected {
		s.slow = errors.Is(f.err, context.DeadlineExceeded)
	}
	if s.waits { // asked for meanwhile: now it may stand in line
		if s.slow {
			s.line = prioritySlow
		}
		in.lines[s.line].ids = append(in.lines[s.line].ids, s.id)
	}
	return true
}

// close waits for the looks, whose ctx must have ended.
func (in *inspector) close() {
	close(in.ended)
	in.looks.Wait()
	for _, s := range in.subjects {
		s.stopRetry()
	}
}
