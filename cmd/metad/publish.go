package main

import (
	"errors"
	"fmt"
	"sync"

	"go.uber.org/zap"

	"metad/pkg/lookup"
	"metad/pkg/task"
)

// state is where metad is in its life.
//
//	starting ─▶ filling ─▶ serving ◀─▶ offering ─▶ replaced
//	(replaced ─▶ serving, if the successor dies)
//	                any of these ─▶ stopping
type state int

const (
	// the parts are made; another metad may still write to the kernel's map
	starting state = iota
	filling        // tasks are published; packets go where they go without metad
	serving        // packets come to this process
	offering       // a successor may write to the kernel's map at any moment
	replaced       // a successor serves; this process answers the connections that it accepted
	stopping       // packets go where they go without metad; accepted connections are answered
)

// publishes reports whether this process writes to the kernel's map.
func (s state) publishes() bool { return s == filling || s == serving || s == stopping }

// answers reports whether packets come to this process.
func (s state) answers() bool { return s == serving || s == offering }

// publisher passes each complete set of tasks to its consumers. The table comes first, before apply
// returns, so that a task is known as early as possible. The other consumers find the latest set in
// their mailbox: a slow disk or a lock of theirs delays no task.
type publisher struct {
	log       *zap.Logger
	table     *lookup.Table
	mailboxes []mailbox[[]*task.Task]

	mu     sync.Mutex // guards what follows, and is held while tasks are published
	state  state
	tasks  []*task.Task               // the last complete set; nil before the first
	before map[string]*task.Container // of an earlier process; nil after the first set
	failed error                      // of the last change of the table
}

// mailbox returns a mailbox that gets every set from now on. Call it before the first one.
func (p *publisher) mailbox() mailbox[[]*task.Task] {
	m := newMailbox[[]*task.Task]()
	p.mailboxes = append(p.mailboxes, m)
	return m
}

// restore publishes the tasks that an earlier process knew.
func (p *publisher) restore(saved []lookup.Saved) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.table.Restore(saved); err != nil {
		return err
	}
	p.remember()
	return nil
}

// published returns the tasks of the table. At the start these are the tasks of an earlier process.
func (p *publisher) published() (tasks []*task.Task) {
	for _, v := range p.table.Views() {
		tasks = append(tasks, v.Task)
	}
	return tasks
}

// remember stores the containers of the table as those of an earlier process.
func (p *publisher) remember() {
	p.before = map[string]*task.Container{}
	for _, v := range p.table.Views() {
		for _, c := range v.Task.Containers {
			p.before[c.ID] = c
		}
	}
}

// apply stores a new complete set, and publishes it now or as soon as the state allows it.
func (p *publisher) apply(tasks []*task.Task) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if tasks == nil {
		tasks = []*task.Task{}
	}
	p.tasks = tasks
	p.publish()
}

// to changes the state.
func (p *publisher) to(s state) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.enter(s)
}

// enter is to with p.mu held.
func (p *publisher) enter(s state) {
	published := p.state.publishes()
	p.state = s
	if !published {
		p.publish()
	}
}

// serve changes the state from filling to serving. It calls arm, which makes packets come to this
// process. In any other state it does nothing.
func (p *publisher) serve(arm func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != filling {
		return nil
	}
	if err := arm(); err != nil {
		return err
	}
	p.enter(serving)
	return nil
}

// offer changes the state from serving to offering. Before that there must be no takeover: packets
// would come to the successor at once, and it would know no task.
func (p *publisher) offer() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != serving {
		return errors.New("the running metad does not serve yet")
	}
	p.enter(offering)
	return nil
}

// resume changes the state back to serving after a failed takeover. goOn does the same for the
// kernel's side. Without a takeover resume does nothing.
func (p *publisher) resume(goOn func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != offering && p.state != replaced {
		return nil
	}
	err := goOn()
	p.enter(serving)
	return err
}

// retry tries again to publish the addresses for which the kernel's map had no room.
func (p *publisher) retry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state.publishes() {
		p.logTable(p.table.Retry())
	}
}

// publishes reports whether this process is the one that writes the tasks to disk.
func (p *publisher) publishes() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state.publishes()
}

// ready returns nil if containers are answered from a complete set of tasks, else the reason.
func (p *publisher) ready() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.tasks == nil:
		return errors.New("the Docker Engine has not answered yet")
	case !p.state.answers():
		return errors.New("packets are not redirected")
	case p.failed != nil:
		return fmt.Errorf("some addresses are not served: %w", p.failed)
	}
	return nil
}

// publish passes the tasks to the consumers if the state allows it. p.mu is held.
func (p *publisher) publish() {
	if p.tasks == nil || !p.state.publishes() {
		return
	}
	p.carryOver()
	p.logTable(p.table.Apply(p.tasks))
	for _, m := range p.mailboxes {
		m.put(p.tasks)
	}
}

// carryOver gives containers the samples that an earlier process took of them. They are used until
// there are newer ones. p.mu is held.
func (p *publisher) carryOver() {
	if p.before == nil {
		return
	}
	for _, t := range p.tasks {
		for _, c := range t.Containers {
			// The counters of a restarted container begin at zero.
			if old := p.before[c.ID]; old != nil && c.Running() &&
				c.StartedAt.Equal(old.StartedAt) && c.Stats.Load() == nil {
				c.Stats.Store(old.Stats.Load())
			}
		}
	}
	p.before = nil
}

// logTable logs the first error of the table, and the first success after it. p.mu is held.
func (p *publisher) logTable(err error) {
	switch {
	case err != nil && p.failed == nil:
		p.log.Error("some addresses are not served", zap.Error(err))
	case err == nil && p.failed != nil:
		p.log.Info("all addresses are served again")
	}
	p.failed = err
}
