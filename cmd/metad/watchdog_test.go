package main

import (
	"context"
	"net"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// notifySocket makes this process's service manager.
func notifySocket(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

// told returns the next message to the service manager.
func told(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1024)
	n, err := c.Read(b)
	if err != nil {
		t.Fatalf("service manager: %v", err)
	}
	return string(b[:n])
}

// A watchdog without a service manager does nothing, and one with a service manager wants several
// proofs within its time.
func TestWatchdogOfTheServiceManager(t *testing.T) {
	if w, err := newWatchdog(zap.NewNop(), nil); w != nil || err != nil {
		t.Errorf("without WATCHDOG_USEC: got %v, %v", w, err)
	}
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt((8*time.Second).Microseconds(), 10))
	w, err := newWatchdog(zap.NewNop(), nil)
	if err != nil || w == nil || w.every != 2*time.Second {
		t.Errorf("got %+v, %v, want a probe each 2 s", w, err)
	}
	t.Setenv("WATCHDOG_USEC", "soon")
	if _, err := newWatchdog(zap.NewNop(), nil); err == nil {
		t.Error("bad WATCHDOG_USEC: got no error")
	}
}

// The service manager hears of the proof while requests are answered, and no more when the request
// path hangs although its socket is open. The log has one line for it.
func TestWatchdogProvesTheRequestPath(t *testing.T) {
	manager := notifySocket(t)
	t.Setenv("WATCHDOG_USEC", "200000")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	hang := make(chan bool, 1)
	hang <- false
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			hung := <-hang
			hang <- hung
			if hung {
				defer c.Close() // with the listener: no answer before
				continue
			}
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			c.Close()
		}
	}()
	core, logs := observer.New(zap.InfoLevel)
	probes := make(chan error, 1000)
	w, err := newWatchdog(zap.New(core), func(ctx context.Context) error {
		err := dialAndAsk(ctx, ln)
		probes <- err
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.run(ctx) }()
	for range 3 {
		if got := told(t, manager); got != "WATCHDOG=1" {
			t.Fatalf("got %q, want WATCHDOG=1", got)
		}
	}
	<-hang
	hang <- true
	// On a busy machine a probe may fail before the hang, too.
	good, changes := 0, 0
	for failed := 0; failed < 3; {
		switch err := <-probes; {
		case err == nil && failed > 0:
			good, failed, changes = good+1, 0, changes+1
		case err == nil:
			good++
		case failed == 0:
			failed, changes = 1, changes+1
		default:
			failed++
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := logs.Len(); n != changes {
		t.Errorf("got %d lines, want one for each of %d changes: %v", n, changes,
			logs.All())
	}
	// Proofs of the time before the hang may still be unread, but there are no more than good
	// probes.
	proofs := 3
	for manager.SetReadDeadline(time.Now().Add(time.Millisecond)) == nil {
		if _, err := manager.Read(make([]byte, 64)); err != nil {
			break
		}
		proofs++
	}
	if proofs != good {
		t.Errorf("got %d proofs of %d good probes", proofs, good)
	}
}

// dialAndAsk is the probe without its namespace, which takes root.
func dialAndAsk(ctx context.Context, ln net.Listener) error {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
	if err != nil {
		return err
	}
	return askOnce(ctx, c)
}
