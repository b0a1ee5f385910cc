package loader

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// netLink is what matters of a network device.
type netLink struct {
	name   string
	kind   string // "veth", "bridge", …
	master int    // ifindex of the bridge it is a port of, or 0
}

// hook is a device that has one of our programs, or should.
type hook struct {
	ifindex int
	name    string
	bridge  int     // ifindex of the port's bridge; 0: it is the bridge device itself
	link    *fdLink // nil with clsact
	err     error   // why it is not attached
}

// follower listens to what the kernel says about devices.
type follower struct {
	done chan struct{}
	wg   sync.WaitGroup
}

func (f *follower) stop() {
	close(f.done)
	f.wg.Wait()
}

// follow hooks what is there and starts following changes.
func (l *Loader) follow() error {
	entries, err := l.Entries()
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.byPort = map[uint32]map[netip.Addr]bool{}
	for addr, v := range entries {
		l.remember(addr, v.Ifindex)
	}
	l.links = map[int]netLink{}
	if l.hooks == nil { // else: adopted, or resumed
		l.hooks = map[int]*hook{}
	}
	l.silent = map[string]bool{}
	l.mu.Unlock()
	updates, unsubscribe, err := l.subscribe()
	if err != nil {
		return err
	}
	if err := l.resync(); err != nil {
		unsubscribe()
		return err
	}
	f := &follower{done: make(chan struct{})}
	l.follower = f
	f.wg.Go(func() {
		for {
			l.process(updates, f.done)
			unsubscribe()
			for {
				select {
				case <-f.done:
					return
				default:
				}
				// The kernel had more to say than the socket holds, or the socket broke: start over.
				updates, unsubscribe, err = l.subscribe()
				if err == nil {
					if err = l.resync(); err == nil {
						break
					}
					unsubscribe()
				}
				l.log.Error("cannot follow network devices, trying again", zap.Error(err))
				if !wait(f.done) {
					return
				}
			}
		}
	})
	return nil
}

// subscribe returns a channel that is closed when the subscription breaks.
func (l *Loader) subscribe() (<-chan netlink.LinkUpdate, func(), error) {
	ch := make(chan netlink.LinkUpdate, 64)
	done := make(chan struct{})
	err := netlink.LinkSubscribeWithOptions(ch, done, netlink.LinkSubscribeOptions{
		Namespace: &l.host,
		ErrorCallback: func(err error) {
			select {
			case <-done: // closed by us
			default:
				l.log.Info("following network devices", zap.Error(err))
			}
		},
		ReceiveBufferSize: 1 << 20, // a thousand ports at once
	})
	if err != nil {
		close(done)
		return nil, nil, fmt.Errorf("follow network devices: %w", err)
	}
	var once sync.Once
	return ch, func() {
		once.Do(func() {
			close(done)
			go func() { // the subscription may be blocked on sending
				for range ch {
				}
			}()
		})
	}, nil
}

// process handles updates until the channel or done is closed, and between them hooks what resync left.
func (l *Loader) process(updates <-chan netlink.LinkUpdate, done <-chan struct{}) {
	now := make(chan struct{})
	close(now)
	for {
		var more <-chan struct{}
		if len(l.pending) > 0 { // written by this goroutine only
			more = now
		}
		select {
		case <-done:
			return
		case <-more:
			l.mu.Lock()
			ifindex := l.pending[0]
			l.pending = l.pending[1:]
			if _, ok := l.links[ifindex]; ok {
				l.rehook(ifindex)
			}
			if len(l.pending) == 0 {
				l.log.Info("all ports are attached")
			}
			l.mu.Unlock()
		case u, ok := <-updates:
			if !ok {
				return
			}
			// A bridge speaks of its ports in messages of its own family: there, DELLINK means that the
			// port left. The device's own message tells that too.
			if u.IfInfomsg.Family != unix.AF_UNSPEC {
				continue
			}
			l.mu.Lock()
			switch u.Header.Type {
			case unix.RTM_NEWLINK:
				l.linkIs(u.Link)
			case unix.RTM_DELLINK:
				l.linkGone(u.Attrs().Index)
			}
			l.tellSilent()
			l.mu.Unlock()
		}
	}
}

// portsAtOnce is how many ports a start waits for. A TCX link takes an RCU grace period to attach (16 ms at 250
// ticks a second); until a port's turn comes, what it sends is seen at its bridge.
const portsAtOnce = 64

// resync makes links and hooks what the kernel says now.
func (l *Loader) resync() error {
	all, err := whole(l.nl.LinkList)
	if err != nil {
		return fmt.Errorf("list network devices: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resyncs++
	exists := map[int]bool{}
	for _, d := range all {
		exists[d.Attrs().Index] = true
	}
	gone := map[int]bool{}
	for ifindex := range l.links {
		gone[ifindex] = !exists[ifindex]
	}
	for ifindex := range l.hooks { // adopted
		gone[ifindex] = !exists[ifindex]
	}
	for ifindex := range l.byPort { // what the pinned map still believes
		gone[int(ifindex)] = !exists[int(ifindex)]
	}
	for ifindex, is := range gone {
		if is {
			l.linkGone(ifindex)
		}
	}
	// Ports before bridges: what a bridge device sees first has no proof.
	slices.SortStableFunc(all, func(a, b netlink.Link) int { return b2i(a.Type() == "bridge") - b2i(b.Type() == "bridge") })
	for _, d := range all { // all first: a port's bridge may come later in the list
		l.links[d.Attrs().Index] = netLink{d.Attrs().Name, d.Type(), d.Attrs().MasterIndex}
	}
	l.pending = nil
	ports := 0
	for _, d := range all {
		ifindex := d.Attrs().Index
		if want, bridge := l.wants(ifindex); want && bridge != 0 && l.hooks[ifindex] == nil {
			if ports++; ports > portsAtOnce {
				l.pending = append(l.pending, ifindex)
				continue
			}
		}
		if l.rehook(ifindex) {
			l.tellPort(ifindex)
		}
	}
	if n := len(l.pending); n > 0 {
		l.log.Info("more ports are attached one after the other", zap.Int("ports", n))
	}
	l.tellSilent()
	return nil
}

// tellPort calls OnPort. Called with mu held; lets go of it.
func (l *Loader) tellPort(ifindex int) {
	if l.follower == nil {
		return // Open is not done: there is nobody yet who could want to know
	}
	l.mu.Unlock()
	defer l.mu.Lock()
	l.cfg.OnPort(ifindex)
}

func b2i(b bool) int { return int(boolByte(b)) }

// linkIs notes what a device is now. Called with mu held.
func (l *Loader) linkIs(d netlink.Link) {
	ifindex := d.Attrs().Index
	is := netLink{d.Attrs().Name, d.Type(), d.Attrs().MasterIndex}
	was := l.links[ifindex]
	h := l.hooks[ifindex]
	if was == is && (h == nil || h.err == nil) {
		return
	}
	l.links[ifindex] = is
	if was.kind == "bridge" || is.kind == "bridge" { // new, renamed: its ports follow it
		for port, pl := range maps.Clone(l.links) {
			if pl.master == ifindex && l.rehook(port) {
				l.tellPort(port)
			}
		}
	}
	if l.rehook(ifindex) {
		l.tellPort(ifindex)
	}
}

// linkGone forgets a device. Called with mu held; lets go of it for OnPortGone.
func (l *Loader) linkGone(ifindex int) {
	h := l.hooks[ifindex]
	concerns := h != nil || l.byPort[uint32(ifindex)] != nil
	delete(l.links, ifindex)
	delete(l.hooks, ifindex)
	if !concerns {
		return
	}
	err := l.portGone(ifindex)
	if h != nil {
		if h.link != nil {
			err = errors.Join(err, h.link.Close())
		}
		l.log.Info("device gone", zap.String("device", h.name), zap.Int("ifindex", ifindex))
	}
	if err != nil {
		l.log.Error("cannot forget a device", zap.Int("ifindex", ifindex), zap.Error(err))
	}
	if l.follower == nil {
		return // Open is not done: there is nobody yet who could have known the port
	}
	l.mu.Unlock()
	defer l.mu.Lock()
	l.cfg.OnPortGone(ifindex)
}

// wants reports whether the device should have a program, and whose port it is if it is one.
func (l *Loader) wants(ifindex int) (want bool, bridge int) {
	d := l.links[ifindex]
	switch {
	case d.kind == "bridge":
		return l.cfg.watches(d.name), 0
	case d.kind == "veth" && d.master != 0: // the way back needs a peer; other ports are seen at the bridge
		m := l.links[d.master]
		return m.kind == "bridge" && l.cfg.watches(m.name), d.master
	}
	return false, 0
}

// rehook attaches to or detaches from a device, as it should be, and reports whether a port has been attached.
// Called with mu held; lets go of it while it attaches, which nobody else should wait for. Only the
// follower, and who starts it, come here.
func (l *Loader) rehook(ifindex int) (port bool) {
	d := l.links[ifindex]
	want, bridge := l.wants(ifindex)
	h := l.hooks[ifindex]
	switch {
	case !want && h == nil:
	case !want:
		delete(l.hooks, ifindex)
		if err := l.unhook(h); err != nil {
			l.log.Warn("cannot detach", zap.String("device", h.name), zap.Error(err))
		}
		l.log.Info("detached", zap.String("device", d.name), zap.Int("ifindex", ifindex))
	case h != nil && h.err == nil:
		h.name, h.bridge = d.name, bridge
	default:
		failedBefore := h != nil
		h = &hook{ifindex: ifindex, name: d.name, bridge: bridge}
		l.mu.Unlock()
		h.err = l.hook(h)
		l.mu.Lock()
		l.hooks[ifindex] = h
		if h.err != nil {
			if errors.Is(h.err, unix.ENODEV) { // gone already: we are about to hear of it
				return false
			}
			l.hookErrs++
			if !failedBefore {
				l.log.Error("cannot attach", zap.String("device", d.name), zap.Int("ifindex", ifindex), zap.Error(h.err))
			}
			return false
		}
		l.log.Info("attached", zap.String("device", d.name), zap.Int("ifindex", ifindex), zap.Bool("port", bridge != 0))
		return bridge != 0
	}
	return false
}

// programFor returns what belongs on the device, and its name.
func (l *Loader) programFor(h *hook) (*ebpf.Program, string) {
	if h.bridge == 0 {
		return l.objs.MetadBridge, bpf.MetadProgMetadBridge
	}
	return l.objs.MetadPort, bpf.MetadProgMetadPort
}

// where says which end of the reserved descriptors the link gets. Bridge devices are let go of before
// their ports: what a port lets pass must not be caught at its bridge.
func (h *hook) where() where {
	if h.bridge == 0 {
		return highest
	}
	return lowest
}

func (l *Loader) hook(h *hook) error {
	p, name := l.programFor(h)
	if l.mode == AttachClsact {
		return attachClsact(l.nl, h.ifindex, p, name, netlink.HANDLE_MIN_INGRESS)
	}
	k, err := attachTCX(l.host, h.ifindex, p, ebpf.AttachTCXIngress)
	if err != nil {
		return err
	}
	h.link, err = l.fds.place(k, h.where())
	return err
}

func (l *Loader) unhook(h *hook) error {
	switch {
	case h.err != nil:
		return nil
	case h.link != nil:
		return h.link.Close()
	default:
		return detachClsact(l.nl, h.ifindex, netlink.HANDLE_MIN_INGRESS)
	}
}

// tellSilent says of each pattern once that it matches nothing, and again after it did. Called with mu held.
func (l *Loader) tellSilent() {
	for _, p := range l.cfg.Bridges {
		one := Config{Bridges: []string{p}}
		matches := false
		for _, h := range l.hooks {
			matches = matches || h.bridge == 0 && one.watches(h.name)
		}
		if !matches && !l.silent[p] {
			l.log.Info(fmt.Sprintf("bridge pattern %q matches nothing yet: waiting", p))
		}
		l.silent[p] = !matches
	}
}

// wait lets a second pass and reports whether done is still open.
func wait(done <-chan struct{}) bool {
	select {
	case <-done:
		return false
	case <-time.After(time.Second):
		return true
	}
}

// whole calls a netlink listing until nothing has changed under it, a few times at most.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 20 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}
