package loader

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

// fakeAttacher notes what is attached and detached: "+3", "-3", a bridge "+b2".
type fakeAttacher struct {
	log  []string
	fail map[int]error
	now  func(ifindex int) // called while it attaches
}

type fakeProgram struct {
	a    *fakeAttacher
	name string
	err  error
}

func (p *fakeProgram) Close() error {
	p.a.log = append(p.a.log, "-"+p.name)
	return p.err
}

func (a *fakeAttacher) attach(ifindex int, bridge bool) (io.Closer, error) {
	name := fmt.Sprint(ifindex)
	if bridge {
		name = "b" + name
	}
	if a.now != nil {
		a.now(ifindex)
	}
	if err := a.fail[ifindex]; err != nil {
		a.log = append(a.log, "!"+name)
		return nil, err
	}
	a.log = append(a.log, "+"+name)
	return &fakeProgram{a: a, name: name}, nil
}

// took returns what was done since it was last asked.
func (a *fakeAttacher) took() []string {
	log := a.log
	a.log = nil
	return log
}

func newTestPorts(patterns ...string) (*ports, *fakeAttacher, *observer.ObservedLogs) {
	core, logs := observer.New(zapcore.InfoLevel)
	a := &fakeAttacher{fail: map[int]error{}}
	return newPorts(a, patterns, zap.New(core)), a, logs
}

// settle does what the follower does with a device that has changed.
func settle(p *ports, d device) (came []int) {
	for _, ifindex := range p.is(d) {
		if p.settle(ifindex) {
			came = append(came, ifindex)
		}
	}
	return came
}

func replace(p *ports, all []device, others ...int) (gone []int) {
	gone, todo := p.replace(all, others)
	for _, ifindex := range todo {
		p.settle(ifindex)
	}
	return gone
}

func wantLog(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

var (
	br      = device{ifindex: 2, name: "br-1", kind: "bridge"}
	veth3   = device{ifindex: 3, name: "veth3", kind: "veth", master: 2}
	veth4   = device{ifindex: 4, name: "veth4", kind: "veth", master: 2}
	other   = device{ifindex: 5, name: "virbr0", kind: "bridge"}
	veth6   = device{ifindex: 6, name: "veth6", kind: "veth", master: 5}
	tap7    = device{ifindex: 7, name: "tap7", kind: "tun", master: 2}
	devices = []device{br, veth3, other, veth4, veth6, tap7}
)

// Of all devices only watched bridges and their veths get a program, and ports come before bridges:
// a packet that a bridge device sees first has no proof.
func TestPortsOrder(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	replace(p, devices)
	wantLog(t, "at the start", a.took(), "+3", "+4", "+b2")
	replace(p, devices)
	wantLog(t, "a second reading of the same", a.took())
}

// A start attaches to 64 ports and leaves the others for later, one at a time and in order.
func TestPortsPending(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	all := []device{br}
	for i := range portsAtOnce + 3 {
		all = append(all, device{ifindex: 100 + i, name: fmt.Sprint("p", i), kind: "veth",
			master: 2})
	}
	replace(p, all)
	if n := len(a.took()); n != portsAtOnce+1 || p.waiting() != 3 {
		t.Fatalf("got %d attached and %d waiting, want %d and 3", n, p.waiting(),
			portsAtOnce+1)
	}
	p.remove(100 + portsAtOnce + 1) // gone before its turn
	for p.waiting() > 0 {
		if ifindex, ok := p.next(); ok {
			p.settle(ifindex)
		}
	}
	wantLog(t, "later", a.took(), "+164", "+166")
	if _, ok := p.next(); ok {
		t.Error("there is a next one after the last")
	}
}

// A port that leaves its bridge loses its program, and gets it back when it returns.
func TestPortsLeave(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	replace(p, devices)
	a.took()
	away := veth3
	away.master = 0
	settle(p, away)
	wantLog(t, "left", a.took(), "-3")
	away.master = other.ifindex
	settle(p, away)
	wantLog(t, "joined a bridge that is not watched", a.took())
	if came := settle(p, veth3); !slices.Equal(came, []int{3}) {
		t.Errorf("came: got %v, want 3", came)
	}
	wantLog(t, "returned", a.took(), "+3")
}

// A bridge that takes a watched name is hooked with its ports, and let go with them when it loses
// the name.
func TestPortsRenamedBridge(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	replace(p, devices)
	a.took()
	renamed := other
	renamed.name = "br-2"
	if came := settle(p, renamed); !slices.Equal(came, []int{6}) {
		t.Errorf("came: got %v, want the port alone", came)
	}
	wantLog(t, "renamed", a.took(), "+6", "+b5")
	settle(p, other)
	wantLog(t, "renamed back", a.took(), "-6", "-b5")
}

// What a bridge says of itself when one of its many ports comes or goes is no reason to look at all
// of its ports: only at those that could not be attached to.
func TestPortsBridgeSpeaks(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	a.fail[4] = unix.EINVAL
	replace(p, devices)
	spoke := br
	spoke.up = true
	if todo := p.is(spoke); !slices.Equal(todo, []int{4, 2}) {
		t.Errorf("got %v to look at, want the port that failed and the bridge", todo)
	}
}

// A port is hooked while its other end may still leave the host's namespace, and let go once that
// end is up or a port here: it ties two bridges together, and a packet that metad answered into it
// would be lost.
func TestPortsTie(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	tie := device{ifindex: 8, name: "tie8", kind: "veth", master: br.ifindex, peer: 9}
	end := device{ifindex: 9, name: "tie9", kind: "veth", peer: 8}
	replace(p, []device{br, tie, end})
	wantLog(t, "just made", a.took(), "+8", "+b2")
	end.up = true
	settle(p, end)
	wantLog(t, "the other end is up", a.took(), "-8")
	end.up = false
	settle(p, end)
	wantLog(t, "down again", a.took(), "+8")
	end.master = other.ifindex
	settle(p, end)
	wantLog(t, "a port", a.took(), "-8")
	p.remove(9) // to another namespace
	tie.peer = 0
	settle(p, tie)
	wantLog(t, "gone to a container", a.took(), "+8")
}

// Bridges named later are watched with their ports, ports first, and let go when they are not named
// any more.
func TestPortsSetBridges(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	replace(p, devices)
	a.took()
	all := func() {
		<-p.changed
		p.queueAll()
		for p.waiting() > 0 {
			if ifindex, ok := p.next(); ok {
				p.settle(ifindex)
			}
		}
	}
	p.setBridges([]string{"virbr0"})
	p.setBridges([]string{"virbr0"}) // the same: nothing more to do
	all()
	wantLog(t, "named", a.took(), "+6", "+b5")
	if _, is := p.unwatched(6); is {
		t.Error("6 is said to be unwatched")
	}
	p.setBridges(nil)
	all()
	wantLog(t, "no longer", a.took(), "-b5", "-6")
	if name, is := p.unwatched(6); !is || name != "veth6" {
		t.Errorf("6: got %q, %v, want it unwatched", name, is)
	}
	if len(p.changed) != 0 {
		t.Error("told twice of one change")
	}
}

// A device that cannot be attached to is tried again with its next message; the log says so once.
func TestPortsFailure(t *testing.T) {
	p, a, logs := newTestPorts("br-*")
	a.fail[3] = errors.New("no")
	replace(p, devices)
	if all := p.list(); len(all) != 3 || all[1].Ifindex != 3 || all[1].Err == nil {
		t.Errorf("list: got %+v, want 3 with its error", all)
	}
	for range 2 {
		if came := settle(p, veth3); came != nil {
			t.Errorf("came: %v", came)
		}
	}
	var s Status
	p.status(&s)
	if s.NotAttached != 1 || s.AttachErrors != 3 || s.Ports != 1 || s.Bridges != 1 {
		t.Errorf("status: got %+v", s)
	}
	if n := logs.FilterMessage("cannot attach").Len(); n != 1 {
		t.Errorf("told %d times, want once", n)
	}
	delete(a.fail, 3)
	if came := settle(p, veth3); !slices.Equal(came, []int{3}) {
		t.Errorf("came at last: got %v", came)
	}
}

// A device that goes while it is attached to is no error: the kernel's message about it is under
// way.
func TestPortsGoneMeanwhile(t *testing.T) {
	p, a, logs := newTestPorts("br-*")
	a.fail[3] = fmt.Errorf("attach: %w", unix.ENODEV)
	replace(p, devices)
	var s Status
	p.status(&s)
	if n := logs.FilterMessage("cannot attach").Len(); n != 0 || s.AttachErrors != 0 {
		t.Errorf("got %d messages and %d errors, want none", n, s.AttachErrors)
	}
}

// A full reading finds what has gone: devices, hooks taken over from another process, and what
// others know of.
func TestPortsReplaceFindsGone(t *testing.T) {
	p, _, _ := newTestPorts("br-*")
	replace(p, devices)
	p.adopt(&hook{ifindex: 50})
	if gone := replace(p, []device{br, veth4}, 60, 4); !slices.Equal(gone,
		[]int{3, 5, 6, 7, 50, 60}) {
		t.Errorf("gone: got %v", gone)
	}
}

// A removed device's hook is handed out once, and the device is unknown from then on.
func TestPortsRemove(t *testing.T) {
	p, _, _ := newTestPorts("br-*")
	replace(p, devices)
	if h := p.remove(3); h == nil || h.name != "veth3" || h.bridge != 2 {
		t.Errorf("got %+v", h)
	}
	if h := p.remove(3); h != nil || p.has(3) || !p.has(4) {
		t.Errorf("again: got %+v; has 3: %v, has 4: %v", h, p.has(3), p.has(4))
	}
}

// A message that says nothing new leads to nothing.
func TestPortsNothingNew(t *testing.T) {
	p, _, _ := newTestPorts("br-*")
	replace(p, devices)
	if todo := p.is(veth3); todo != nil {
		t.Errorf("got %v to settle", todo)
	}
}

// Attaching takes long: meanwhile every reader is answered.
func TestPortsReadersDoNotWait(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	a.now = func(int) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.list()
			p.has(3)
			p.status(new(Status))
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("a reader waits for the attacher")
		}
	}
	replace(p, devices)
}

// A pattern that matches nothing is told once, and again after it did match.
func TestPortsSilentPatterns(t *testing.T) {
	p, _, logs := newTestPorts("br-*", "docker0")
	told := func(pattern string) int {
		return logs.FilterMessage("bridge pattern matches no bridge yet").
			FilterField(zap.String("pattern", pattern)).Len()
	}
	p.tellSilent()
	p.tellSilent()
	replace(p, devices)
	p.tellSilent()
	p.remove(br.ifindex)
	p.tellSilent()
	if told("br-*") != 2 || told("docker0") != 1 {
		t.Errorf("told %d and %d times, want 2 and 1", told("br-*"), told("docker0"))
	}
	var s Status
	p.status(&s)
	if !slices.Equal(s.WaitingPatterns, []string{"br-*", "docker0"}) {
		t.Errorf("waiting: got %v", s.WaitingPatterns)
	}
}

// Close takes every program off, also after one that cannot be taken off.
func TestPortsClose(t *testing.T) {
	p, a, _ := newTestPorts("br-*")
	replace(p, devices)
	a.took()
	no := errors.New("no")
	for _, h := range p.hooks {
		h.on.(*fakeProgram).err = no
	}
	if err := p.close(); !errors.Is(err, no) {
		t.Errorf("got %v, want %v", err, no)
	}
	got := a.took()
	slices.Sort(got)
	wantLog(t, "closed", got, "-3", "-4", "-b2")
}
