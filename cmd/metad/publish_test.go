package main

import (
	"context"
	"fmt"
	"testing"
	"time"

	"go.uber.org/zap"

	"net/netip"

	"metad/bpf"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// kernelMap is a kernel's map that holds what it is given.
type kernelMap map[netip.Addr]bpf.TaskValue

func (m kernelMap) Put(a netip.Addr, v *bpf.TaskValue) error { m[a] = *v; return nil }
func (m kernelMap) Delete(a netip.Addr) error                { delete(m, a); return nil }
func (m kernelMap) Entries() (map[netip.Addr]bpf.TaskValue, error) {
	return map[netip.Addr]bpf.TaskValue(m), nil
}

// Samples of an earlier process live on in the containers that still run, and in no container that
// was started again.
func TestCarryOver(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	sample := &task.Sample{JSON: []byte(`{}`), V2: 1}
	made := func(started ...time.Time) *task.Task {
		tk := &task.Task{ARN: "arn"}
		for i, s := range started {
			tk.Containers = append(tk.Containers,
				&task.Container{ID: string(rune('a' + i)), StartedAt: s, PID: 1,
					Stats: &task.StatsCell{}})
		}
		return tk
	}
	p := &publisher{log: zap.NewNop(), table: lookup.New(kernelMap{}, zap.NewNop())}
	before := made(at, at)
	for _, c := range before.Containers {
		c.Stats.Store(sample)
	}
	if err := p.table.Apply([]*task.Task{before}); err != nil {
		t.Fatal(err)
	}
	p.remember()
	p.to(filling)
	now := made(at, at.Add(time.Second), at)
	p.apply([]*task.Task{now})
	for i, want := range []*task.Sample{sample, nil, nil} {
		if got := now.Containers[i].Stats.Load(); got != want {
			t.Errorf("container %d: got %v, want %v", i, got, want)
		}
	}
	now.Containers[0].Stats.Store(nil) // it has stopped
	p.apply([]*task.Task{now})
	if got := now.Containers[0].Stats.Load(); got != nil {
		t.Error("carried over a second time")
	}
}

// A start that fails does not wait for ever for a port that went meanwhile.
func TestPortGoneDuringFailedStart(t *testing.T) {
	p := newPorts(zap.NewNop())
	returned := make(chan struct{})
	go func() {
		p.gone(7)
		close(returned)
	}()
	p.close()
	select {
	case <-returned:
	case <-time.After(10 * time.Second):
		t.Fatal("gone still waits for parts that never came to be")
	}
}

// A consumer that is stuck, as one whose disk is frozen, keeps no task from its identity, and no
// successor from taking over.
func TestStuckConsumerHoldsUpNothing(t *testing.T) {
	kernel := kernelMap{}
	p := &publisher{log: zap.NewNop(), table: lookup.New(kernel, zap.NewNop())}
	sets := p.mailbox()
	frozen, reached := make(chan struct{}), make(chan int, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		sets.each(ctx, func(tasks []*task.Task) {
			reached <- len(tasks)
			<-frozen
		})
	}()
	p.to(filling)
	var tasks []*task.Task
	for i := range 10 {
		addr := netip.AddrFrom4([4]byte{172, 17, 0, byte(i + 2)})
		tasks = append(tasks, &task.Task{ARN: fmt.Sprint("arn", i),
			Endpoints: []task.Endpoint{{Addr: addr, Ifindex: 10 + i}}})
		p.apply(tasks[:len(tasks):len(tasks)])
		if len(kernel) != i+1 {
			t.Fatalf("after task %d: the kernel's map has %d addresses", i, len(kernel))
		}
		if i == 0 {
			<-reached // and stuck from now on
		}
	}
	if err := p.serve(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := p.offer(); err != nil {
		t.Errorf("takeover: %v", err)
	}
	p.to(stopping)
	close(frozen)
	if n := <-reached; n != len(tasks) {
		t.Errorf("the consumer goes on with a set of %d, want the latest, of %d", n,
			len(tasks))
	}
	cancel()
	<-done
}

// Nothing is published while another metad may write to the kernel's map.
func TestStatesThatPublish(t *testing.T) {
	f := func(s state, want bool) {
		t.Helper()
		kernel := kernelMap{}
		p := &publisher{log: zap.NewNop(), table: lookup.New(kernel, zap.NewNop()),
			state: s}
		p.apply([]*task.Task{{ARN: "arn",
			Endpoints: []task.Endpoint{{Addr: netip.MustParseAddr("172.17.0.2"),
				Ifindex: 9}}}})
		if got := len(kernel) == 1; got != want {
			t.Errorf("state %d: published %v, want %v", s, got, want)
		}
		p.to(filling)
		if len(kernel) != 1 {
			t.Errorf("state %d: not published when it has ended", s)
		}
	}
	f(starting, false)
	f(filling, true)
	f(serving, true)
	f(offering, false)
	f(replaced, false)
	f(stopping, true)
}

// A metad that has packets come to nobody yet has nothing to take over, and goes on.
func TestNoOfferBeforeServing(t *testing.T) {
	p := &publisher{log: zap.NewNop(), table: lookup.New(kernelMap{}, zap.NewNop())}
	p.to(filling)
	if err := p.offer(); err == nil {
		t.Error("offer while filling: got no error")
	}
	if err := p.resume(func() error {
		t.Error("there was no takeover to go on after")
		return nil
	}); err != nil {
		t.Error(err)
	}
	armed := 0
	arm := func() error { armed++; return nil }
	if err := p.serve(arm); err != nil || armed != 1 {
		t.Errorf("serve: got %v, armed %d times", err, armed)
	}
	p.to(stopping)
	if err := p.serve(arm); err != nil || armed != 1 {
		t.Errorf("serve while stopping: got %v, armed %d times, want once", err, armed)
	}
}
