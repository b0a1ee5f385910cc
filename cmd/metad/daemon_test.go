package main

import (
	"testing"
	"time"

	"go.uber.org/zap"

	"net/netip"

	"metad/bpf"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// kernelMap is a kernel's map that holds what it is given.
type kernelMap map[netip.Addr]bpf.MetadTaskValue

func (m kernelMap) Put(a netip.Addr, v *bpf.MetadTaskValue) error { m[a] = *v; return nil }
func (m kernelMap) Delete(a netip.Addr) error                     { delete(m, a); return nil }
func (m kernelMap) Entries() (map[netip.Addr]bpf.MetadTaskValue, error) {
	return map[netip.Addr]bpf.MetadTaskValue(m), nil
}

// Samples of an earlier process live on in the containers that still run, and in no container that was
// started again.
func TestCarryOver(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	sample := &task.Sample{JSON: []byte(`{}`), V2: 1}
	made := func(started ...time.Time) *task.Task {
		tk := &task.Task{ARN: "arn"}
		for i, s := range started {
			tk.Containers = append(tk.Containers, &task.Container{ID: string(rune('a' + i)), StartedAt: s, PID: 1, Stats: &task.StatsCell{}})
		}
		return tk
	}
	d := &daemon{table: lookup.New(kernelMap{}, zap.NewNop())}
	before := made(at, at)
	for _, c := range before.Containers {
		c.Stats.Store(sample)
	}
	if err := d.table.Apply([]*task.Task{before}); err != nil {
		t.Fatal(err)
	}
	now := made(at, at.Add(time.Second), at)
	d.current = []*task.Task{now}
	d.carryOver()
	for i, want := range []*task.Sample{sample, nil, nil} {
		if got := now.Containers[i].Stats.Load(); got != want {
			t.Errorf("container %d: got %v, want %v", i, got, want)
		}
	}
	now.Containers[0].Stats.Store(nil) // it has stopped
	d.carryOver()
	if got := now.Containers[0].Stats.Load(); got != nil {
		t.Error("carried over a second time")
	}
}

// A start that fails does not wait for ever for a port that went meanwhile.
func TestPortGoneDuringFailedStart(t *testing.T) {
	d := &daemon{wired: make(chan struct{}), ended: make(chan struct{})}
	returned := make(chan struct{})
	go func() {
		d.portGone(7)
		close(returned)
	}()
	close(d.ended)
	select {
	case <-returned:
	case <-time.After(10 * time.Second):
		t.Fatal("portGone still waits for parts that never came to be")
	}
}
