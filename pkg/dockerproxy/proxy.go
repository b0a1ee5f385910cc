// Package dockerproxy puts the metadata file and the endpoint's address into containers that anyone
// creates: a unix socket in front of the Docker Engine's that passes every request on as it is,
// except that the creation of a container gets a read-only bind mount of a directory on the host
// and environment variables added.
//
// Whatever goes wrong with that, the container is created: without, and with a warning in the log.
package dockerproxy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/http/httputil"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"go.uber.org/zap"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
)

// Places of the sockets.
const (
	DefaultSocket = "/run/metad/docker.sock"
	DefaultEngine = "/var/run/docker.sock"
)

// SELinux says whether binds get a relabelling option.
type SELinux string

// SELinux settings.
const (
	SELinuxAuto SELinux = "auto" // if the Engine reports it, as "selinux" or "name=selinux"
	SELinuxOn   SELinux = "on"   // ECS_SELINUX_CAPABLE=true
	SELinuxOff  SELinux = "off"
)

// Config says what the proxy does. The zero value is valid: it passes everything on and adds to
// containers what they ask for by their labels.
type Config struct {
	Engine  string  // path of the Engine's unix socket; "": DefaultEngine
	SELinux SELinux // "": SELinuxAuto

	// MaxBodyBytes is how long the body of a create request may be for anything to be added. A
	// longer body, of any length, is passed on as it comes. 0: 4 MiB.
	MaxBodyBytes int64
}

// validate names the first bad field.
func (c Config) validate() error {
	if c.Engine != "" && !filepath.IsAbs(c.Engine) {
		return fmt.Errorf("Engine %q: not an absolute path of a unix socket", c.Engine)
	}
	if c.MaxBodyBytes < 0 {
		return fmt.Errorf("MaxBodyBytes %d: negative", c.MaxBodyBytes)
	}
	switch c.SELinux {
	case "", SELinuxAuto, SELinuxOn, SELinuxOff:
		return nil
	}
	return fmt.Errorf("SELinux %q: want auto, on or off", c.SELinux)
}

const (
	defaultMaxBody = 4 << 20
	// sweepEvery is the time between two searches for directories that were left behind, and
	// between two attempts to write a file that could not be written.
	sweepEvery = 30 * time.Second
	// drainTime is how long requests in flight may take when the proxy stops. A request that
	// follows events or logs never ends by itself.
	drainTime = 2 * time.Second
)

// Proxy is the proxy. All methods are safe for concurrent use.
type Proxy struct {
	cfg     Config
	files   *mdfile.Writer
	inject  *inject.Injector
	bounded *inject.Bounded
	log     *zap.Logger
	engine  *engine
	forward *httputil.ReverseProxy
	warn    limiter
	tick    <-chan time.Time // for sweep; nil: every sweepEvery
}

// New returns a Proxy that puts in what i decides, and keeps its files with w.
func New(cfg Config, i *inject.Injector, w *mdfile.Writer, log *zap.Logger) (*Proxy, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Engine == "" {
		cfg.Engine = DefaultEngine
	}
	if cfg.MaxBodyBytes == 0 {
		cfg.MaxBodyBytes = defaultMaxBody
	}
	p := &Proxy{cfg: cfg, files: w, inject: i, bounded: i.Within(fileTime), log: log,
		engine: newEngine(cfg.Engine)}
	p.warn.now = time.Now
	p.forward = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", engineHost
			r.Out.URL.RawQuery = r.In.URL.RawQuery // unparsed
			r.Out.Host = r.In.Host
		},
		// ReverseProxy flushes an answer without a length (logs, events, progress) as it
		// comes.
		Transport:    roundTripper(p.roundTrip),
		ErrorLog:     stdlog.New(io.Discard, "", 0), // clients that leave
		ErrorHandler: p.fail,
	}
	return p, nil
}

// Serve answers on l until ctx is done, and then closes l. Meanwhile it removes directories that
// were left behind. Requests in flight at the end have two seconds. It returns nil after ctx is
// done.
func (p *Proxy) Serve(ctx context.Context, l net.Listener) error {
	s := &http.Server{
		Handler:           p,
		ReadHeaderTimeout: 5 * time.Minute, // as the Engine's
		ErrorLog:          stdlog.New(io.Discard, "", 0),
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		if s.Shutdown(drain) != nil {
			_ = s.Close()
		}
	})
	var sweeper sync.WaitGroup
	sweepCtx, stopSweep := context.WithCancel(ctx)
	sweeper.Go(func() { p.sweepLoop(sweepCtx) })
	err := s.Serve(l)
	if !stop() {
		<-done
		err = nil
	}
	stopSweep()
	sweeper.Wait()
	p.engine.transport.CloseIdleConnections()
	return err
}

// sweepLoop repeats what went wrong earlier: writing a file, and removing a directory.
func (p *Proxy) sweepLoop(ctx context.Context) {
	tick := p.tick
	if tick == nil {
		t := time.NewTicker(sweepEvery)
		defer t.Stop()
		tick = t.C
	}
	for {
		p.files.Retry()
		if p.files.InDoubt() {
			p.sweep(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
	}
}

// sweep tells the writer which containers exist. It does nothing if the Engine does not answer.
func (p *Proxy) sweep(ctx context.Context) {
	asked := time.Now()
	containers, err := p.engine.containers(ctx)
	if err != nil {
		return
	}
	p.files.Sweep(asked, containers)
}

// createPath is the one request that is changed.
var createPath = regexp.MustCompile(`^(/v[0-9.]+)?/containers/create$`)

// ServeHTTP passes r on to the Engine.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if archivePath.MatchString(r.URL.Path) && r.Method != http.MethodHead {
		p.tunnel(w, r)
		return
	}
	// The server must not add what the Engine does not send.
	w.Header()["Content-Type"] = nil
	w.Header()["Date"] = nil
	if r.Method == http.MethodPost && createPath.MatchString(r.URL.Path) {
		if c := p.prepare(r); c != nil {
			defer c.release()
			r = r.WithContext(context.WithValue(r.Context(), createKey{}, c))
		}
	} else if r.ContentLength != 0 {
		// An answer may begin before the request has ended.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	p.forward.ServeHTTP(w, r)
}

func (p *Proxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		return // the client is gone
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadGateway)
	body, _ := json.Marshal(
		map[string]string{"message": "metad: pass on to the Docker Engine: " + err.Error()})
	_, _ = w.Write(append(body, '\n'))
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (p *Proxy) roundTrip(r *http.Request) (*http.Response, error) {
	if c, ok := r.Context().Value(createKey{}).(*create); ok {
		return p.create(r, c)
	}
	return p.engine.transport.RoundTrip(r)
}
