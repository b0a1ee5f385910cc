// Package dockerproxy puts the metadata file and the endpoint's address into containers that anyone creates: a unix
// socket in front of the Docker Engine's that passes every request on as it is, except that the creation of a container
// gets a read-only bind mount of a directory on the host and environment variables added.
//
// Whatever goes wrong with that, the container is created: without, and with a warning in the log.
package dockerproxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
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

	// MaxBodyBytes is how long the body of a create request may be for a file to be added; what is
	// longer is passed on as it comes, of any length. 0: 4 MiB.
	MaxBodyBytes int64
}

// Validate names the first bad field.
func (c Config) Validate() error {
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
	// maxAnswer is how much of an answer of the Engine metad reads for itself: the list of some ten
	// thousand containers.
	maxAnswer = 64 << 20
	// askTimeout bounds metad's own questions to the Engine.
	askTimeout  = 2 * time.Second
	listTimeout = 30 * time.Second
	// sweepEvery is the time between two looks for directories that may have been left behind, and
	// two attempts to write what could not be written.
	sweepEvery = 30 * time.Second
	// drainTime is how long requests in flight may take when the proxy stops. What follows events
	// or logs never ends by itself.
	drainTime = 2 * time.Second
)

// Proxy is the proxy. All methods are safe for concurrent use.
type Proxy struct {
	cfg     Config
	files   *mdfile.Writer
	inject  *inject.Injector
	log     *zap.Logger
	engine  *http.Transport
	forward *httputil.ReverseProxy
	warn    limiter
	tick    <-chan time.Time // for sweep; nil: every sweepEvery

	mu          sync.Mutex // guards what follows
	selinux     bool       // what the Engine said
	nextSELinux time.Time  // when to ask it again; zero: now
}

// New returns a Proxy that puts in what i decides, and keeps its files with w.
func New(cfg Config, i *inject.Injector, w *mdfile.Writer, log *zap.Logger) (*Proxy, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Engine == "" {
		cfg.Engine = DefaultEngine
	}
	if cfg.MaxBodyBytes == 0 {
		cfg.MaxBodyBytes = defaultMaxBody
	}
	p := &Proxy{cfg: cfg, files: w, log: log, warn: limiter{now: time.Now}, inject: i}
	p.engine = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", cfg.Engine)
		},
		DisableCompression:  true, // bodies pass as they are
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     time.Minute,
	}
	p.forward = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", engineHost
			r.Out.URL.RawQuery = r.In.URL.RawQuery // unparsed
			r.Out.Host = r.In.Host
		},
		// What has no length (logs, events, progress) it flushes as it comes.
		Transport:    roundTripper(p.roundTrip),
		ErrorLog:     stdlog.New(io.Discard, "", 0), // clients that leave
		ErrorHandler: p.fail,
	}
	return p, nil
}

// engineHost is the host in URLs for the Engine; the transport does not look at it.
const engineHost = "docker"

// Serve answers on l, and closes it, until ctx is done, and meanwhile removes directories that were
// left behind. Requests that are then in flight are given two seconds. It returns nil after ctx is done.
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
	p.engine.CloseIdleConnections()
	return err
}

// sweepLoop makes up for what went wrong earlier.
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

// sweep tells the writer which containers there are. Without an answer of the Engine, nothing.
func (p *Proxy) sweep(ctx context.Context) {
	var list []struct {
		ID     string // "Id"
		Mounts []struct{ Source string }
	}
	asked := time.Now()
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	if err := p.ask(ctx, "/containers/json?all=1", &list); err != nil {
		return
	}
	containers := make([]mdfile.Mounted, 0, len(list))
	for _, c := range list {
		m := mdfile.Mounted{ID: c.ID}
		for _, source := range c.Mounts {
			m.Sources = append(m.Sources, source.Source)
		}
		containers = append(containers, m)
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
	body, _ := json.Marshal(map[string]string{"message": "metad: pass on to the Docker Engine: " + err.Error()})
	_, _ = w.Write(append(body, '\n'))
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func (p *Proxy) roundTrip(r *http.Request) (*http.Response, error) {
	if c, ok := r.Context().Value(createKey{}).(*create); ok {
		return p.create(r, c)
	}
	return p.engine.RoundTrip(r)
}

// createKey is the context key of a *create.
type createKey struct{}

// create is a creation that something is put into.
type create struct {
	entry    *mdfile.Entry // nil: no file
	log      *zap.Logger
	original []byte // bodies
	edited   []byte
	settled  bool // entry knows what became of the container
}

func (c *create) release() {
	if !c.settled && c.entry != nil {
		c.entry.Unsure()
	}
}

// prepare makes the directory and the new body of a create request. It returns nil if the request is
// to be passed on as it is; r's body can then still be read from its beginning.
func (p *Proxy) prepare(r *http.Request) *create {
	var read bytes.Buffer
	n, err := io.Copy(&read, io.LimitReader(r.Body, p.cfg.MaxBodyBytes+1))
	raw := read.Bytes()
	rest := r.Body
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(raw), rest), rest}
	if err != nil {
		return nil // the Engine will see the same error
	}
	name := strings.TrimPrefix(r.URL.Query().Get("name"), "/")
	log := p.log.With(zap.String("container", name))
	file, uris := p.inject.Defaults()
	anything := file || uris
	if n > p.cfg.MaxBodyBytes {
		if anything {
			p.without(log, fmt.Errorf("body of more than %d bytes", p.cfg.MaxBodyBytes))
		}
		return nil
	}
	body, err := parseCreate(raw)
	if err != nil {
		if anything {
			p.without(log, err)
		}
		return nil
	}
	c := inject.Container{Name: name, Image: body.image, Labels: body.labels, Env: body.env,
		Mounts: func() []inject.Mount { return p.mounts(r.Context(), body) }}
	plan := p.inject.Plan(c, p.files.Layout().Form)
	switch {
	case errors.Is(plan.Err, inject.ErrClaimed):
		log.Info("container gets no metadata file", zap.Error(plan.Err))
	case plan.Err != nil:
		p.without(log, plan.Err)
	}
	add := additions{env: plan.Env(), ownMount: p.inject.OwnMount}
	if len(add.env) == 0 {
		return nil
	}
	add.ownVariable = func(e string) bool { return p.inject.Own(e, body.mounts, add.env) }
	if e := plan.Entry; e != nil {
		add.bind = e.HostDir + ":" + e.ContainerDir + ":ro" + p.relabel(r.Context())
	}
	return &create{entry: plan.Entry, log: log, original: raw, edited: body.with(add)}
}

// without says that a container does not get what it should have.
func (p *Proxy) without(log *zap.Logger, err error) {
	if ok, held := p.warn.allow(); ok {
		log.Warn("container is created without its metadata file", zap.Error(err), zap.Int("held_back", held))
	}
}

// mounts returns where in the container something is mounted: what the body says and what other containers bring.
func (p *Proxy) mounts(ctx context.Context, body *createBody) []inject.Mount {
	all := slices.Clone(body.mounts)
	for _, from := range body.volumesFrom {
		id, _, _ := strings.Cut(from, ":")
		all = append(all, p.mountsOf(ctx, id)...)
	}
	return all
}

// mountsOf returns the mounts of the container called id, but for the directories of metadata files. Nothing if
// the Engine does not say: it will then not create a container with that container's volumes either.
func (p *Proxy) mountsOf(ctx context.Context, id string) (mounts []inject.Mount) {
	var inspect struct {
		Mounts []struct{ Source, Destination string }
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := p.ask(ctx, "/containers/"+url.PathEscape(id)+"/json", &inspect); err != nil {
		return nil
	}
	root := p.files.Layout().Root()
	for _, m := range inspect.Mounts {
		if source := path.Clean(m.Source); source != root && !strings.HasPrefix(source, root+"/") {
			mounts = append(mounts, inject.Mount{Source: m.Source, Target: path.Clean(m.Destination)})
		}
	}
	return mounts
}

// ask gets path from the Engine into answer.
func (p *Proxy) ask(ctx context.Context, path string, answer any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+engineHost+path, nil)
	if err != nil {
		return err
	}
	resp, err := p.engine.RoundTrip(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the Docker Engine: %s", resp.Status)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(answer)
}

// relabel returns the bind option that makes SELinux let the container read, "" if there is no
// SELinux. The agent's is Z; where containers are to share their files (--volumes-from), that would
// take the directory away from its owner.
func (p *Proxy) relabel(ctx context.Context) string {
	on := p.cfg.SELinux == SELinuxOn
	if p.cfg.SELinux == SELinuxAuto || p.cfg.SELinux == "" {
		on = p.engineSELinux(ctx)
	}
	switch {
	case !on:
		return ""
	case p.files.Layout().Form == mdfile.FormAgent:
		return ",Z"
	}
	return ",z"
}

// engineSELinux reports whether the Engine runs with SELinux. What it says holds for ten minutes; if it
// does not say in time, it is left alone for a minute, because creations wait here.
func (p *Proxy) engineSELinux(ctx context.Context) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Now().Before(p.nextSELinux) {
		return p.selinux
	}
	var info struct{ SecurityOptions []string }
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := p.ask(ctx, "/info", &info); err != nil {
		p.nextSELinux = time.Now().Add(time.Minute)
		return p.selinux
	}
	p.nextSELinux = time.Now().Add(10 * time.Minute)
	p.selinux = slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return o == "selinux" || o == "name=selinux" || strings.HasPrefix(o, "name=selinux,")
	})
	return p.selinux
}

// create sends the edited body and, if the Engine does not want it, the original one.
func (p *Proxy) create(r *http.Request, c *create) (*http.Response, error) {
	resp, err := p.send(r, c.edited)
	if err != nil {
		return nil, err
	}
	answer, err := readAll(resp)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusCreated {
		c.settled = true
		if c.entry == nil {
			return resp, nil
		}
		var created struct{ ID string } // "Id"
		if err := json.Unmarshal(answer, &created); err != nil || created.ID == "" {
			c.entry.Unsure() // Apply will find the container by its mount
		} else if err := c.entry.Created(created.ID); err != nil {
			if ok, held := p.warn.allow(); ok {
				c.log.Warn("metadata file not written at creation", zap.String("dir", c.entry.HostDir), zap.Error(err), zap.Int("held_back", held))
			}
		}
		return resp, nil
	}

	c.settled = true
	if c.entry != nil {
		c.entry.Abandon()
	}
	switch resp.StatusCode {
	case http.StatusNotFound, http.StatusConflict:
		return resp, nil // no such image, name in use: nothing of ours
	}
	// It may be the mount: a plug-in forbids it, or the Engine cannot see the directory.
	if resp, err = p.send(r, c.original); err == nil && resp.StatusCode == http.StatusCreated {
		p.without(c.log, fmt.Errorf("the Docker Engine refuses it with what metad adds: %.500s", bytes.TrimSpace(answer)))
	}
	return resp, err
}

// send sends r with another body.
func (p *Proxy) send(r *http.Request, body []byte) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Body = io.NopCloser(bytes.NewReader(body))
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	r.ContentLength = int64(len(body))
	r.TransferEncoding = nil
	return p.engine.RoundTrip(r)
}

// readAll returns the body of resp, which can be read again afterwards.
func readAll(resp *http.Response) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(b))
	resp.ContentLength = int64(len(b))
	resp.TransferEncoding = nil
	return b, err
}

// limiter lets ten warnings through in ten seconds and counts the others.
type limiter struct {
	now func() time.Time

	mu    sync.Mutex // guards what follows
	since time.Time
	n     int
	held  int
}

// allow reports whether to log, and if so how many were held back since the last time.
func (l *limiter) allow() (ok bool, held int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.now(); now.Sub(l.since) > 10*time.Second {
		l.since, l.n = now, 0
	}
	if l.n++; l.n > 10 {
		l.held++
		return false, 0
	}
	held, l.held = l.held, 0
	return true, held
}
