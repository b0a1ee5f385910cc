package loader

import (
	"errors"
	"fmt"
	"sync"

	"go.uber.org/zap"
)

// gate decides whether the programs take packets, and keeps metad's own devices working. Its
// methods are safe for concurrent use.
type gate struct {
	progs     *programs
	end       *endpoint
	tc        *tcAttacher
	hostRoute bool
	log       *zap.Logger

	// guards what follows, the program array, the endpoint's devices and their programs
	mu   sync.Mutex
	pair []*fdLink // of metad0 and metad1; none with clsact
	want bool      // the programs are to take packets
	err  error     // why they do not take packets although want is true
}

// attach puts the programs on metad's own devices.
func (g *gate) attach() (err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pair, err = g.tc.attachPair(g.end)
	return err
}

// arm makes the programs take packets from now on.
func (g *gate) arm() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.want = true
	return g.fill()
}

// fill is arm with mu held.
func (g *gate) fill() error {
	if g.err != nil { // rebuild arms
		return nil
	}
	if err := g.progs.arm(); err != nil {
		return err
	}
	if !g.hostRoute {
		return g.end.removeRoute()
	}
	if err := g.end.addRoute(); err != nil { // no error: containers do not need the route
		g.log.Warn("host processes do not reach the endpoint", zap.Error(err))
	}
	return nil
}

// disarm makes the programs leave packets alone.
func (g *gate) disarm() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.want = false
	return errors.Join(g.progs.disarm(), g.end.removeRoute())
}

// ErrEndpoint: metad's own network device was deleted or set down by another program, and is not
// rebuilt yet.
var ErrEndpoint = errors.New("metad's network device is gone or down")

// check disarms the programs if metad's own devices are gone or down: otherwise packets would be
// lost, and clients would hang. It reports whether rebuild is needed.
func (g *gate) check() (broken bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.end.state()
	if err == nil {
		return g.err != nil
	}
	if g.err == nil {
		g.log.Error(
			"metad's network device is gone or down: containers are not answered "+
				"until it is rebuilt", zap.Error(err))
		if err := g.progs.disarm(); err != nil {
			g.log.Error("cannot disarm", zap.Error(err))
		}
	}
	g.err = fmt.Errorf("%w: %w", ErrEndpoint, err)
	return true
}

// rebuild makes new devices and takes packets again if the gate is armed. After an error it may be
// called again.
func (g *gate) rebuild() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, k := range g.pair {
		_ = k.Close() // its device is gone, or will be in a moment
	}
	g.pair = nil
	err := g.end.makeVeth()
	if err == nil {
		g.pair, err = g.tc.attachPair(g.end)
	}
	if err != nil {
		g.err = fmt.Errorf("%w: %w", ErrEndpoint, err)
		return err
	}
	g.err = nil
	if g.want {
		if err := g.fill(); err != nil {
			g.err = fmt.Errorf("%w: %w", ErrEndpoint, err)
			return err
		}
	}
	g.log.Info("metad's network device is rebuilt")
	return nil
}

// ready returns nil while the programs take packets.
func (g *gate) ready() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil && !g.want {
		return errNotArmed
	}
	return g.err
}

var errNotArmed = errors.New("packets are not redirected")

// links returns the links of metad's own devices, for a takeover.
func (g *gate) links() []*fdLink {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pair
}

// relink puts the programs on links of metad's own devices that another process has made or
// changed.
func (g *gate) relink(take func(i int, p pairHook) (*fdLink, error), n int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	hooks := g.tc.pairHooks(g.end)
	if n != 0 && n != len(hooks) {
		return fmt.Errorf("%w: %d links", ErrLayout, n)
	}
	if n == 0 {
		_, err := g.tc.attachPair(g.end)
		return err
	}
	for i, p := range hooks {
		k, err := take(i, p)
		if err != nil {
			return err
		}
		g.pair = append(g.pair, k)
	}
	return nil
}

// restore puts this process's programs back, which another process may have replaced: on metad's
// own devices, and in the program array if packets were taken.
func (g *gate) restore() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	hooks := g.tc.pairHooks(g.end)
	for i, k := range g.pair {
		if err := k.update(hooks[i].prog); err != nil {
			return fmt.Errorf("attach %s: %w", hooks[i].name, err)
		}
	}
	if len(g.pair) == 0 {
		if _, err := g.tc.attachPair(g.end); err != nil {
			return err
		}
	}
	if !g.want {
		return nil
	}
	return g.fill()
}

// close removes the programs from metad's own devices, unless another process has them too.
func (g *gate) close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for _, k := range g.pair {
		errs = append(errs, k.Close())
	}
	g.pair = nil
	return errors.Join(errs...)
}
