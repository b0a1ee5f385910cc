package lookup

// Changed returns a channel that is closed as soon as v is no longer its task's view, because the
// task has changed or is no more: at once if it is not now. The channel is shared by all that ask
// for the same view, and need not be waited for.
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

// closed is what has happened already.
var closed = func() chan struct{} {
	ch := make(chan struct{})
	close(ch)
	return ch
}()

// tellChanged closes the channels of the views that s does not have. It is called with wmu held,
// after s was published: who asks later finds that the view is no more.
func (t *Table) tellChanged(s *snapshot) {
	for v, ch := range t.watched {
		if s.byTag(v.Tag) != v {
			close(ch)
			delete(t.watched, v)
		}
	}
}
