package stats

import "metad/pkg/task"

// EachKept calls f with the newest counters of each container that has a sample, in no particular
// order. It needs Config.Keep. f may not keep the counters, and holds up the sampling meanwhile.
func (s *Sampler) EachKept(f func(*task.Task, *task.Container, *Counters)) {
	s.mu.Lock()
	order := s.order
	s.mu.Unlock()
	for _, e := range order {
		s.oneKept(e, f)
	}
}

func (s *Sampler) oneKept(e *entry, f func(*task.Task, *task.Container, *Counters)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !e.ended && e.kept != nil && e.cell.Load() != nil {
		f(e.task, e.c, e.kept)
	}
}

// keep makes a copy of c, in the memory of the last one, e's newest counters.
func (e *entry) keep(c *Counters) {
	if e.kept == nil {
		e.kept = new(Counters)
	}
	k := e.kept
	perCPU, stats, networks, blkio := k.CPU.PerCPU, k.Memory.Stats, k.Networks, k.Blkio
	*k = *c
	k.CPU.PerCPU = append(perCPU[:0], c.CPU.PerCPU...)
	k.Memory.Stats = append(stats[:0], c.Memory.Stats...)
	k.Networks = append(networks[:0], c.Networks...)
	mine, theirs := k.Blkio.lists(), c.Blkio.lists()
	for i, old := range blkio.lists() {
		*mine[i] = append((*old)[:0], *theirs[i]...)
	}
}
