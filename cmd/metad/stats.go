package main

import (
	"context"
	"fmt"
	"io"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
	"go.uber.org/zap"

	"metad/pkg/stats"
	"metad/pkg/task"
)

// newSampler returns the sampler with the source that --stats-source names, and what ends that source after Run
// has returned.
func newSampler(c *config, engine *client.Client, log *zap.Logger) (s *stats.Sampler, closeSource func(), err error) {
	ask := func(ctx context.Context, id string, stream bool) (io.ReadCloser, error) {
		get := engine.ContainerStats
		if !stream {
			get = func(ctx context.Context, id string, _ bool) (container.StatsResponseReader, error) {
				return engine.ContainerStatsOneShot(ctx, id)
			}
		}
		r, err := get(ctx, id, stream)
		return r.Body, err
	}
	source := c.statsSource
	if source == "auto" {
		source = "docker"
		if stats.Visible(stats.CgroupConfig{}) {
			source = "cgroup"
		}
	}
	log.Info("statistics", zap.String("source", source))
	if source == "docker" {
		d := stats.NewDockerSource(ask, stats.CgroupConfig{})
		return stats.New(stats.Config{Log: log}, d), d.Close, nil
	}
	cg, err := stats.NewCgroupSource(stats.CgroupConfig{})
	if err != nil {
		return nil, nil, fmt.Errorf("stats-source %s: %w", c.statsSource, err)
	}
	return stats.New(stats.Config{Log: log}, cg), func() {}, nil
}

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
