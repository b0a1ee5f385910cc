package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// untilEnd is a part that works until it is told to end.
func untilEnd(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// A part that fails ends the others, and its error is the one that stop returns.
func TestPartsEndWithTheFirstFailure(t *testing.T) {
	p := newParts(t.Context(), zap.NewNop())
	ctx, cancel := p.until(t.Context())
	defer cancel()
	others := make(chan struct{})
	p.run(func(ctx context.Context) error {
		defer close(others)
		<-ctx.Done()
		return errors.New("because of the first")
	})
	failure := errors.New("failure")
	p.run(func(context.Context) error { return failure })
	<-others
	<-ctx.Done()
	if err := p.stop(); !errors.Is(err, failure) || err.Error() != "failure" {
		t.Errorf("got %v, want %v alone", err, failure)
	}
	if err := p.stop(); err != nil {
		t.Errorf("second stop: got %v, want nil", err)
	}
}

// Parts outlive the context that they were made in, and stop waits for them.
func TestPartsAreStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	p := newParts(ctx, zap.NewNop())
	ended := false
	p.run(func(ctx context.Context) error {
		defer func() { ended = true }()
		return untilEnd(ctx)
	})
	cancel()
	if p.ctx.Err() != nil {
		t.Error("the parts ended with the context they were made in")
	}
	if err := p.stop(); err != nil || !ended {
		t.Errorf("got %v, ended %v, want nil and true", err, ended)
	}
}

// A part that a disk holds up does not hold up the stop, and the log names it.
func TestStopLeavesALoosePartBehind(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	p := newParts(t.Context(), zap.New(core))
	disk := make(chan struct{})
	defer close(disk)
	p.runLoose("stuck", func(context.Context) { <-disk })
	p.runLoose("stuck too", func(context.Context) { <-disk })
	p.runLoose("fine", func(ctx context.Context) { _ = untilEnd(ctx) })
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	var got []string
	for _, e := range logs.All() {
		got = append(got, e.ContextMap()["part"].(string))
	}
	equal(t, got, "stuck", "stuck too")
}

// What is for the operator is tried again until it works, and the log has a line for each change.
func TestKeepTrying(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	tries := 0
	taken := errors.New("address in use")
	keepTrying(ctx, zap.New(core), "listener", "admin",
		func(_ context.Context, up func()) error {
			if tries++; tries <= 5 {
				return taken
			}
			up()
			cancel()
			return nil
		})
	if tries != 6 {
		t.Errorf("got %d tries, want 6", tries)
	}
	var got []string
	for _, e := range logs.All() {
		got = append(got, e.Message+" listener="+e.ContextMap()["listener"].(string))
	}
	equal(t, got, "listener unavailable, retrying listener=admin", "listener available listener=admin")
}

// A killed metad has its addresses for a moment longer: that is not worth a line.
func TestKeepTryingIsQuietAtFirst(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	tries := 0
	keepTrying(t.Context(), zap.New(core), "listener", "admin",
		func(_ context.Context, up func()) error {
			if tries++; tries <= 2 {
				return errors.New("address in use")
			}
			up()
			return nil
		})
	if logs.Len() != 0 {
		t.Errorf("got %v, want no line", logs.All())
	}
}

// A file system that stalls while it is closed does not hold up the end.
func TestCloseWithin(t *testing.T) {
	disk := make(chan struct{})
	defer close(disk)
	if err := closeWithin(time.Millisecond,
		closer(func() error { <-disk; return nil })); err != nil {
		t.Error(err)
	}
	failure := errors.New("failure")
	if err := closeWithin(time.Minute, closer(func() error { return failure })); !errors.Is(err,
		failure) {
		t.Errorf("got %v, want %v", err, failure)
	}
}

type closer func() error

func (c closer) Close() error { return c() }
