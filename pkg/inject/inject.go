// Package inject decides what metad puts into a container that is being created: the endpoint's
// address as two environment variables, and the metadata file as a variable and a read-only mount.
// It is the same whichever way metad gets to the creation: the Docker API proxy, or NRI.
package inject

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"metad/pkg/mdfile"
	"metad/pkg/task"
)

// The labels that turn either on or off for one container: "true" or "false", or what else
// strconv.ParseBool takes. They win over Config.
const (
	LabelFile = "metad.container-metadata"
	LabelURIs = "metad.metadata-uris"
)

// ErrClaimed is why a container gets no file: it has something of its own where the file would be.
var ErrClaimed = errors.New("the container's own")

// internalPrefix begins the names of the containers that the ECS agent adds to a task: pause, empty
// volume, relay. The agent gives them nothing.
const internalPrefix = "~internal~ecs"

// Config says what containers without a label get.
type Config struct {
	File bool
	URIs bool

	// Identify returns the task of a container that is about to be created, from its labels and
	// name (without slash; "" if the Engine is to choose one), and the container with the name
	// it has in the task. A nil task or function: the container is a task of its own. The
	// labels of the ECS agent need no Identify.
	Identify func(labels map[string]string, name string) (*task.Task, *task.Container)
}

// Container is a container that is being created, as far as it is known.
type Container struct {
	ID     string // "": the Engine has not chosen one yet
	Name   string // without slash; "": the same
	Image  string
	Labels map[string]string
	Env    []string // KEY=value, or KEY to unset it

	// Mounts returns what is mounted into it, other containers' volumes included. It is called
	// only for a container that is to have a file. Nil: nobody knows.
	Mounts func() []Mount
}

// Mount is a mount that the container comes with.
type Mount struct {
	Source string // on the host; "" for a volume
	Target string // in the container, a clean path
}

// Plan is what a container gets. What it holds of an earlier creation (Injector.Own,
// Injector.OwnMount) is to be taken out.
type Plan struct {
	URIs  []string      // KEY=value, both or none
	Entry *mdfile.Entry // the file's directory, reserved; nil: no file
	Err   error         // why there is no file where there should be one
}

// Env returns all variables, as KEY=value.
func (p Plan) Env() []string {
	if p.Entry == nil {
		return p.URIs
	}
	return append(slices.Clip(p.URIs), mdfile.EnvVar+"="+p.Entry.File)
}

// Injector makes plans. All methods are safe for concurrent use.
type Injector struct {
	cfg   Config
	files *mdfile.Writer

	creations [2][outcomes]atomic.Uint64
}

// New returns an Injector that reserves its files with w.
func New(cfg Config, w *mdfile.Writer) *Injector { return &Injector{cfg: cfg, files: w} }

// Defaults reports what containers without a label get.
func (i *Injector) Defaults() (file, uris bool) { return i.cfg.File, i.cfg.URIs }

// Wants reports what a container with these labels is to get.
func (i *Injector) Wants(labels map[string]string) (file, uris bool) {
	if strings.HasPrefix(labels[task.LabelContainerName], internalPrefix) {
		return false, false
	}
	wants := func(label string, otherwise bool) bool {
		on, err := strconv.ParseBool(labels[label])
		if err != nil {
			return otherwise
		}
		return on
	}
	return wants(LabelFile, i.cfg.File), wants(LabelURIs, i.cfg.URIs)
}

// URIs returns the two variables for c, nil if it is to have none or has one of its own.
func (i *Injector) URIs(c Container) []string {
	if _, on := i.Wants(c.Labels); !on {
		return nil
	}
	for _, e := range c.Env {
		key, value, _ := strings.Cut(e, "=")
		if (key == EnvURI || key == EnvURIV4) && (!ownURI(value) || madeFor(value, c.ID)) {
			return nil
		}
	}
	id := token(c.ID)
	if t, _ := i.identify(c); isToken(t.ID) {
		id = t.ID + "-" + id
	}
	return []string{EnvURI + "=" + uriV3 + id, EnvURIV4 + "=" + uriV4 + id}
}

// File reserves the directory of c's file, at form's place in the container. The error is
// ErrClaimed or the disk's. A container that is to have none gets nil and nil.
func (i *Injector) File(c Container, form mdfile.Form) (*mdfile.Entry, error) {
	if on, _ := i.Wants(c.Labels); !on {
		return nil, nil
	}
	if why := i.claimed(c, form); why != "" {
		return nil, fmt.Errorf("%w: %s", ErrClaimed, why)
	}
	t, ctr := i.identify(c)
	return i.files.Reserve(t, ctr, form, token(c.ID))
}

// Bounded makes files for creations that cannot wait for a disk. All methods are safe for
// concurrent use.
type Bounded struct {
	inject *Injector
	within time.Duration
	late   atomic.Int32 // calls that still go on after that time
}

// errSlow: the data directory took longer than there was time.
var errSlow = errors.New("the data directory is slow")

// Within returns what makes files within t, each user its own.
func (i *Injector) Within(t time.Duration) *Bounded { return &Bounded{inject: i, within: t} }

// Late returns how many files are still in the making after their time.
func (b *Bounded) Late() int { return int(b.late.Load()) }

// File is Injector.File within the time; created, if set, is called with the entry before the time
// is up. After it, or when ctx ends, there is no file, and what comes too late is taken back. Until
// it has come there is none for anyone, at once.
func (b *Bounded) File(ctx context.Context, c Container, form mdfile.Form,
	created func(*mdfile.Entry) error) (*mdfile.Entry, error) {
	if b.Late() > 0 {
		return nil, errors.New("the data directory hangs")
	}
	ctx, cancel := context.WithTimeout(ctx, b.within)
	defer cancel()
	r, ok := wait(ctx, b, func() (r reserved) {
		r.entry, r.err = b.inject.File(c, form)
		if r.entry != nil && created != nil {
			r.err = created(r.entry)
		}
		return r
	}, func(r reserved) {
		if r.entry != nil {
			r.entry.Abandon()
		}
	})
	if !ok {
		return nil, errSlow
	}
	return r.entry, r.err
}

type reserved struct {
	entry *mdfile.Entry
	err   error
}

// Settle calls f, which tells an entry what became of its container, and returns f's error. f goes
// on by itself if it takes longer than the time.
func (b *Bounded) Settle(f func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), b.within)
	defer cancel()
	if err, ok := wait(ctx, b, f, func(error) {}); ok {
		return err
	}
	return errSlow
}

// wait returns what f does, and true, unless ctx ends before f does. late then gets it.
func wait[T any](ctx context.Context, b *Bounded, f func() T, late func(T)) (r T, ok bool) {
	done := make(chan T, 1)
	go func() { done <- f() }()
	select {
	case r = <-done:
		return r, true
	case <-ctx.Done():
	}
	b.late.Add(1)
	go func() {
		late(<-done)
		b.late.Add(-1)
	}()
	return r, false
}

// claimed says what of the container's own is in the way of the file, "" if nothing is.
func (i *Injector) claimed(c Container, form mdfile.Form) string {
	var mounts []Mount
	if c.Mounts != nil {
		mounts = c.Mounts()
	}
	for _, e := range c.Env {
		key, value, set := strings.Cut(e, "=")
		if key == mdfile.EnvVar && (!set || !i.ownFile(value, mounts) ||
			madeFor(value, c.ID)) {
			return "it sets " + mdfile.EnvVar
		}
	}
	base := i.files.Layout().In(form).Base()
	for _, m := range mounts {
		if !i.OwnMount(m) && (within(m.Target, base) || within(base, m.Target)) {
			return "it mounts " + m.Target
		}
	}
	return ""
}

// identify returns what is known of the container and its task before it is created.
func (i *Injector) identify(c Container) (*task.Task, *task.Container) {
	t, ctr := new(task.Task), new(task.Container)
	if arn := c.Labels[task.LabelTaskARN]; arn != "" {
		*t = task.Task{
			ARN:      arn,
			ID:       arn[strings.LastIndexByte(arn, '/')+1:],
			Cluster:  c.Labels[task.LabelCluster],
			Family:   c.Labels[task.LabelFamily],
			Revision: c.Labels[task.LabelRevision],
		}
		ctr.Name = c.Labels[task.LabelContainerName]
	} else if i.cfg.Identify != nil {
		if it, ic := i.cfg.Identify(c.Labels, c.Name); it != nil && ic != nil {
			t, *ctr = it, *ic
		}
	}
	if t.ID == "" && len(c.ID) >= tokenLen {
		t.ID = c.ID[:tokenLen] // the id of a task of one
	}
	if ctr.Name == "" {
		ctr.Name = c.Name
	}
	ctr.DockerName, ctr.Image, ctr.State = c.Name, c.Image, "created"
	return t, ctr
}

// within reports whether the clean path p is dir or beneath it.
func within(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}
