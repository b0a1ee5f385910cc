package loader

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A takeover moves metad's namespace, maps, links and listener from one process to another:
//
//	the running metad                     the new metad
//	OfferTakeover ── files, meta ───────▶ TakeOver
//	FinishTakeover when that has succeeded, CancelTakeover when it has failed

// ErrLayout means that this version cannot use what the running metad offers. Stop that one first,
// then Open.
var ErrLayout = errors.New("offered by an incompatible version")

// takeover says what the files are. The order of files: the host's namespace, metad's, the lock of
// the host's namespace, the listener, the maps by name, the links of metad's own devices, then
// those of Hooks that have one.
type takeover struct {
	Layout         uint32
	Attach         AttachMode
	OnExit         OnExit
	Metad0, Metad1 int
	Maps           []string
	PairLinks      int
	Hooks          []takeoverHook
}

type takeoverHook struct {
	Ifindex int
	Bridge  int
	HasLink bool
}

// offer is a takeover with its files.
type offer struct {
	takeover
	host, server, lock, listener *os.File
	maps, pair, links            []*os.File
}

// OfferTakeover returns copies of all that keeps metad in the kernel (namespace, listener, maps,
// links), for TakeOver in another process, and stops following devices. Then comes either
// FinishTakeover or CancelTakeover; until then this process may go on serving. The caller closes
// the files.
func (l *Loader) OfferTakeover() (files []*os.File, meta []byte, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files, err = nil, fmt.Errorf("offer a takeover: %w", err)
		}
	}()
	l.pause()
	ln, ok := l.end.listener.(*net.TCPListener)
	if !ok {
		return nil, nil, errors.New("no listener")
	}
	names, ms := l.progs.maps()
	pair := l.gate.links()
	t := takeover{
		Layout: l.progs.layout, Attach: l.tc.mode, OnExit: l.cfg.OnExit,
		Metad0: l.end.metad0, Metad1: l.end.metad1,
		Maps: names, PairLinks: len(pair),
	}
	add := func(fd int) {
		if err != nil {
			return
		}
		var dup int
		if dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			files = append(files, os.NewFile(uintptr(dup), "takeover"))
		}
	}
	add(int(l.host))
	add(int(l.end.server))
	add(l.lock.fd)
	f, err := ln.File()
	if err != nil {
		return files, nil, err
	}
	files = append(files, f)
	for _, m := range ms {
		add(m.FD())
	}
	for _, k := range pair {
		add(k.fd)
	}
	for _, h := range l.ports.all() {
		if h.err != nil {
			continue // for the other process to try again
		}
		k, hasLink := h.on.(*fdLink)
		t.Hooks = append(t.Hooks, takeoverHook{h.ifindex, h.bridge, hasLink})
		if hasLink {
			add(k.fd)
		}
	}
	if err != nil {
		return files, nil, err
	}
	meta, err = json.Marshal(t)
	return files, meta, err
}

// FinishTakeover is Close after a takeover: it lets go of everything and takes nothing out of the
// kernel.
func (l *Loader) FinishTakeover() error {
	l.closeOnce.Do(func() { l.closeErr = l.letGo() })
	return l.closeErr
}

// CancelTakeover continues after an offer that no process took. It puts this process's programs
// back where the other process may have put its own.
func (l *Loader) CancelTakeover() error {
	return errors.Join(l.restore(), l.follow())
}

func (l *Loader) restore() error {
	errs := []error{l.gate.restore()}
	for _, h := range l.ports.all() {
		if h.err != nil {
			continue
		}
		var err error
		if k, ok := h.on.(*fdLink); ok {
			p, _, _ := l.tc.programFor(h.bridge == 0)
			err = k.update(p)
		} else {
			_, err = l.tc.attachFilter(h.ifindex, h.bridge == 0)
		}
		if err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("attach to %q: %w", h.name, err))
		}
	}
	return errors.Join(errs...)
}

// isGone reports whether an attachment failed because the device is gone.
func isGone(err error) bool { return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOLINK) }

// TakeOver takes over what OfferTakeover returned in another process: its maps and where it is
// attached, with this version's programs. Packets change over one program at a time and none is
// lost. The files are TakeOver's to close. MaxEntries is what it was; PinDir and Netns must be the
// same.
//
// Errors: ErrLayout; ErrNetns; those of Open. After an error the other process is as it was, except
// that it may be running some of our programs until its CancelTakeover.
func TakeOver(cfg Config, files []*os.File, meta []byte) (_ *Loader, _ net.Listener, err error) {
	defer closeAll(files)
	l, err := newLoader(cfg)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.letGo())
		}
	}()
	o, err := unpack(files, meta)
	if err == nil {
		err = o.check(&l.cfg)
	}
	if err != nil {
		return nil, nil, err
	}
	if err := l.takeParts(o); err != nil {
		return nil, nil, err
	}
	if err := l.relink(o); err != nil {
		return nil, nil, err
	}
	if err := l.takeListener(o); err != nil {
		return nil, nil, err
	}
	if err := l.follow(); err != nil {
		return nil, nil, errors.Join(err, l.end.listener.Close())
	}
	// The offer's files have numbers below the links'. A connection must not get one of them:
	// see lowFDs.
	closeAll(files)
	if err := l.fds.fill(); err != nil {
		return nil, nil, errors.Join(err, l.end.listener.Close())
	}
	return l, l.end.listener, nil
}

// unpack assigns the files to their purposes. Errors: ErrLayout.
func unpack(files []*os.File, meta []byte) (*offer, error) {
	var o offer
	if err := json.Unmarshal(meta, &o.takeover); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLayout, err)
	}
	if ours, err := LayoutVersion(); err != nil || o.Layout != ours {
		return nil, errors.Join(err, fmt.Errorf("%w: layout %d, ours is %d", ErrLayout,
			o.Layout, ours))
	}
	links := 0
	for _, h := range o.Hooks {
		links += boolToInt(h.HasLink)
	}
	const named = 4
	if o.PairLinks < 0 || len(files) != named+len(o.Maps)+o.PairLinks+links {
		return nil, fmt.Errorf("%w: %d files", ErrLayout, len(files))
	}
	o.host, o.server, o.lock, o.listener = files[0], files[1], files[2], files[3]
	rest := files[named:]
	take := func(n int) (taken []*os.File) {
		taken, rest = rest[:n], rest[n:]
		return taken
	}
	o.maps, o.pair, o.links = take(len(o.Maps)), take(o.PairLinks), take(links)
	return &o, nil
}

// ErrNetns means that the running metad is in another network namespace.
var ErrNetns = errors.New(
	"the running metad is in another network namespace: give this one another run-dir")

// check refuses an offer that does not fit this configuration.
func (o *offer) check(cfg *Config) error {
	ours, err := hostNS(cfg.Netns)
	if err != nil {
		return err
	}
	defer ours.Close()
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(int(ours), &a), unix.Fstat(int(o.host.Fd()),
		&b)); err != nil {
		return fmt.Errorf("host network namespace: %w", err)
	}
	if a.Dev != b.Dev || a.Ino != b.Ino {
		return ErrNetns
	}
	if o.OnExit == OnExitOpen && cfg.OnExit == OnExitDrop && o.Attach == AttachTCX {
		return fmt.Errorf("%w: OnExit: drop needs clsact, attached by tcx", ErrLayout)
	}
	return nil
}

// takeParts makes the parts from the offer, and loads the programs with its maps.
func (l *Loader) takeParts(o *offer) (err error) {
	if l.host, err = dupNS(o.host); err != nil {
		return err
	}
	if l.nl, err = netlink.NewHandleAt(l.host, unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	fd, err := dupFile(o.lock)
	if err != nil {
		return err
	}
	l.lock = &netnsLock{fd}
	l.end = &endpoint{host: l.nl, metad0: o.Metad0, metad1: o.Metad1}
	if l.end.server, err = dupNS(o.server); err != nil {
		return err
	}
	maps := map[string]*ebpf.Map{}
	defer closeMaps(maps)
	for i, name := range o.Maps {
		fd, err := dupFile(o.maps[i])
		if err != nil {
			return err
		}
		if maps[name], err = ebpf.NewMapFromFD(fd); err != nil {
			return fmt.Errorf("%w: map %s: %w", ErrLayout, name, err)
		}
	}
	if err := l.load(maps); err != nil {
		return err
	}
	l.tc.mode = o.Attach
	return nil
}

// relink puts this process's programs in the place of the other's. First those that answer, then
// those that ask: a connection begun by the new programs ends well with them.
func (l *Loader) relink(o *offer) (err error) {
	take := func(i int, p pairHook) (*fdLink, error) {
		return l.takeLink(o.pair[i], p.prog, lowest)
	}
	if err := l.gate.relink(take, len(o.pair)); err != nil {
		return err
	}
	if err := l.gate.arm(); err != nil {
		return err
	}
	links := o.links
	for _, t := range o.Hooks {
		h := &hook{ifindex: t.Ifindex, bridge: t.Bridge}
		if t.HasLink {
			p, _, w := l.tc.programFor(h.bridge == 0)
			f := links[0]
			links = links[1:]
			h.on, err = l.takeLink(f, p, w)
		} else {
			h.on, err = l.tc.attachFilter(h.ifindex, h.bridge == 0)
		}
		if isGone(err) { // since the offer was made
			continue
		}
		if err != nil {
			return err
		}
		l.ports.adopt(h)
	}
	return nil
}

// takeLink gives the link the program, and a number that was reserved for it.
func (l *Loader) takeLink(f *os.File, p *ebpf.Program, w where) (*fdLink, error) {
	fd, err := dupFile(f)
	if err != nil {
		return nil, err
	}
	k, err := link.NewFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("%w: link: %w", ErrLayout, err)
	}
	if err := k.Update(p); err != nil {
		k.Close()
		return nil, fmt.Errorf("update link: %w", err)
	}
	return l.fds.place(k, w)
}

// takeListener comes after the links: see lowFDs.
func (l *Loader) takeListener(o *offer) (err error) {
	if err := l.fds.fill(); err != nil {
		return err
	}
	if l.end.listener, err = net.FileListener(o.listener); err != nil {
		return fmt.Errorf("listener: %w", err)
	}
	return nil
}

// letGo closes all descriptors. The kernel keeps everything that another process has open too.
func (l *Loader) letGo() error {
	l.pause()
	var errs []error
	if l.ports != nil {
		for _, h := range l.ports.all() {
			if k, ok := h.on.(*fdLink); ok {
				errs = append(errs, k.Close())
			}
		}
	}
	if l.gate != nil {
		errs = append(errs, l.gate.close())
	}
	if l.end != nil {
		errs = append(errs, l.end.letGo())
	}
	return errors.Join(append(errs, l.closeRest())...)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func dupFile(f *os.File) (int, error) {
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}

func dupNS(f *os.File) (netns.NsHandle, error) {
	fd, err := dupFile(f)
	if err != nil {
		return netns.None(), fmt.Errorf("network namespace: %w", err)
	}
	return netns.NsHandle(fd), nil
}
