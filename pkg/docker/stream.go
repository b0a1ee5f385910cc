package docker

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	"go.uber.org/zap"
)

// listTimeout ends a list that hangs. A slow Engine may take long.
const listTimeout = 5 * time.Minute

// stream follows an Engine. It keeps an event stream open, and lists the containers each time
// after it has opened one and on request. While the Engine is away, it tries again until the
// Engine is back. A failed list is tried again, and does not affect the events.
type stream struct {
	engine  Engine
	log     *zap.Logger
	bridges *bridges // nil: nobody wants to know

	events chan events.Message
	lists  chan listing

	relist    chan struct{} // holds one token while a list is asked for
	connected atomic.Bool   // the event stream is open, and the containers were listed since
	received  atomic.Uint64 // events
	failures  atomic.Uint64 // streams and lists
	opened    atomic.Uint64 // streams
}

// listing is the Engine's list of all containers.
type listing struct {
	containers []container.Summary
	// the first since the event stream was opened: anything may have changed unseen
	connected bool
}

func newStream(engine Engine, log *zap.Logger) *stream {
	return &stream{
		engine: engine,
		log:    log,
		// The Engine drops events for a client that reads slowly.
		events: make(chan events.Message, 4096),
		lists:  make(chan listing),
		relist: make(chan struct{}, 1),
	}
}

// listAgain requests a list. It never blocks.
func (s *stream) listAgain() {
	select {
	case s.relist <- struct{}{}:
	default: // one is asked for already
	}
}

// run follows the Engine until ctx ends.
func (s *stream) run(ctx context.Context) {
	since := time.Now()
	var away trouble
	for tries := 0; ; tries++ {
		err := s.follow(ctx, &since)
		if s.connected.Swap(false) {
			tries, away = 0, nil
		}
		if ctx.Err() != nil {
			return
		}
		s.failures.Add(1)
		if away.isNew(err) {
			s.log.Warn("docker is away: keeping the tasks as they are", zap.Error(err))
		}
		select {
		case <-time.After(backoff(20*time.Millisecond, tries, 2*time.Second)):
		case <-ctx.Done():
			return
		}
	}
}

// actions are the events that the stream requests. Others come often and are of no use: each
// health check makes an exec_… event.
var actions = []events.Action{events.ActionCreate, events.ActionStart, events.ActionDie,
	events.ActionDestroy, events.ActionRename, events.ActionPause, events.ActionUnPause,
	events.ActionHealthStatus, events.ActionRestart, events.ActionUpdate, events.ActionConnect,
	events.ActionDisconnect}

// open opens an event stream that begins with the events of since. It ends with ctx.
func (s *stream) open(ctx context.Context, since time.Time) (<-chan events.Message, <-chan error,
	error) {
	if e, ok := s.engine.(interface{ Renew() error }); ok {
		if err := e.Renew(); err != nil {
			return nil, nil, err
		}
	}
	wanted := filters.NewArgs(filters.Arg("type", string(events.ContainerEventType)),
		filters.Arg("type", string(events.NetworkEventType)))
	for _, a := range actions {
		wanted.Add("event", string(a))
	}
	// The Engine answers before it subscribes the client, so since must include the time
	// between. It keeps the last 256 events.
	messages, errs := s.engine.Events(ctx, events.ListOptions{
		Since:   fmt.Sprintf("%d.%09d", since.Unix(), since.Nanosecond()),
		Filters: wanted,
	})
	select {
	case err := <-errs: // the answer was an error
		return nil, nil, fmt.Errorf("open event stream: %w", err)
	default:
		return messages, errs, nil
	}
}

// follow reads events from *since on until the stream ends, and sets *since to the start of the
// next stream.
func (s *stream) follow(ctx context.Context, since *time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	messages, errs, err := s.open(ctx, *since)
	if err != nil {
		cancel()
		return err
	}
	var listing sync.WaitGroup
	listing.Go(func() { s.keepListing(ctx) })
	defer func() {
		cancel()
		listing.Wait()
	}()
	for {
		select {
		case m := <-messages:
			s.received.Add(1)
			if t := time.Unix(0, m.TimeNano); m.TimeNano > 0 && t.After(*since) {
				*since = t
			}
			if m.Type == events.NetworkEventType &&
				m.Actor.Attributes["container"] == "" {
				s.bridgesChanged()
			}
			select {
			case s.events <- m:
			case <-ctx.Done():
				return ctx.Err()
			}
		case err := <-errs:
			return fmt.Errorf("event stream: %w", err)
		}
	}
}

func (s *stream) bridgesChanged() {
	if s.bridges != nil {
		s.bridges.changed()
	}
}

// keepListing lists the containers now and on request, until ctx ends. It tries a failed list
// again.
func (s *stream) keepListing(ctx context.Context) {
	var failing trouble
	for tries := 0; ; {
		s.bridgesChanged()
		var again <-chan time.Time
		if err := s.list(ctx); err == nil {
			tries, failing = 0, nil
		} else if ctx.Err() == nil {
			s.failures.Add(1)
			if failing.isNew(err) {
				s.log.Warn("containers not listed: keeping what is known",
					zap.Error(err))
			}
			again = time.After(backoff(50*time.Millisecond, tries, 30*time.Second))
			tries++
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
		case <-s.relist:
		}
	}
}

// list delivers one list of the containers.
func (s *stream) list(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	containers, err := s.engine.ContainerList(ctx, container.ListOptions{All: true})
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	select {
	case s.lists <- listing{containers, !s.connected.Load()}:
	case <-ctx.Done():
		return ctx.Err()
	}
	if !s.connected.Swap(true) {
		s.opened.Add(1)
		s.log.Info("following docker")
	}
	return nil
}

// backoff is the delay after so many tries.
func backoff(shortest time.Duration, tries int, longest time.Duration) time.Duration {
	return min(shortest<<min(tries, 16), longest)
}
