package loader

import (
	"cmp"
	"errors"
	"io"
	"maps"
	"path"
	"slices"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// device is a network device of the host's namespace.
type device struct {
	ifindex int
	name    string
	kind    string // "veth", "bridge", …
	master  int    // ifindex of the bridge it is a port of; 0: none
	// ifindex of a veth's other end, if that is in the host's namespace too; 0: it is not
	peer int
	up   bool
}

// attacher puts the program of a bridge or of a port on a device. Closing the result removes the
// program.
type attacher interface {
	attach(ifindex int, bridge bool) (io.Closer, error)
}

// hook is a device that has one of metad's programs, or should have one.
type hook struct {
	ifindex int
	name    string
	bridge  int       // ifindex of the port's bridge; 0: it is the bridge device itself
	on      io.Closer // the program on the device; nil: not attached
	err     error     // why it is not attached
}

// portsAtOnce is how many ports a start waits for, because a TCX link takes an RCU grace period
// (see maxLinks). Until a port has its program, its packets are seen at its bridge.
const portsAtOnce = 64

// ports knows the host's devices and which of them have a program. One goroutine writes (the
// follower's, or the one that starts it); attaching takes long and is done without the lock. Any
// goroutine may read.
type ports struct {
	attacher attacher
	patterns []string // of the watched bridges' names
	log      *zap.Logger
	changed  chan struct{} // tells the writer that bridges have changed

	mu      sync.Mutex      // guards what follows
	devices map[int]device  // every device in the host, as last heard
	hooks   map[int]*hook   // by ifindex
	bridges map[string]bool // watched beside those that match a pattern
	pending []int           // devices to settle when there is time
	silent  map[string]bool // patterns that the log says match nothing
	resyncs uint64          // calls of replace
	errs    uint64          // attachments that failed
}

func newPorts(a attacher, patterns []string, log *zap.Logger) *ports {
	return &ports{
		attacher: a, patterns: patterns, log: log, changed: make(chan struct{}, 1),
		devices: map[int]device{}, hooks: map[int]*hook{}, silent: map[string]bool{},
	}
}

// has reports whether the host has the device.
func (p *ports) has(ifindex int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.devices[ifindex]
	return ok
}

// adopt adds a hook that another process made.
func (p *ports) adopt(h *hook) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hooks[h.ifindex] = h
}

// replace stores all devices of the host, after a full reading. It returns those that are gone, of
// the known devices and of others, and those to settle now, in order. The rest is pending.
func (p *ports) replace(all []device, others []int) (gone, todo []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resyncs++
	exists := map[int]bool{}
	for _, d := range all {
		exists[d.ifindex] = true
	}
	for ifindex := range p.devices {
		others = append(others, ifindex)
	}
	for ifindex := range p.hooks {
		others = append(others, ifindex)
	}
	slices.Sort(others)
	for _, ifindex := range slices.Compact(others) {
		if !exists[ifindex] {
			gone = append(gone, ifindex)
		}
	}
	for _, d := range all {
		p.devices[d.ifindex] = d
	}
	// Ports before bridges: a packet that the bridge device sees first has no proof.
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b device) int {
		return boolToInt(a.kind == "bridge") - boolToInt(b.kind == "bridge")
	})
	p.pending = nil
	n := 0
	for _, d := range all {
		if want, bridge := p.wants(d.ifindex); want && bridge != 0 &&
			p.hooks[d.ifindex] == nil {
			if n++; n > portsAtOnce {
				p.pending = append(p.pending, d.ifindex)
				continue
			}
		}
		todo = append(todo, d.ifindex)
	}
	if n := len(p.pending); n > 0 {
		p.log.Info("more ports are attached one after the other", zap.Int("ports", n))
	}
	return gone, todo
}

func boolToInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// is stores the new state of a device, and returns the devices that have to be settled after it.
func (p *ports) is(d device) (todo []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.devices[d.ifindex]
	h := p.hooks[d.ifindex]
	if was == d && (h == nil || h.err == nil) {
		return nil
	}
	p.devices[d.ifindex] = d
	if was.kind == "bridge" || d.kind == "bridge" {
		// new or renamed: its ports follow it
		follows := was.kind != d.kind || was.name != d.name
		for _, port := range p.devices {
			h := p.hooks[port.ifindex]
			if port.master == d.ifindex && (follows || h != nil && h.err != nil) {
				todo = append(todo, port.ifindex)
			}
		}
		slices.Sort(todo)
	}
	// whether a peer leads out of the host depends on this end
	for _, peer := range []int{was.peer, d.peer} {
		if peer != 0 && p.devices[peer].peer == d.ifindex {
			todo = append(todo, peer)
		}
	}
	return append(todo, d.ifindex)
}

// setBridges replaces the names of the bridges that are watched in addition to the patterns.
func (p *ports) setBridges(names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := map[string]bool{}
	for _, name := range names {
		next[name] = true
	}
	if maps.Equal(p.bridges, next) {
		return
	}
	p.bridges = next
	select {
	case p.changed <- struct{}{}:
	default: // told already
	}
}

// queueAll makes all devices pending that need a program or have one too many. Bridges are
// detached before their ports, and attached after them.
func (p *ports) queueAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first, last []int
	for _, ifindex := range slices.Sorted(maps.Keys(p.devices)) {
		want, _ := p.wants(ifindex)
		switch bridge := p.devices[ifindex].kind == "bridge"; {
		case want == (p.hooks[ifindex] != nil), slices.Contains(p.pending, ifindex):
		case bridge && want:
			last = append(last, ifindex)
		case bridge:
			first = append(first, ifindex)
		default:
			p.pending = append(p.pending, ifindex)
		}
	}
	p.pending = slices.Concat(first, p.pending, last)
}

// remove removes a device that is gone, and returns its hook.
func (p *ports) remove(ifindex int) *hook {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.hooks[ifindex]
	delete(p.devices, ifindex)
	delete(p.hooks, ifindex)
	return h
}

// wants reports whether the device should have a program. If the device is a port, it also returns
// the ifindex of its bridge. It is called with mu held.
func (p *ports) wants(ifindex int) (want bool, bridge int) {
	d := p.devices[ifindex]
	switch {
	case d.kind == "bridge":
		return p.watches(d.name), 0
	// An answer needs a peer; packets of other ports are seen at the bridge.
	case d.kind == "veth" && d.master != 0:
		m := p.devices[d.master]
		return m.kind == "bridge" && p.watches(m.name) && p.leadsOut(d), d.master
	}
	return false, 0
}

// leadsOut reports whether a veth's other end is in another namespace, or may be on its way there:
// container engines make both ends in the host's namespace. An end that is up or is a port stays
// in the host's namespace: for example, it ties two bridges together, and a packet that metad
// redirects to it would be lost. It is called with mu held.
func (p *ports) leadsOut(d device) bool {
	peer := p.devices[d.peer]
	return d.peer == 0 || !peer.up && peer.master == 0
}

// unwatched reports whether a device exists and should not have a program. It returns its name.
func (p *ports) unwatched(ifindex int) (name string, is bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, known := p.devices[ifindex]
	want, _ := p.wants(ifindex)
	return d.name, known && !want
}

// watches is called with mu held.
func (p *ports) watches(bridge string) bool {
	return p.bridges[bridge] || slices.ContainsFunc(p.patterns, func(pattern string) bool {
		return matches(pattern, bridge)
	})
}

func matches(pattern, bridge string) bool {
	ok, _ := path.Match(pattern, bridge) // the configuration was checked
	return ok
}

// settle attaches the device's program or removes it, and reports whether a port got one. Only the
// writer calls it.
func (p *ports) settle(ifindex int) (came bool) {
	old, next := p.plan(ifindex)
	switch {
	case old != nil:
		var err error
		if old.on != nil {
			err = old.on.Close()
		}
		p.forget(old, err)
	case next != nil:
		next.on, next.err = p.attacher.attach(ifindex, next.bridge == 0)
		return p.record(next)
	}
	return false
}

// plan returns the hook to undo, or the one to make.
func (p *ports) plan(ifindex int) (old, next *hook) {
	p.mu.Lock()
	defer p.mu.Unlock()
	want, bridge := p.wants(ifindex)
	h := p.hooks[ifindex]
	switch d := p.devices[ifindex]; {
	case !want && h == nil:
		return nil, nil
	case !want:
		return h, nil
	case h != nil && h.err == nil:
		h.name, h.bridge = d.name, bridge
		return nil, nil
	default:
		return nil, &hook{ifindex: ifindex, name: d.name, bridge: bridge}
	}
}

// forget stores that a hook has been removed, or could not be.
func (p *ports) forget(h *hook, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.hooks, h.ifindex)
	at := []zap.Field{zap.String("device", h.name), zap.Int("ifindex", h.ifindex)}
	if err != nil {
		p.log.Warn("cannot detach", append(at, zap.Error(err))...)
	} else {
		p.log.Info("detached", at...)
	}
	p.lookForSilent()
}

// record stores the result of an attachment, and reports whether a port got its program.
func (p *ports) record(h *hook) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	failedBefore := p.hooks[h.ifindex] != nil
	p.hooks[h.ifindex] = h
	at := []zap.Field{zap.String("device", h.name), zap.Int("ifindex", h.ifindex)}
	switch {
	case h.err == nil:
		p.log.Info("attached", append(at, zap.Bool("port", h.bridge != 0))...)
		return h.bridge != 0
	case errors.Is(h.err, unix.ENODEV): // gone already: the message about it is under way
		return false
	}
	p.errs++
	if !failedBefore {
		p.log.Error("cannot attach", append(at, zap.Error(h.err))...)
	}
	return false
}

// waiting returns how many ports are pending after a start.
func (p *ports) waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pending)
}

// next returns the next pending port, and removes it from the queue.
func (p *ports) next() (ifindex int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.pending) == 0 {
		return 0, false
	}
	ifindex, p.pending = p.pending[0], p.pending[1:]
	_, ok = p.devices[ifindex]
	return ifindex, ok
}

// tellSilent logs each pattern that matches nothing: once, and again if it has matched meanwhile.
func (p *ports) tellSilent() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lookForSilent()
}

// lookForSilent is tellSilent with mu held.
func (p *ports) lookForSilent() {
	for _, pattern := range p.patterns {
		found := false
		for _, h := range p.hooks {
			found = found || h.bridge == 0 && matches(pattern, h.name)
		}
		if !found && !p.silent[pattern] {
			p.log.Info("bridge pattern matches no bridge yet",
				zap.String("pattern", pattern))
		}
		p.silent[pattern] = !found
	}
}

// Port is a device with a hook.
type Port struct {
	Name    string
	Ifindex int
	Bridge  int   // ifindex of the bridge it is a port of; 0: it is the bridge device itself
	Err     error // why it is not attached, else nil
}

// list returns the hooks by ifindex.
func (p *ports) list() []Port {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Port, 0, len(p.hooks))
	for _, h := range p.hooks {
		all = append(all, Port{h.name, h.ifindex, h.bridge, h.err})
	}
	slices.SortFunc(all, func(a, b Port) int { return cmp.Compare(a.Ifindex, b.Ifindex) })
	return all
}

// all returns copies of the hooks, in no order.
func (p *ports) all() []hook {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []hook
	for _, h := range p.hooks {
		all = append(all, *h)
	}
	return all
}

// status sets the fields of s that ports knows.
func (p *ports) status(s *Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Pending, s.Resyncs, s.AttachErrors = len(p.pending), p.resyncs, p.errs
	for _, h := range p.hooks {
		switch {
		case h.err != nil:
			s.NotAttached++
		case h.bridge == 0:
			s.Bridges++
		default:
			s.Ports++
		}
	}
	for pattern, silent := range p.silent {
		if silent {
			s.WaitingPatterns = append(s.WaitingPatterns, pattern)
		}
	}
	slices.Sort(s.WaitingPatterns)
}

// close takes the programs off all devices.
func (p *ports) close() error {
	var errs []error
	for _, h := range p.all() {
		if h.on != nil {
			errs = append(errs, h.on.Close())
		}
	}
	return errors.Join(errs...)
}
