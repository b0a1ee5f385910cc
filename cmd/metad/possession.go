package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"

	"metad/pkg/dockerproxy"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/snapshot"
	"metad/pkg/takeover"
)

// takeoverLayout is the version of takeoverMeta and its contents. A metad with another version is
// refused; it can start after this one has stopped.
const takeoverLayout = 2

// takeoverMeta goes to the successor with the files.
type takeoverMeta struct {
	Loader []byte // loader.OfferTakeover's
	Tasks  []byte // snapshot.Encode's
	// Proxy is the path of the Docker API proxy's socket, whose listener is the last file; "":
	// none.
	Proxy string
	Fixed fixedFlags
}

// fixedFlags take effect only where everything is made fresh.
type fixedFlags struct {
	Attach       string
	MaxAddresses int
	OnExit       string
	PinDir       string
}

func (c *config) fixed() fixedFlags {
	return fixedFlags{c.attach, c.maxAddresses, c.onExit, c.pinDir}
}

// setFixed gives the flags the values with which everything was made.
func (c *config) setFixed(f fixedFlags) {
	c.attach, c.maxAddresses, c.onExit, c.pinDir = f.Attach, f.MaxAddresses, f.OnExit, f.PinDir
	for name, v := range map[string]any{"attach": f.Attach, "max-addresses": f.MaxAddresses,
		"on-exit": f.OnExit, "pin-dir": f.PinDir} {
		c.values[name] = fmt.Sprint(v)
	}
}

// lockTime is how long the exit of a killed metad may take.
const lockTime = 2 * time.Second

// possession is what only one metad on a host can have: the takeover socket, the pins, and the
// programs, maps and devices in the kernel. There are two ways to it: if no metad serves, it makes
// everything fresh; otherwise it takes over from the one that serves. No other code depends on
// which way it was.
type possession struct {
	cfg    *config
	log    *zap.Logger
	socket *takeover.Socket
	pred   *takeover.Predecessor // nil: fresh
	lock   io.Closer             // nil: another process has it
	loader *loader.Loader
	ln     net.Listener
	proxy  *givenProxy    // nil: the predecessor had none
	saved  []lookup.Saved // what an earlier process knew
	ours   bool           // this process removes what is in the kernel at its end
}

// takePossession returns when everything exists except the listener. From then on ports gets every
// port of the host. Errors: takeover.ErrRefused.
func takePossession(ctx context.Context, c *config, log *zap.Logger, ports *ports) (_ *possession,
	err error) {
	p := &possession{cfg: c, log: log}
	kept := takeKept(c, log)
	if p.socket, p.pred, err = takeover.Start(ctx, c.takeoverConfig(log)); err != nil {
		return nil, runDirError(c.runDir, err)
	}
	cfg := c.loaderConfig(log)
	cfg.OnPort, cfg.OnPortGone = ports.came, ports.gone
	switch {
	case p.pred != nil:
		if kept != nil {
			closeFiles(&kept.State)
		}
		err = p.takeOver(cfg, nil)
	case kept != nil:
		err = p.inherit(ctx, cfg, kept)
	default:
		err = p.fresh(ctx, cfg)
	}
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *possession) fresh(ctx context.Context, cfg loader.Config) (err error) {
	if p.lock, err = loader.LockPinDir(ctx, cfg.PinDir, lockTime); err != nil {
		return err
	}
	if p.loader, err = loader.Open(cfg); err != nil {
		return err
	}
	p.ours = true
	p.saved = snapshot.Read(p.cfg.runDir, p.log.Named("snapshot"))
	return nil
}

// inherit takes over what the last metad left for this one. If that does not fit, it is removed,
// and everything is made fresh.
func (p *possession) inherit(ctx context.Context, cfg loader.Config, kept *keptState) error {
	p.pred = p.socket.Inherit(kept.State)
	err := p.takeOver(cfg, kept)
	if err == nil {
		p.ours = true
		return nil
	}
	p.log.Warn("what the last metad left is not used", zap.Error(err))
	closeFiles(&kept.State)
	p.pred, p.saved = nil, nil
	if p.proxy != nil {
		p.proxy.file.Close()
		p.proxy = nil
	}
	return p.fresh(ctx, cfg)
}

// closeFiles closes the files of a state that is not used.
func closeFiles(s *takeover.State) {
	for _, f := range s.Files {
		f.Close() // again, if a takeover that failed has closed it
	}
}

// takeOver takes over from p.pred, which has left kept, or runs if kept is nil.
func (p *possession) takeOver(cfg loader.Config, kept *keptState) error {
	var meta takeoverMeta
	if err := json.Unmarshal(p.pred.Meta, &meta); err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	switch {
	case kept == nil:
	case kept.bySelf: // a reload leaves them as they are
		p.cfg.setFixed(meta.Fixed)
		came, gone := cfg.OnPort, cfg.OnPortGone
		cfg = p.cfg.loaderConfig(p.log)
		cfg.OnPort, cfg.OnPortGone = came, gone
	case meta.Fixed != p.cfg.fixed():
		return fmt.Errorf("take over: it has %+v, this metad is to have %+v", meta.Fixed,
			p.cfg.fixed())
	}
	saved, err := snapshot.Parse(meta.Tasks)
	if err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	p.saved = saved
	files := p.pred.Files
	if n := len(files) - 1; meta.Proxy != "" && n >= 0 {
		p.proxy, files = &givenProxy{files[n], meta.Proxy}, files[:n]
	}
	p.loader, p.ln, err = loader.TakeOver(cfg, files, meta.Loader)
	return err
}

// givenProxy is the socket of a predecessor's Docker API proxy. It stays in use, because a
// container that has it mounted as a file would not see a new socket in its place.
type givenProxy struct {
	file *os.File // the listener
	path string
}

// proxySocket returns the listener of the Docker API proxy: the predecessor's, or a new one. It is
// for one goroutine at a time.
func (p *possession) proxySocket(engine string) (*dockerproxy.Socket, error) {
	if had := p.proxy; had != nil {
		p.proxy = nil
		defer had.file.Close()
		if s, err := dockerproxy.Adopt(had.file, had.path, engine); err == nil {
			return s, nil
		}
	}
	return dockerproxy.Listen(p.cfg.proxySocket, engine)
}

// dropProxy ends a predecessor's socket that this process does not serve: the predecessor leaves it
// to this one.
func (p *possession) dropProxy() {
	if p.proxy == nil || p.proxy.path == p.cfg.proxySocket {
		return
	}
	if err := errors.Join(p.proxy.file.Close(), os.Remove(p.proxy.path)); err != nil {
		p.log.Warn("cannot remove the predecessor's docker proxy socket", zap.Error(err))
	}
	p.proxy = nil
}

// listener returns the listener of the endpoint. It is the last descriptor to be opened, and the
// program array is filled last. So if this process is killed, the kernel removes both first, and
// no client waits for an answer.
func (p *possession) listener() (net.Listener, error) {
	if p.pred != nil {
		return p.ln, nil
	}
	return p.loader.Listen()
}

// commit makes this process the owner of everything. The caller already serves. After an error the
// predecessor goes on, and the caller ends.
func (p *possession) commit(ctx context.Context) error {
	if p.pred == nil {
		return nil
	}
	if err := p.pred.Serving(ctx); err != nil {
		return err
	}
	p.ours = true
	p.dropProxy()
	p.log.Info("taken over from the metad before")
	return nil
}

// arm makes packets come here, if they do not yet. It waits for known: before metad knows the
// tasks, the agent, if any, has better answers.
func (p *possession) arm(ctx context.Context, known <-chan struct{},
	serve func(arm func() error) error) error {
	if p.pred != nil {
		return serve(func() error { return nil })
	}
	select {
	case <-known:
		return serve(p.loader.Arm)
	case <-ctx.Done():
		return nil
	}
}

// predecessorLeft returns when no other metad has the admin address.
func (p *possession) predecessorLeft(ctx context.Context) {
	if p.pred == nil {
		return
	}
	select {
	case <-p.pred.Left():
	case <-ctx.Done():
	}
}

// keepLock takes the lock of the pins as soon as a predecessor has released it.
func (p *possession) keepLock(ctx context.Context) error {
	for p.pred != nil && p.lock == nil && ctx.Err() == nil {
		if lock, err := loader.LockPinDir(ctx, p.cfg.pinDir, time.Minute); err == nil {
			p.lock = lock
			return nil
		}
		pause(ctx, time.Second)
	}
	return nil
}

// offer returns what a successor gets, proxy's listener too if it is not nil. From then on this
// process changes nothing in the kernel.
func (p *possession) offer(views []*lookup.View, proxy *dockerproxy.Socket) (takeover.State,
	error) {
	files, kernel, err := p.loader.OfferTakeover()
	if err != nil {
		return takeover.State{}, err
	}
	s := takeover.State{Files: files}
	meta := takeoverMeta{Loader: kernel, Fixed: p.cfg.fixed()}
	if proxy != nil {
		// else the successor makes another one
		if file, path, err := proxy.File(); err == nil {
			s.Files, meta.Proxy = append(s.Files, file), path
		}
	}
	meta.Tasks, err = snapshot.Encode(views)
	if err == nil {
		s.Meta, err = json.Marshal(meta)
	}
	if err != nil {
		for _, f := range s.Files {
			f.Close()
		}
		return takeover.State{}, err
	}
	return s, nil
}

// Close releases everything. If this process owns it, Close removes it from the kernel; otherwise
// another metad has it, and it stays.
func (p *possession) Close() error {
	var errs []error
	switch {
	case p.loader == nil:
	case p.ours:
		errs = append(errs, p.loader.Close())
	default:
		errs = append(errs, p.loader.FinishTakeover())
	}
	if p.lock != nil {
		errs = append(errs, p.lock.Close())
	}
	if p.proxy != nil {
		errs = append(errs, p.proxy.file.Close())
	}
	// Last, so that the next metad finds nothing of this one in its way.
	if p.pred != nil {
		return errors.Join(append(errs, p.pred.Close())...)
	}
	return errors.Join(append(errs, p.socket.Close())...)
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
