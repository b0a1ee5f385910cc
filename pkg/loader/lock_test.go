package loader

import (
	"context"
	"errors"
	"testing"
	"time"
)

// Of several metads with one pin directory one has the lock; the next has it when that one has left.
func TestLockPinDir(t *testing.T) {
	dir := t.TempDir() + "/metad"
	first, err := LockPinDir(t.Context(), dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockPinDir(t.Context(), dir, 0); !errors.Is(err, ErrLocked) {
		t.Errorf("second: got %v, want ErrLocked", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := LockPinDir(ctx, dir, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped while it waits: got %v, want context.Canceled", err)
	}
	done := make(chan error)
	go func() {
		again, err := LockPinDir(t.Context(), dir, time.Minute)
		if err == nil {
			err = again.Close()
		}
		done <- err
	}()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("after the first has left: %v", err)
	}
}

// A directory that cannot be there is for Open to tell: no error.
func TestLockPinDirMissing(t *testing.T) {
	l, err := LockPinDir(t.Context(), t.TempDir()+"/none/metad", 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
