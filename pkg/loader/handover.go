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

	"metad/bpf"
)

// ErrLayout: what is handed over is not what this version works with. Stop the other first, then Open.
var ErrLayout = errors.New("handed over by an incompatible version")

// handover says what the files are. The order of files: host, server, listener, the maps of mapsOf,
// then the links that Links and Hooks count from there.
type handover struct {
	Layout         uint32
	Attach         AttachMode
	OnExit         OnExit
	Metad0, Metad1 int
	Maps           []string
	PairLinks      int
	Hooks          []handoverHook // those with a link first, in the order of the files
}

type handoverHook struct {
	Ifindex int
	Bridge  int
	HasLink bool
}

// mapsOf returns all maps by name; a new version works on with these very maps.
func mapsOf(o *bpf.MetadObjects) ([]string, []*ebpf.Map) {
	return []string{
			bpf.MetadMapIpTask, bpf.MetadMapNeighbours, bpf.MetadMapCounters, bpf.MetadMapVerdicts,
			bpf.MetadMapEvents, bpf.MetadMapEventGates, bpf.MetadMapSlots, bpf.MetadMapHandshakes,
		}, []*ebpf.Map{
			o.IpTask, o.Neighbours, o.Counters, o.Verdicts,
			o.Events, o.EventGates, o.Slots, o.Handshakes,
		}
}

// Handover returns copies of all that keeps metad in the kernel (namespace, listener, maps, links), for
// Adopt in another process, and stops following devices. Then either Release, when the other
// has adopted, or Resume. Until then this process may go on serving. The caller closes the files.
func (l *Loader) Handover() (files []*os.File, meta []byte, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files, err = nil, fmt.Errorf("hand over: %w", err)
		}
	}()
	l.pause()
	ln, ok := l.listener.(*net.TCPListener)
	if !ok {
		return nil, nil, errors.New("no listener")
	}
	names, ms := mapsOf(l.objs)
	h := handover{
		Layout: l.layout, Attach: l.mode, OnExit: l.cfg.OnExit, Metad0: l.metad0, Metad1: l.metad1,
		Maps: names, PairLinks: len(l.pairLink),
	}
	add := func(fd int) {
		if err != nil {
			return
		}
		var dup int
		if dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			files = append(files, os.NewFile(uintptr(dup), "handover"))
		}
	}
	add(int(l.host))
	add(int(l.server))
	f, err := ln.File()
	if err != nil {
		return files, nil, err
	}
	files = append(files, f)
	for _, m := range ms {
		add(m.FD())
	}
	for _, k := range l.pairLink {
		add(k.fd)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.hooks {
		if k.err != nil {
			continue // for the other to try again
		}
		h.Hooks = append(h.Hooks, handoverHook{k.ifindex, k.bridge, k.link != nil})
		if k.link != nil {
			add(k.link.fd)
		}
	}
	if err != nil {
		return files, nil, err
	}
	meta, err = json.Marshal(h)
	return files, meta, err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Release is Close after a handover: it lets go of everything and takes nothing out of the kernel.
func (l *Loader) Release() error {
	l.closeOnce.Do(func() { l.closeErr = l.letGo() })
	return l.closeErr
}

// Resume goes on after a Handover that nobody adopted.
func (l *Loader) Resume() error { return l.follow() }

// Adopt takes over what Handover returned in another process: its maps and where it is attached, with this
// version's programs. Packets change over one program at a time and none is lost. The files are
// Adopt's to close. Config.Netns and MaxEntries are what they were; PinDir must be the same.
//
// Errors: ErrLayout; those of Open. After an error the other process is as it was, except that it may
// be running some of our programs, which do the same.
func Adopt(cfg Config, files []*os.File, meta []byte) (_ *Loader, _ net.Listener, err error) {
	defer closeAll(files)
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, nil, fmt.Errorf("loader config: %w", err)
	}
	if err := checkHost(); err != nil {
		return nil, nil, err
	}
	var h handover
	if err := json.Unmarshal(meta, &h); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrLayout, err)
	}
	const firstMap = 3
	links := h.PairLinks
	for _, k := range h.Hooks {
		if k.HasLink {
			links++
		}
	}
	if len(files) != firstMap+len(h.Maps)+links {
		return nil, nil, fmt.Errorf("%w: %d files", ErrLayout, len(files))
	}
	if h.OnExit == OnExitOpen && cfg.OnExit == OnExitDrop && h.Attach == AttachTCX {
		return nil, nil, fmt.Errorf("%w: OnExit: drop needs clsact, attached by tcx", ErrLayout)
	}
	l := &Loader{
		cfg: cfg, log: cfg.Log, mode: h.Attach, metad0: h.Metad0, metad1: h.Metad1,
		host: netns.None(), server: netns.None(),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.letGo())
		}
	}()
	if l.fds, err = reserveLowFDs(); err != nil {
		return nil, nil, err
	}
	if l.host, err = dupNS(files[0]); err != nil {
		return nil, nil, err
	}
	if l.server, err = dupNS(files[1]); err != nil {
		return nil, nil, err
	}
	if l.nl, err = netlink.NewHandleAt(l.host, unix.NETLINK_ROUTE); err != nil {
		return nil, nil, fmt.Errorf("netlink: %w", err)
	}
	given := map[string]*ebpf.Map{}
	defer func() {
		for _, m := range given {
			m.Close()
		}
	}()
	for i, name := range h.Maps {
		fd, err := dupFile(files[firstMap+i])
		if err != nil {
			return nil, nil, err
		}
		if given[name], err = ebpf.NewMapFromFD(fd); err != nil {
			return nil, nil, fmt.Errorf("%w: map %s: %w", ErrLayout, name, err)
		}
	}
	if err := l.load(given); err != nil {
		return nil, nil, err
	}
	if l.layout != h.Layout {
		return nil, nil, fmt.Errorf("%w: layout %d, ours is %d", ErrLayout, h.Layout, l.layout)
	}
	rest := files[firstMap+len(h.Maps):]
	take := func(p *ebpf.Program, w where) (*fdLink, error) {
		fd, err := dupFile(rest[0])
		if err != nil {
			return nil, err
		}
		rest = rest[1:]
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
	// First what answers, then what asks: a connection begun by the new programs ends well with them.
	if l.mode == AttachClsact {
		if err := l.attachPair(); err != nil {
			return nil, nil, err
		}
	}
	pair := l.pairHooks()
	if h.PairLinks != 0 && h.PairLinks != len(pair) {
		return nil, nil, fmt.Errorf("%w: %d links", ErrLayout, h.PairLinks)
	}
	for i := range h.PairLinks {
		k, err := take(pair[i].prog, lowest)
		if err != nil {
			return nil, nil, err
		}
		l.pairLink = append(l.pairLink, k)
	}
	if err := l.arm(); err != nil {
		return nil, nil, err
	}
	l.hooks = map[int]*hook{}
	for _, hh := range h.Hooks {
		k := &hook{ifindex: hh.Ifindex, bridge: hh.Bridge}
		if hh.HasLink {
			p, _ := l.programFor(k)
			if k.link, err = take(p, k.where()); err != nil {
				return nil, nil, err
			}
		} else if err := l.hook(k); err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, nil, err
		}
		l.hooks[k.ifindex] = k
	}
	if err := l.fds.fill(); err != nil {
		return nil, nil, err
	}
	if l.listener, err = net.FileListener(files[2]); err != nil {
		return nil, nil, fmt.Errorf("listener: %w", err)
	}
	if err := l.follow(); err != nil {
		l.listener.Close()
		return nil, nil, err
	}
	return l, l.listener, nil
}

// letGo closes what is open and takes nothing out of the kernel but what was open nowhere else.
func (l *Loader) letGo() error {
	var errs []error
	l.pause()
	for _, k := range l.hooks {
		if k.link != nil {
			errs = append(errs, k.link.Close())
		}
	}
	for _, k := range l.pairLink {
		errs = append(errs, k.Close())
	}
	if l.objs != nil {
		errs = append(errs, l.objs.Close())
	}
	for _, ns := range []*netns.NsHandle{&l.server, &l.host} {
		if ns.IsOpen() {
			errs = append(errs, ns.Close())
		}
	}
	if l.nl != nil {
		l.nl.Close()
	}
	l.fds.close()
	return errors.Join(errs...)
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

// pause stops following devices.
func (l *Loader) pause() {
	if l.follower != nil {
		l.follower.stop()
		l.follower = nil
	}
}
