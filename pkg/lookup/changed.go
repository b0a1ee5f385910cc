package lookup

// Changed returns a channel that is closed as soon as v is no longer its task's view, because the
// task has changed or is gone. If v is already out of date, the channel is closed. All callers for
// one view share the channel, and may drop it at any time.
func (t *Table) Changed(v *View) <-chan struct{} {
	t.wmu.Lock()
	defer t.wmu.Unlock()
	if t.snap.Load().byTag(v.Tag) != v {
		return closed
	}
	ch := t.watched[v]
	if ch == nil {
		ch = make(chan struct{})
		t.watched[v] = ch
	}
	return ch
}

// closed is a closed channel.
var closed = func() chan struct{} {
	ch := make(chan struct{})
	close(ch)
	return ch
}()

// tellChanged closes the channels of the views that s does not have. It is called with wmu held,
// after s was published, so that a later call of Changed finds the view out of date.
func (t *Table) tellChanged(s *snapshot) {
	for v, ch := range t.watched {
		if s.byTag(v.Tag) != v {
			close(ch)
			delete(t.watched, v)
		}
	}
}
