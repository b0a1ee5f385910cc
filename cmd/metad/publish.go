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
	filling        // tasks are published; packets go where they went before metad
	serving        // packets come here
	offering       // a successor may write to the kernel's map at any moment
	replaced       // a successor serves; what was accepted here is answered here
	stopping       // packets go where they went before metad; what was accepted is answered
)

// publishes reports whether this process writes to the kernel's map.
func (s state) publishes() bool { return s == filling || s == serving || s == stopping }

// answers reports whether packets come here.
func (s state) answers() bool { return s == serving || s == offering }

// publisher brings each complete set of tasks to its consumers: to the table first, before it
// returns, so that a task is known as early as can be. The others find the latest set in their
// mailbox, so that no disk and no lock of theirs holds up a task's identity.
type publisher struct {
	log       *zap.Logger
	table     *lookup.Table
	mailboxes []mailbox[[]*task.Task]

	mu     sync.Mutex // guards what follows, and is held while tasks are published
	state  state
	tasks  []*task.Task               // the last complete set; nil before the first
	before map[string]*task.Container // known to an earlier process; nil after the first set
	failed error                      // of the table's last try
}

// mailbox returns a mailbox that gets every set from now on. Call it before the first one.
func (p *publisher) mailbox() mailbox[[]*task.Task] {
	m := newMailbox[[]*task.Task]()
	p.mailboxes = append(p.mailboxes, m)
	return m
}

// restore publishes what an earlier process knew.
func (p *publisher) restore(saved []lookup.Saved) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.table.Restore(saved); err != nil {
		return err
	}
	p.remember()
	return nil
}

// published returns the tasks of the table: at the beginning, those that an earlier process knew.
func (p *publisher) published() (tasks []*task.Task) {
	for _, v := range p.table.Views() {
		tasks = append(tasks, v.Task)
	}
	return tasks
}

// remember notes what the table knows as known to an earlier process.
func (p *publisher) remember() {
	p.before = map[string]*task.Container{}
	for _, v := range p.table.Views() {
		for _, c := range v.Task.Containers {
			p.before[c.ID] = c
		}
	}
}

// apply takes a new complete set. It is published now, or when the state allows it.
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

// enter needs p.mu.
func (p *publisher) enter(s state) {
	published := p.state.publishes()
	p.state = s
	if !published {
		p.publish()
	}
}

// serve goes from filling to serving by arm, which has packets come here. In any other state it
// does nothing.
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

// offer goes from serving to offering. There is nothing to take over before packets come here: they
// would come to the successor at once, which knows no task.
func (p *publisher) offer() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != serving {
		return errors.New("the running metad does not serve yet")
	}
	p.enter(offering)
	return nil
}

// resume goes back to serving after a takeover that did not happen, if there was one: go on says
// the same to the kernel's side.
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

// retry gives addresses that the kernel's map had no room for another chance.
func (p *publisher) retry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state.publishes() {
		p.logTable(p.table.Retry())
	}
}

// publishes reports whether the tasks are this process's to write down.
func (p *publisher) publishes() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state.publishes()
}

// ready returns why containers are not answered from a complete set, nil if they are.
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

// publish needs p.mu.
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

// carryOver gives the containers that an earlier process knew its samples of them, which hold until
// there are newer ones. Needs p.mu.
func (p *publisher) carryOver() {
	if p.before == nil {
		return
	}
	for _, t := range p.tasks {
		for _, c := range t.Containers {
			// The counters of a container that was started again begin anew.
			if old := p.before[c.ID]; old != nil && c.Running() &&
				c.StartedAt.Equal(old.StartedAt) && c.Stats.Load() == nil {
				c.Stats.Store(old.Stats.Load())
			}
		}
	}
	p.before = nil
}

// logTable logs when a table's error comes and when it has gone, not each time in between. Needs
// p.mu.
func (p *publisher) logTable(err error) {
	switch {
	case err != nil && p.failed == nil:
		p.log.Error("some addresses are not served", zap.Error(err))
	case err == nil && p.failed != nil:
		p.log.Info("all addresses are served again")
	}
	p.failed = err
}
