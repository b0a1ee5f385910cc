package main

import (
	"context"
	"testing"
)

// The latest value wins, and the sender does not wait for a reader that is stuck.
func TestMailboxKeepsTheLatest(t *testing.T) {
	m := newMailbox[int]()
	read, stuck := make(chan int), make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.each(ctx, func(v int) {
			read <- v
			<-stuck
		})
	}()
	m.put(1)
	if got := <-read; got != 1 {
		t.Errorf("first: got %d, want 1", got)
	}
	for v := 2; v <= 100; v++ {
		m.put(v) // the reader is stuck: this test would hang here
	}
	close(stuck)
	if got := <-read; got != 100 {
		t.Errorf("after the reader was stuck: got %d, want the latest, 100", got)
	}
	cancel()
	<-done
}
