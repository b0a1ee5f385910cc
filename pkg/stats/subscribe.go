package stats

import (
	"context"
	"io"

	"metad/pkg/task"
)

// Subscription returns a container's samples one after the other. It is for one goroutine.
type Subscription struct {
	s    *Sampler
	e    *entry
	seen *task.Sample
}

// Subscribe follows the container with the full Docker id, which is sampled each second until the
// subscription is closed. Returns nil if no such container runs.
func (s *Sampler) Subscribe(id string) *Subscription {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil {
		return nil
	}
	sub := &Subscription{s: s, e: e}
	if !e.hot {
		sub.seen = e.cell.Load() // may be old: not news
	}
	e.subscribers++
	s.signal()
	return sub
}

// Next waits for a sample that it has not returned yet, and returns the newest one: older ones are
// skipped. It returns io.EOF after the container has stopped, or ctx's error.
func (sub *Subscription) Next(ctx context.Context) (*task.Sample, error) {
	for {
		sub.s.mu.Lock()
		e := sub.e
		if e.ended {
			sub.s.mu.Unlock()
			return nil, io.EOF
		}
		if sample := e.cell.Load(); sample != nil && sample != sub.seen {
			sub.seen = sample
			sub.s.mu.Unlock()
			return sample, nil
		}
		if e.news == nil {
			e.news = make(chan struct{})
		}
		news := e.news
		sub.s.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the subscription. It may be called once.
func (sub *Subscription) Close() {
	sub.s.mu.Lock()
	defer sub.s.mu.Unlock()
	sub.e.subscribers--
}
