package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/snapshot"
	"metad/pkg/takeover"
)

// handoverLayout is the version of handoverMeta and of what is in it. A metad with another one is refused,
// and started after this one has stopped.
const handoverLayout = 1

// handoverMeta goes with the files that are handed over.
type handoverMeta struct {
	Loader []byte // loader.OfferTakeover's
	Tasks  []byte // snapshot.Encode's
}

// give is what a successor gets. From then on this process changes nothing in the kernel.
func (d *daemon) give() (takeover.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.frozen = true
	files, kernel, err := d.loader.OfferTakeover()
	if err != nil {
		return takeover.State{}, err
	}
	s := takeover.State{Files: files}
	tasks, err := snapshot.Encode(d.table.Views())
	if err == nil {
		s.Meta, err = json.Marshal(handoverMeta{kernel, tasks})
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return takeover.State{}, err
	}
	return s, nil
}

// resume goes on after a takeover that did not happen.
func (d *daemon) resume() error {
	err := d.loader.CancelTakeover()
	d.thaw()
	return err
}

// adopt is the other side of give.
func (d *daemon) adopt(pred *takeover.Predecessor) (*loader.Loader, net.Listener, []lookup.Saved, error) {
	var meta handoverMeta
	if err := json.Unmarshal(pred.Meta, &meta); err != nil {
		return nil, nil, nil, fmt.Errorf("take over: %w", err)
	}
	saved, err := snapshot.Parse(meta.Tasks)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("take over: %w", err)
	}
	ld, ln, err := loader.TakeOver(d.loaderConfig(), pred.Files, meta.Loader)
	return ld, ln, saved, err
}

// runDirError says what to do about an error of the takeover socket's.
func runDirError(dir string, err error) error {
	if errors.Is(err, takeover.ErrRefused) {
		return err
	}
	err = fmt.Errorf("run-dir %q: %w", dir, err)
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		names := make([]string, len(loader.RequiredCaps))
		for i, c := range loader.RequiredCaps {
			names[i] = c.Name
		}
		err = fmt.Errorf("%w (metad needs root, or %s)", err, strings.Join(names, ", "))
	}
	return err
}

// lockPins makes the caller the only metad with the pins in dir, within the given time. One with another run
// directory could not be taken over from, and would lose its namespace and programs without hearing of it.
func lockPins(ctx context.Context, dir string, within time.Duration) (io.Closer, error) {
	_ = os.Mkdir(dir, 0o700) // the loader says what is wrong with it
	f, err := os.Open(dir)
	if err != nil {
		return io.NopCloser(nil), nil
	}
	for end := time.Now().Add(within); ; pause(ctx, 20*time.Millisecond) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return f, nil
		}
		if ctx.Err() != nil || time.Now().After(end) || !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("pin-dir %q: another metad runs with it: stop it first, or take over by giving its run-dir", dir)
	}
	return nil, fmt.Errorf("pin-dir %q: lock: %w", dir, err)
}

// keepLock has the lock from when the predecessor is gone until ctx ends.
func (d *daemon) keepLock(ctx context.Context) error {
	for ctx.Err() == nil {
		if lock, err := lockPins(ctx, d.cfg.pinDir, time.Minute); err == nil {
			<-ctx.Done()
			return lock.Close()
		}
		pause(ctx, time.Second)
	}
	return nil
}

// pause returns after t or when ctx ends.
func pause(ctx context.Context, t time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(t):
	}
}

// keepSnapshot writes what the next process begins with, until ctx ends.
func (d *daemon) keepSnapshot(ctx context.Context) error {
	w, err := snapshot.NewWriter(d.cfg.runDir)
	if err != nil {
		return err
	}
	w.Run(ctx, 0, func() ([]*lookup.View, bool) {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.table.Views(), !d.frozen
	}, d.log.Named("snapshot"))
	return nil
}

func (d *daemon) loaderConfig() loader.Config {
	c := d.cfg
	return loader.Config{
		Bridges:     c.bridges,
		PinDir:      c.pinDir,
		Attach:      loader.AttachMode(c.attach),
		TrustBridge: c.trustBridge,
		OnExit:      loader.OnExit(c.onExit),
		MaxEntries:  c.maxAddresses,
		Log:         d.log.Named("loader"),
		HostRoute:   c.hostRoute != "off",
		AgentAddr:   agentAddr(c.agentURL),
		OnPort:      d.port,
		OnPortGone:  d.portGone,
	}
}

// agentAddr returns where the agent listens. A host name is not resolved: rules name addresses.
func agentAddr(agentURL string) netip.AddrPort {
	u, err := url.Parse(agentURL)
	if err != nil {
		return netip.AddrPort{}
	}
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16)
	if err != nil {
		return netip.AddrPort{}
	}
	host := u.Hostname()
	if host == "localhost" {
		host = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || !addr.Is4() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr, uint16(port))
}
