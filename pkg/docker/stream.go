package docker

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
	"go.uber.org/zap"
)

const listTimeout = 30 * time.Second

// stream follows an Engine. It keeps an event stream open, and lists the containers each time after it
// has opened one and when asked to. An Engine that is away is tried until it is back.
type stream struct {
	engine Engine
	log    *zap.Logger
	now    func() time.Time

	events chan events.Message
	lists  chan listing

	relist    chan struct{} // holds one token while a list is asked for
	connected atomic.Bool
	received  atomic.Uint64 // events
	failures  atomic.Uint64 // streams and lists
	opened    atomic.Uint64 // streams
}

// listing is the Engine's list of all containers.
type listing struct {
	containers []container.Summary
	connected  bool // the first since the event stream was opened: anything may have changed unseen
}

func newStream(engine Engine, log *zap.Logger) *stream {
	return &stream{
		engine: engine,
		log:    log,
		now:    time.Now,
		events: make(chan events.Message, 4096), // the Engine drops events for a client that reads slowly
		lists:  make(chan listing),
		relist: make(chan struct{}, 1),
	}
}

// listAgain asks for a list. It never blocks.
func (s *stream) listAgain() {
	select {
	case s.relist <- struct{}{}:
	default: // one is asked for already
	}
}

// run follows the Engine until ctx ends.
func (s *stream) run(ctx context.Context) {
	since := s.now()
	for tries := 0; ; tries++ {
		err := s.follow(ctx, &since)
		if s.connected.Swap(false) {
			tries = 0
		}
		if ctx.Err() != nil {
			return
		}
		s.failures.Add(1)
		if tries == 0 {
			s.log.Warn("docker is away: keeping the tasks as they are", zap.Error(err))
		}
		select {
		case <-time.After(backoff(20*time.Millisecond, tries, 2*time.Second)):
		case <-ctx.Done():
			return
		}
	}
}

// actions are the events asked for. Others come often and say nothing: each health check is an exec_….
var actions = []events.Action{events.ActionCreate, events.ActionStart, events.ActionDie, events.ActionDestroy, events.ActionRename,
	events.ActionPause, events.ActionUnPause, events.ActionHealthStatus, events.ActionRestart, events.ActionUpdate,
	events.ActionConnect, events.ActionDisconnect}

// open opens an event stream that begins with the events of since. It ends with ctx.
func (s *stream) open(ctx context.Context, since time.Time) (<-chan events.Message, <-chan error, error) {
	wanted := filters.NewArgs(filters.Arg("type", string(events.ContainerEventType)), filters.Arg("type", string(events.NetworkEventType)))
	for _, a := range actions {
		wanted.Add("event", string(a))
	}
	// The Engine answers before it subscribes us: what happens in between is in since. It keeps the last 256 events.
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

// follow reads events from *since on until the stream ends, and sets *since to when the next should begin.
func (s *stream) follow(ctx context.Context, since *time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	messages, errs, err := s.open(ctx, *since)
	if err != nil {
		return err
	}
	answers := make(chan error, 1)
	asking := true
	go func() { answers <- s.list(ctx, true) }()
	defer func() {
		if asking {
			cancel()
			<-answers
		}
	}()
	for {
		select {
		case m := <-messages:
			s.received.Add(1)
			if t := time.Unix(0, m.TimeNano); m.TimeNano > 0 && t.After(*since) {
				*since = t
			}
			select {
			case s.events <- m:
			case <-ctx.Done():
				return ctx.Err()
			}
		case err := <-errs:
			return fmt.Errorf("event stream: %w", err)
		case err := <-answers:
			asking = false
			if err != nil {
				return fmt.Errorf("list containers: %w", err)
			}
			if !s.connected.Swap(true) {
				s.opened.Add(1)
				s.log.Info("following docker")
			}
		case <-s.relist:
			if !asking {
				asking = true
				go func() { answers <- s.list(ctx, false) }()
			}
		}
	}
}

// list hands over one list of the containers.
func (s *stream) list(ctx context.Context, connected bool) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	containers, err := s.engine.ContainerList(ctx, container.ListOptions{All: true})
	if err != nil {
		return err
	}
	select {
	case s.lists <- listing{containers, connected}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// backoff is how long to wait after so many tries.
func backoff(shortest time.Duration, tries int, longest time.Duration) time.Duration {
	return min(shortest<<min(tries, 16), longest)
}
