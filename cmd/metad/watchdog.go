package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// watchdog reports to the service manager, after each successful probe, that containers get
// answers. A metad that hangs while its sockets are open is worse than none, because its clients
// wait. The service manager restarts it if a report is missing for too long.
type watchdog struct {
	log   *zap.Logger
	every time.Duration
	probe func(context.Context) error
	proof func() // that the request path works
}

// newWatchdog returns the watchdog, or nil if the service manager requests none.
func newWatchdog(log *zap.Logger, probe func(context.Context) error) (*watchdog, error) {
	within, err := sd.SdWatchdogEnabled(false)
	if err != nil {
		return nil, fmt.Errorf("watchdog: %w", err)
	}
	if within == 0 {
		return nil, nil
	}
	// Three probes in each interval, of which two may fail on a busy host.
	return &watchdog{log: log, every: within / 4, probe: probe,
		proof: func() { notify(log, sd.SdNotifyWatchdog) }}, nil
}

// run probes until ctx ends. A probe may not take longer than the time to the next one.
func (w *watchdog) run(ctx context.Context) error {
	tick := time.NewTicker(w.every)
	defer tick.Stop()
	failed := false
	for {
		within, cancel := context.WithTimeout(ctx, w.every)
		err := w.probe(within)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			w.proof()
		case !failed:
			w.log.Error("the endpoint does not answer the watchdog", zap.Error(err))
		}
		if err == nil && failed {
			w.log.Info("the endpoint answers the watchdog again")
		}
		failed = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// probeEndpoint requests metadata as a container does: at the listener's address, in the
// listener's namespace. Any answer is a proof: the probe is a caller without a task, and its
// request takes the same path as the others.
func probeEndpoint(ln net.Listener) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := dialInside(ctx, ln)
		if err != nil {
			return err
		}
		return askOnce(ctx, c)
	}
}

// askOnce makes one request on c, closes it, and returns nil if there was an answer.
func askOnce(ctx context.Context, c net.Conn) error {
	defer c.Close()
	if end, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(end); err != nil {
			return err
		}
	}
	const request = "GET /v2/metadata HTTP/1.1\r\nHost: metad\r\nConnection: close\r\n\r\n"
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	if line, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		return fmt.Errorf("answer %q: %w", line, err)
	}
	return nil
}

// dialInside connects to ln from within its network namespace.
func dialInside(ctx context.Context, ln net.Listener) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result, 1)
	go func() {
		// The thread stays in the namespace and so ends with this goroutine.
		runtime.LockOSThread()
		err := enterNamespaceOf(ln)
		var c net.Conn
		if err == nil {
			c, err = new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
		}
		done <- result{c, err}
	}()
	r := <-done
	return r.c, r.err
}

// enterNamespaceOf moves the calling thread to the network namespace of ln's socket.
func enterNamespaceOf(ln net.Listener) error {
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return errors.New("the listener has no socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var ns int
	var nsErr error
	if err := raw.Control(func(fd uintptr) {
		ns, nsErr = unix.IoctlRetInt(int(fd),
			unix.SIOCGSKNS)
	}); err != nil {
		return err
	}
	if nsErr != nil {
		return fmt.Errorf("namespace of the listener: %w", nsErr)
	}
	defer unix.Close(ns)
	if err := netns.Set(netns.NsHandle(ns)); err != nil {
		return fmt.Errorf("enter the listener's namespace: %w", err)
	}
	return nil
}
