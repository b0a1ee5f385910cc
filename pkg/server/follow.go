package server

import (
	"bytes"
	"time"

	"metad/pkg/lookup"
	"metad/pkg/task"
)

// followDocument writes the document that r names, and again after each change, until its task or
// container no longer exists.
func (s *Server) followDocument(l *lines, r *question) {
	var last, doc []byte
	for {
		doc = r.document().AppendTo(doc[:0])
		if !bytes.Equal(doc, last) { // the change may not be in this document
			if !l.write(doc) {
				return
			}
			last, doc = doc, last
		}
		if !s.awaitChange(l, r) {
			return
		}
	}
}

// awaitChange waits until r's task has changed, and finds the objects of r again. It returns false
// when they no longer exist, or the stream has ended.
func (s *Server) awaitChange(l *lines, r *question) bool {
	changed := s.tasks.Changed(r.view)
	select {
	case <-changed:
	case <-l.stopped:
		return false
	case <-l.gone:
		l.failed = true
		return false
	}
	return s.locate(l.c, r) == nil
}

// document returns the document that a request for metadata names.
func (r *question) document() task.Document {
	if r.target.forms&ofContainer != 0 {
		return r.container.Document(r.target.version)
	}
	return r.view.Document(r.target.version)
}

// followContainerStats writes each new sample of a container until the container stops.
func (s *Server) followContainerStats(l *lines, r *question) {
	samples, cancel := s.cfg.Samples.Subscribe(r.container.ID)
	defer cancel()
	var line bytes.Buffer
	for {
		sample, ok := next(l, samples)
		if !ok {
			return
		}
		line.Reset()
		writeSample(&line, r.target.version, sample)
		if !l.write(line.Bytes()) {
			return
		}
	}
}

// together is how long after a new sample of a task followTaskStats waits for others, to write one
// line for all: the sampler takes a task's samples one after the other.
const together = 20 * time.Millisecond

// followTaskStats writes the task's statistics whenever one of its containers has a new sample,
// until the task no longer exists.
func (s *Server) followTaskStats(l *lines, r *question) {
	subs := subscriptions{samples: s.cfg.Samples, news: make(chan struct{}, 1),
		cancels: map[string]func(){}}
	defer subs.close()
	var line bytes.Buffer
	for {
		subs.follow(r.view)
		select {
		case <-subs.news:
			if _, ok := next(l, time.After(together)); !ok {
				return
			}
			select { // this line includes the samples that came meanwhile
			case <-subs.news:
			default:
			}
			line.Reset()
			line.WriteString("{")
			s.writeStats(&line, r.target.version, r.view, false, time.Now().UnixNano())
			line.WriteString("}")
			if !l.write(line.Bytes()) {
				return
			}
		case <-s.tasks.Changed(r.view):
			if s.locate(l.c, r) != nil {
				return
			}
		case <-l.stopped:
			return
		case <-l.gone:
			l.failed = true
			return
		}
	}
}

// subscriptions follow the samples of a task's containers. It is for one goroutine.
type subscriptions struct {
	samples Samples
	news    chan struct{}     // holds one value if there was a new sample since the last read
	cancels map[string]func() // by Docker id
}

// follow subscribes to v's running containers that are not followed yet, and to no others.
func (s *subscriptions) follow(v *lookup.View) {
	for i := range v.Containers {
		c := &v.Containers[i]
		if s.cancels[c.ID] != nil || c.ID == "" || !c.Running() {
			continue
		}
		samples, cancel := s.samples.Subscribe(c.ID)
		done := make(chan struct{})
		s.cancels[c.ID] = func() {
			close(done)
			cancel()
		}
		go s.relay(samples, done)
	}
	for id, cancel := range s.cancels {
		if c := v.Container([]byte(id)); c == nil || !c.Running() {
			cancel()
			delete(s.cancels, id)
		}
	}
}

// relay sends to news for each sample of a container, until there are no more or done is closed.
func (s *subscriptions) relay(samples <-chan *task.Sample, done <-chan struct{}) {
	for {
		select {
		case _, ok := <-samples:
			if !ok {
				return
			}
		case <-done:
			return
		}
		select {
		case s.news <- struct{}{}:
		default:
		}
	}
}

func (s *subscriptions) close() {
	for _, cancel := range s.cancels {
		cancel()
	}
}
