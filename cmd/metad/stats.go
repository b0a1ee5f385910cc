package main

import (
	"context"

	"metad/pkg/stats"
	"metad/pkg/task"
)

// samples is the sampler as the server wants it.
type samples struct{ *stats.Sampler }

// Subscribe implements server.Samples.
func (s samples) Subscribe(id string) (<-chan *task.Sample, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ch := make(chan *task.Sample)
	sub := s.Sampler.Subscribe(id)
	if sub == nil {
		close(ch)
		return ch, cancel
	}
	go func() {
		defer close(ch)
		defer sub.Close()
		for {
			sample, err := sub.Next(ctx)
			if err != nil {
				return
			}
			select {
			case ch <- sample:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ch, cancel
}
