package loader

import (
	"context"
	"errors"
	"testing"
	"time"
)

// Of several metads with one pin directory one has the lock; the next has it when that one has
// left.
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

// Only a process that may administer networks can be a metad.
func TestMayNetAdmin(t *testing.T) {
	for status, want := range map[string]bool{
		"Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n": true,
		"Name:\tx\nCapEff:\t0000000000001000\n":                         true,
		"Name:\tx\nCapEff:\t00000000a80425fb\n":                         false, // Docker's default
		"":                                                              true,  // cannot be read: it may be one
	} {
		if got := mayNetAdmin(status); got != want {
			t.Errorf("%q: got %v, want %v", status, got, want)
		}
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
