package main

import (
	"context"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

// parts are the goroutines of a running metad. They end together: at stop, or when one fails.
type parts struct {
	log    *zap.Logger
	group  *errgroup.Group
	ctx    context.Context // ends at stop, or when a part has failed
	cancel context.CancelFunc

	// For one goroutine.
	loose   []loosePart
	stopped bool
}

// loosePart is a part that a frozen disk may hold up.
type loosePart struct {
	name string
	done chan struct{}
}

// looseTime is how long stop waits for a loose part.
const looseTime = 3 * time.Second

// newParts returns a group without a part. It outlives ctx: stop ends it.
func newParts(ctx context.Context, log *zap.Logger) *parts {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	group, ctx := errgroup.WithContext(ctx)
	return &parts{log: log, group: group, ctx: ctx, cancel: cancel}
}

// run starts f, which returns when its context ends. An error before that ends all parts.
func (p *parts) run(f func(context.Context) error) {
	p.group.Go(func() error {
		if err := f(p.ctx); p.ctx.Err() == nil {
			return err
		}
		return nil
	})
}

// runLoose is run for a part that cannot fail and may not return: stop does not wait long for it.
func (p *parts) runLoose(name string, f func(context.Context)) {
	l := loosePart{name, make(chan struct{})}
	p.loose = append(p.loose, l)
	go func() {
		defer close(l.done)
		f(p.ctx)
	}()
}

// until returns a context that ends when ctx does or when a part has failed.
func (p *parts) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// stop ends all parts, waits for them, and returns the error of the part that failed first, if one
// did. Called again, it does nothing.
func (p *parts) stop() error {
	if p.stopped {
		return nil
	}
	p.stopped = true
	p.cancel()
	err := p.group.Wait()
	patience := time.After(looseTime)
	for _, l := range p.loose {
		select {
		case <-l.done:
			continue
		default:
		}
		select {
		case <-l.done:
		case <-patience:
			p.log.Warn("part does not end: going on without it",
				zap.String("part", l.name))
			patience = time.After(0)
		}
	}
	return err
}

// Delays between two tries of a part that keepTrying runs. Failures before quietDelay are not
// logged: a metad that was killed may have an address for a moment longer.
const (
	firstDelay = 50 * time.Millisecond
	quietDelay = 16 * firstDelay
	lastDelay  = 5 * time.Second
)

// keepTrying runs f, which serves the operator and not containers: its failure never ends metad.
// If f fails, keepTrying calls it again until ctx ends. f calls up once it works. The log has a
// line when the error changes, and one when f works again; kind and name identify f.
func keepTrying(ctx context.Context, log *zap.Logger, kind, name string,
	f func(ctx context.Context, up func()) error) {
	log = log.With(zap.String(kind, name))
	delay, failure := firstDelay, ""
	for {
		err := f(ctx, func() {
			if failure != "" {
				log.Info(kind + " available")
			}
			delay, failure = firstDelay, ""
		})
		if ctx.Err() != nil || err == nil {
			return
		}
		if text := err.Error(); text != failure && delay >= quietDelay {
			failure = text
			log.Warn(kind+" unavailable, retrying", zap.Error(err))
		}
		pause(ctx, delay)
		delay = min(2*delay, lastDelay)
	}
}

// pause returns after t or when ctx ends.
func pause(ctx context.Context, t time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(t):
	}
}
