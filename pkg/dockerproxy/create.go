package dockerproxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
)

// fileTime is how long a creation waits for the data directory, before the Engine is asked and
// after.
const fileTime = 2 * time.Second

// createKey is the context key of a *create.
type createKey struct{}

// create is a creation that something is put into.
type create struct {
	entry    *mdfile.Entry // nil: no file
	bounded  *inject.Bounded
	log      *zap.Logger
	original []byte // bodies
	edited   []byte
	settled  bool // entry knows what became of the container
	lacking  bool // what it should have had besides: counted already
}

func (c *create) release() {
	if !c.settled {
		_ = c.settle(func(e *mdfile.Entry) error { e.Unsure(); return nil })
	}
}

// settle has f tell the entry, if there is one, what became of the container. A client gets the
// Engine's answer also when the data directory hangs.
func (c *create) settle(f func(*mdfile.Entry) error) error {
	c.settled = true
	if c.entry == nil {
		return nil
	}
	return c.bounded.Settle(func() error { return f(c.entry) })
}

// prepare makes the directory and the new body of a create request. It returns nil if the request
// passes as it is; r's body can then still be read from its beginning.
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
		if !anything {
			p.inject.Count(inject.WayProxy, inject.Unchanged)
		} else {
			p.without(log, fmt.Errorf("body of more than %d bytes", p.cfg.MaxBodyBytes))
		}
		return nil
	}
	body, err := parseCreate(raw)
	if err != nil {
		if !anything {
			p.inject.Count(inject.WayProxy, inject.Unchanged)
		} else {
			p.without(log, err)
		}
		return nil
	}
	c := inject.Container{Name: name, Image: body.image, Labels: body.labels, Env: body.env,
		Mounts: func() []inject.Mount { return p.mounts(r.Context(), body) }}
	plan := inject.Plan{URIs: p.inject.URIs(c)}
	plan.Entry, plan.Err = p.bounded.File(r.Context(), c, p.files.Layout().Form, nil)
	lacking := false
	switch {
	case errors.Is(plan.Err, inject.ErrClaimed):
		log.Info("container gets no metadata file", zap.Error(plan.Err))
	case plan.Err != nil:
		p.without(log, plan.Err)
		lacking = true
	}
	add := additions{env: plan.Env(), ownMount: p.inject.OwnMount}
	if len(add.env) == 0 {
		if !lacking {
			p.inject.Count(inject.WayProxy, inject.Unchanged)
		}
		return nil
	}
	add.ownVariable = func(e string) bool { return p.inject.Own(e, body.mounts, add.env) }
	if e := plan.Entry; e != nil {
		add.bind = e.HostDir + ":" + e.ContainerDir + ":ro" + p.relabel(r.Context())
	}
	return &create{entry: plan.Entry, bounded: p.bounded, lacking: lacking, log: log,
		original: raw,
		edited:   body.with(add)}
}

// without counts and logs a container that is created without its metadata file.
func (p *Proxy) without(log *zap.Logger, err error) {
	p.inject.Count(inject.WayProxy, inject.Without)
	if ok, held := p.warn.allow(); ok {
		log.Warn("container is created without its metadata file", zap.Error(err),
			zap.Int("held_back", held))
	}
}

// mounts returns the mounts that the container will have, including those of --volumes-from. Of the
// latter, it leaves out the directories of metadata files.
func (p *Proxy) mounts(ctx context.Context, body *createBody) []inject.Mount {
	all := slices.Clone(body.mounts)
	root := p.files.Layout().Root()
	for _, from := range body.volumesFrom {
		id, _, _ := strings.Cut(from, ":")
		for _, m := range p.engine.mounts(ctx, id) {
			if source := path.Clean(m.Source); source != root &&
				!strings.HasPrefix(source, root+"/") {
				all = append(all, m)
			}
		}
	}
	return all
}

// relabel returns the bind option with which SELinux lets the container read, or "" without
// SELinux. The agent uses Z. With Z, a second container that mounts the directory (--volumes-from)
// would take it away from its owner.
func (p *Proxy) relabel(ctx context.Context) string {
	on := p.cfg.SELinux == SELinuxOn
	if p.cfg.SELinux == SELinuxAuto || p.cfg.SELinux == "" {
		on = p.engine.hasSELinux(ctx)
	}
	switch {
	case !on:
		return ""
	case p.files.Layout().Form == mdfile.FormAgent:
		return ",Z"
	}
	return ",z"
}

// create sends the edited body and, if the Engine refuses it, the original one.
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
		if !c.lacking {
			p.inject.Count(inject.WayProxy, inject.Changed)
		}
		var created struct{ ID string } // "Id"
		if err := json.Unmarshal(answer, &created); err != nil || created.ID == "" {
			return resp, nil // Apply will find the container by its mount
		}
		if err := c.settle(func(e *mdfile.Entry) error {
			return e.Created(created.ID)
		}); err != nil {
			if ok, held := p.warn.allow(); ok {
				c.log.Warn("metadata file not written at creation",
					zap.String("dir", c.entry.HostDir), zap.Error(err),
					zap.Int("held_back", held))
			}
		}
		return resp, nil
	}

	_ = c.settle(func(e *mdfile.Entry) error { e.Abandon(); return nil })
	switch resp.StatusCode {
	case http.StatusNotFound, http.StatusConflict:
		p.inject.Count(inject.WayProxy, inject.Refused)
		return resp, nil // no such image, name in use: nothing of ours
	}
	// The mount may be the cause: a plug-in forbids it, or the Engine cannot see the directory.
	if resp, err = p.send(r, c.original); err == nil && resp.StatusCode == http.StatusCreated {
		p.without(c.log,
			fmt.Errorf("the Docker Engine refuses it with what metad adds: %.500s",
				bytes.TrimSpace(answer)))
	} else {
		p.inject.Count(inject.WayProxy, inject.Refused)
	}
	return resp, err
}

// send sends r with another body.
func (p *Proxy) send(r *http.Request, body []byte) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Body = io.NopCloser(bytes.NewReader(body))
	r.GetBody = func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(body)), nil
	}
	r.ContentLength = int64(len(body))
	r.TransferEncoding = nil
	return p.engine.transport.RoundTrip(r)
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
