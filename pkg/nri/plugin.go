// Package nri makes metad a plugin of the Docker Engine: by NRI, the Node Resource Interface, the
// Engine asks it at every creation of a container what to put in, whoever creates the container.
//
// The Engine waits for the answer, up to two seconds, and no other container is created meanwhile.
// So the answer is given in time without the file if the disk is slow; and what talks to the Engine
// is a process of its own, the guard (see Guard), which hangs up if metad as a whole does not
// answer. The Engine then goes on without.
package nri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"go.uber.org/zap"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
)

// DefaultSocket is where the Engine's documentation has it listen.
const DefaultSocket = api.DefaultSocketPath

const (
	// answerTime is how long the Engine waits for metad at most before the guard hangs up.
	answerTime = 80 * time.Millisecond
	// fileTime is how long an answer waits for the directory of the metadata file.
	fileTime = 40 * time.Millisecond

	// staleEvery is the time between two looks whether the socket is still the one that metad
	// is connected to. An Engine that is told to reload its configuration listens anew and
	// forgets its plugins, without hanging up.
	staleEvery = 2 * time.Second

	retryFirst, retryLast = 50 * time.Millisecond, 5 * time.Second
)

// errNotDocker is why metad leaves a socket again: containerd has one of its own at the same place.
var errNotDocker = errors.New("not the Docker Engine")

// Config says what to be a plugin of.
type Config struct {
	Socket   string   // of NRI; "": DefaultSocket
	Guard    []string // command that runs Guard with the descriptors that it wants
	Expected bool     // it is worth a warning if the Engine is not there
	// NoFiles: no metadata files, because containers could not read them. NRI cannot relabel a
	// mount for SELinux.
	NoFiles func() bool
	Log     *zap.Logger
}

// Plugin is the plugin. All methods are safe for concurrent use.
type Plugin struct {
	cfg       Config
	inject    *inject.Injector
	files     *inject.Bounded // by fileTime: the Engine asks for one container after the other
	connected atomic.Bool
	first     sync.Once
	ready     chan struct{} // closed by first
}

// New returns a plugin that puts in what i decides.
func New(cfg Config, i *inject.Injector) *Plugin {
	if cfg.Socket == "" {
		cfg.Socket = DefaultSocket
	}
	return &Plugin{
		cfg:    cfg,
		inject: i,
		files:  i.Within(fileTime),
		ready:  make(chan struct{}),
	}
}

// Socket returns the path of NRI's socket.
func (p *Plugin) Socket() string { return p.cfg.Socket }

// Connected reports whether the Engine asks metad.
func (p *Plugin) Connected() bool { return p.connected.Load() }

// Ready is closed when the Engine asks metad for the first time.
func (p *Plugin) Ready() <-chan struct{} { return p.ready }

// Run is the plugin until ctx is done, whatever becomes of the Engine. It returns nil.
func (p *Plugin) Run(ctx context.Context) error {
	wait, said := retryFirst, ""
	for ctx.Err() == nil {
		held, err := p.session(ctx)
		if held {
			wait, said = retryFirst, ""
		}
		if ctx.Err() != nil {
			break
		}
		p.explain(held, err, &said)
		if errors.Is(err, errNotDocker) {
			wait = time.Minute
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, retryLast)
	}
	return nil
}

// explain logs why there is no session, once for each reason.
func (p *Plugin) explain(held bool, err error, said *string) {
	text := fmt.Sprint(err)
	if text == *said {
		return
	}
	*said = text
	switch {
	case held:
		p.cfg.Log.Info("NRI connection to the Docker Engine ended: connecting again",
			zap.Error(err))
	case p.cfg.Expected:
		p.cfg.Log.Warn("cannot connect to NRI: new containers get nothing by it",
			zap.String("socket", p.cfg.Socket), zap.Error(err))
	case !errors.Is(err, fs.ErrNotExist):
		p.cfg.Log.Info("cannot connect to NRI", zap.String("socket", p.cfg.Socket),
			zap.Error(err))
	}
}

// session connects and serves as the plugin until the connection ends. held reports whether it has
// served.
func (p *Plugin) session(ctx context.Context) (held bool, err error) {
	socket, err := os.Stat(p.cfg.Socket)
	if err != nil {
		return false, err
	}
	engine, err := new(net.Dialer).DialContext(ctx, "unix", p.cfg.Socket)
	if err != nil {
		return false, err
	}
	conn, guard, err := p.startGuard(engine.(*net.UnixConn))
	engine.Close() // the guard has a copy
	if err != nil {
		return false, err
	}
	defer guard.Wait() //nolint:errcheck // it ends with the connection
	defer conn.Close()
	h := &handler{plugin: p}
	ended := make(chan struct{})
	s, err := stub.New(h,
		stub.WithPluginName("metad"),
		stub.WithPluginIdx("90"),
		stub.WithConnection(conn),
		stub.WithOnClose(sync.OnceFunc(func() { close(ended) })),
		stub.WithLogger(logger{p.cfg.Log.Sugar()}))
	if err != nil {
		return false, err
	}
	if err := s.Start(ctx); err != nil {
		return false, errors.Join(h.refusal, err)
	}
	defer p.connected.Store(false)
	stale := time.NewTicker(staleEvery)
	defer stale.Stop()
	for {
		select {
		case <-ended:
			return true, errors.New("connection closed")
		case <-stale.C:
			if now, err := os.Stat(p.cfg.Socket); err == nil &&
				!os.SameFile(socket, now) {
				s.Stop()
				return true, errors.New("the Engine has made a new socket")
			}
		case <-ctx.Done():
			p.cfg.Log.Info("disconnecting from the Docker Engine's NRI")
			s.Stop()
			return true, nil
		}
	}
}

// handler answers the Engine.
type handler struct {
	plugin  *Plugin
	refusal error
}

// Configure implements stub.ConfigureInterface.
func (h *handler) Configure(_ context.Context, _, runtime, version string) (api.EventMask, error) {
	if runtime != "docker" {
		h.refusal = fmt.Errorf("%s %s: %w", runtime, version, errNotDocker)
		return 0, h.refusal
	}
	return 0, nil
}

// Synchronize implements stub.SynchronizeInterface. It is the Engine's last call before it asks the
// plugin at every creation. No creation begins in between.
func (h *handler) Synchronize(context.Context, []*api.PodSandbox, []*api.Container) (
	[]*api.ContainerUpdate, error) {
	p := h.plugin
	p.connected.Store(true)
	p.first.Do(func() { close(p.ready) })
	p.cfg.Log.Info("connected to the Docker Engine's NRI",
		zap.String("socket", p.cfg.Socket))
	return nil, nil
}

// CreateContainer implements stub.CreateContainerInterface. It returns no error, because that would
// fail the creation.
func (h *handler) CreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) (
	*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	return h.plugin.adjust(ctx, inject.Container{
		ID:     c.GetId(),
		Name:   strings.TrimPrefix(c.GetName(), "/"),
		Labels: c.GetLabels(),
		Env:    c.GetEnv(),
	}), nil, nil
}

func (p *Plugin) adjust(ctx context.Context, c inject.Container) *api.ContainerAdjustment {
	plan := inject.Plan{URIs: p.inject.URIs(c)}
	if p.cfg.NoFiles == nil || !p.cfg.NoFiles() {
		// The Engine does not report whether the creation succeeds. The set of tasks shows
		// it, or the sweep.
		plan.Entry, plan.Err = p.files.File(ctx, c, mdfile.FormPrivate,
			func(e *mdfile.Entry) error { return e.Created(c.ID) })
	}
	log := p.cfg.Log.With(zap.String("container", c.Name))
	outcome := inject.Unchanged
	if len(plan.Env()) > 0 {
		outcome = inject.Changed
	}
	switch {
	case errors.Is(plan.Err, inject.ErrClaimed):
		log.Info("container gets no metadata file", zap.Error(plan.Err))
	case plan.Err != nil:
		outcome = inject.Without
		log.Warn("container is created without its metadata file", zap.Error(plan.Err))
	}
	p.inject.Count(inject.WayNRI, outcome)
	var a api.ContainerAdjustment
	for _, e := range plan.Env() {
		key, value, _ := strings.Cut(e, "=")
		a.AddEnv(key, value)
	}
	if e := plan.Entry; e != nil {
		a.AddMount(&api.Mount{Type: "bind", Source: e.HostDir, Destination: e.ContainerDir,
			Options: []string{"ro"}})
	}
	return &a
}

// logger is the library's, which says everything as if it were news.
type logger struct{ log *zap.SugaredLogger }

func (l logger) Debugf(_ context.Context, f string, args ...any) { l.log.Debugf(f, args...) }
func (l logger) Infof(_ context.Context, f string, args ...any)  { l.log.Debugf(f, args...) }
func (l logger) Warnf(_ context.Context, f string, args ...any)  { l.log.Debugf(f, args...) }
func (l logger) Errorf(_ context.Context, f string, args ...any) { l.log.Debugf(f, args...) }

// Listens reports whether there is a socket at path.
func Listens(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeSocket != 0
}
