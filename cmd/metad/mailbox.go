package main

import "context"

// mailbox holds the latest value for one reader. The sender never waits for the reader: a value
// that was not read yet is replaced. One sender at a time.
type mailbox[T any] struct{ latest chan T } // of one

func newMailbox[T any]() mailbox[T] { return mailbox[T]{make(chan T, 1)} }

// put makes v the latest value.
func (m mailbox[T]) put(v T) {
	select {
	case <-m.latest: // replaced before it was read
	default:
	}
	m.latest <- v // there is room: no other sender
}

// each calls f with the latest value whenever there is a new one, until ctx ends.
func (m mailbox[T]) each(ctx context.Context, f func(T)) {
	for {
		select {
		case <-ctx.Done():
			return
		case v := <-m.latest:
			f(v)
		}
	}
}
