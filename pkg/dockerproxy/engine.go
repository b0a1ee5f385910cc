package dockerproxy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
)

// engineHost is the host in URLs for the Engine; the transport does not look at it.
const engineHost = "docker"

const (
	// maxAnswer is how much of an answer of the Engine metad reads for itself: the list of some
	// ten thousand containers.
	maxAnswer = 64 << 20
	// askTimeout bounds metad's own questions to the Engine.
	askTimeout  = 2 * time.Second
	listTimeout = 30 * time.Second
)

// engine is the Docker Engine behind the proxy: the way to it, and what it has said about itself.
// Its methods are safe for concurrent use.
type engine struct {
	transport *http.Transport

	mu          sync.Mutex // guards what follows
	selinux     bool       // what the Engine said
	nextSELinux time.Time  // when to ask it again; zero: now
}

// newEngine returns the Engine that listens on the unix socket.
func newEngine(socket string) *engine {
	return &engine{transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableCompression:  true, // bodies pass as they are
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     time.Minute,
	}}
}

// dial returns a new connection to the Engine.
func (e *engine) dial(ctx context.Context) (net.Conn, error) {
	return e.transport.DialContext(ctx, "", "")
}

// ask gets path from the Engine into answer.
func (e *engine) ask(ctx context.Context, path string, answer any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+engineHost+path, nil)
	if err != nil {
		return err
	}
	resp, err := e.transport.RoundTrip(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the Docker Engine: %s", resp.Status)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(answer)
}

// containers returns all containers with the sources of their mounts.
func (e *engine) containers(ctx context.Context) ([]mdfile.Mounted, error) {
	var list []struct {
		ID     string // "Id"
		Mounts []struct{ Source string }
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	if err := e.ask(ctx, "/containers/json?all=1", &list); err != nil {
		return nil, err
	}
	containers := make([]mdfile.Mounted, 0, len(list))
	for _, c := range list {
		m := mdfile.Mounted{ID: c.ID}
		for _, source := range c.Mounts {
			m.Sources = append(m.Sources, source.Source)
		}
		containers = append(containers, m)
	}
	return containers, nil
}

// mounts returns the mounts of the container called id. Nothing if the Engine does not say: it will
// then not create a container with that container's volumes either.
func (e *engine) mounts(ctx context.Context, id string) []inject.Mount {
	var inspect struct {
		Mounts []struct{ Source, Destination string }
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := e.ask(ctx, "/containers/"+url.PathEscape(id)+"/json", &inspect); err != nil {
		return nil
	}
	mounts := make([]inject.Mount, 0, len(inspect.Mounts))
	for _, m := range inspect.Mounts {
		mounts = append(mounts, inject.Mount{Source: m.Source,
			Target: path.Clean(m.Destination)})
	}
	return mounts
}

// hasSELinux reports whether the Engine runs with SELinux. Its answer holds for ten minutes. If it
// does not answer in time it is left alone for a minute, because creations wait here.
func (e *engine) hasSELinux(ctx context.Context) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if time.Now().Before(e.nextSELinux) {
		return e.selinux
	}
	var info struct{ SecurityOptions []string }
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := e.ask(ctx, "/info", &info); err != nil {
		e.nextSELinux = time.Now().Add(time.Minute)
		return e.selinux
	}
	e.nextSELinux = time.Now().Add(10 * time.Minute)
	e.selinux = slices.ContainsFunc(info.SecurityOptions, func(o string) bool {
		return o == "selinux" || o == "name=selinux" ||
			strings.HasPrefix(o, "name=selinux,")
	})
	return e.selinux
}
