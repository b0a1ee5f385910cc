package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"metad/pkg/server"
)

// drainTime bounds the time to answer the requests that were made before the end.
const drainTime = 6 * time.Second

// endpoint answers containers on one listener. It uses one server after the other, because a
// server that was shut down cannot be started again.
//
// The methods are for one goroutine, but for counters.
type endpoint struct {
	ln    net.Listener
	make  func() (*server.Server, error)
	parts *parts
	log   *zap.Logger

	current   atomic.Pointer[server.Server]
	accepting chan struct{} // closed when the current server accepts no more
	drained   chan struct{} // closed when the current server is drained; nil: not asked to
}

// start makes a new server accept. It is called again only after the last server was drained.
func (e *endpoint) start() error {
	srv, err := e.make()
	if err != nil {
		return err
	}
	e.current.Store(srv)
	// The shutdown of the last server left its deadline on the listener.
	if l, ok := e.ln.(interface{ SetDeadline(time.Time) error }); ok {
		if err := l.SetDeadline(time.Time{}); err != nil {
			return err
		}
	}
	done := make(chan struct{})
	e.accepting, e.drained = done, nil
	e.parts.run(func(context.Context) error {
		defer close(done)
		if err := srv.Serve(e.ln); !errors.Is(err, server.ErrStopped) {
			return fmt.Errorf("serve: %w", err)
		}
		return nil
	})
	return nil
}

// drain makes the current server accept no more connections and answer its requests, within
// drainTime. The channel is closed after that.
func (e *endpoint) drain() <-chan struct{} { return e.drainWithin(drainTime) }

// drainWithin is drain within another time.
func (e *endpoint) drainWithin(within time.Duration) <-chan struct{} {
	if e.drained != nil {
		return e.drained
	}
	srv, drained := e.current.Load(), make(chan struct{})
	e.drained = drained
	e.parts.run(func(context.Context) error {
		defer close(drained)
		ctx, cancel := context.WithTimeout(context.Background(), within)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			e.log.Warn("connections closed before their requests were answered",
				zap.Error(err))
		}
		return nil
	})
	return drained
}

// restart makes a new server accept as soon as the drained one accepts no more. It does not wait
// for the last open connection.
func (e *endpoint) restart() error {
	<-e.accepting
	return e.start()
}

// Close ends the current server and closes the listener. Called again, it does nothing.
func (e *endpoint) Close() error {
	if e.current.Load() != nil {
		<-e.drain()
	}
	if err := e.ln.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
