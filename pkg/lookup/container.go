package lookup

import (
	"slices"
	"strings"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// holder is the container that an endpoint id names.
type holder struct {
	view      *View
	container *ContainerView
}

// Endpoint returns the container whose endpoint id is id, the last part of its
// ECS_CONTAINER_METADATA_URI(_V4), and its task; nil, nil if no container has it, the one that had it has
// stopped, or two have it. It takes no lock and does not allocate.
func (t *Table) Endpoint(id []byte) (*View, *ContainerView) {
	h := t.snap.Load().byEndpoint[string(id)]
	return h.view, h.container
}

// EndpointConflicts returns how often an endpoint id began to be held by two containers at once.
func (t *Table) EndpointConflicts() uint64 { return t.endpointConflicts.Load() }

// complete adds to next, whose views are those of all tasks, what comes of all of them together. A view that old has
// too is complete, unless somebody uses the network of another task's container, or did so before.
func (t *Table) complete(old, next *snapshot) {
	before := t.joined
	t.joined = false
	for _, v := range next.byTag {
		t.joined = t.joined || v.joined
	}
	var g guests
	if before || t.joined {
		g = guestsOf(next.byTag)
	}
	for tag, v := range next.byTag {
		own := g
		if own == nil {
			if old.byTag[tag] == v {
				continue
			}
			own = guestsOf(map[uint32]*View{tag: v})
		}
		next.byTag[tag] = v.withAskers(own)
		for _, ep := range v.Task.Endpoints {
			if e, ok := next.byAddr[ep.Addr]; ok && e.view == v {
				next.byAddr[ep.Addr] = entry{e.ep, next.byTag[tag]}
			}
		}
	}
	t.indexEndpoints(next)
}

// indexEndpoints fills next's index of endpoint ids. An environment that was copied with its id names two
// containers: the id is then neither's.
func (t *Table) indexEndpoints(next *snapshot) {
	next.byEndpoint = make(map[string]holder, len(t.snap.Load().byEndpoint))
	refused := map[string]bool{}
	for _, v := range next.byTag {
		for i := range v.Containers {
			c := &v.Containers[i]
			if c.EndpointID == "" || c.ID == "" || c.KnownStatus == task.StatusStopped {
				continue
			}
			if _, held := next.byEndpoint[c.EndpointID]; held {
				refused[c.EndpointID] = true
			}
			next.byEndpoint[c.EndpointID] = holder{v, c}
		}
	}
	for id := range refused {
		c := next.byEndpoint[id].container
		delete(next.byEndpoint, id)
		if !t.copied[id] {
			t.log.Warn("endpoint id held by two containers: given to neither", zap.String("container", c.ID))
			t.endpointConflicts.Add(1)
		}
	}
	t.copied = refused
}

// guests are the containers that use another container's network namespace and have not stopped, by what
// Docker names the other one by.
type guests map[string][]holder

func guestsOf(views map[uint32]*View) guests {
	g := guests{}
	for _, v := range views {
		for i := range v.Containers {
			c := &v.Containers[i]
			if of, ok := strings.CutPrefix(c.NetworkMode, "container:"); ok && c.KnownStatus != task.StatusStopped {
				g[of] = append(g[of], holder{v, c})
			}
		}
	}
	return g
}

// maxDepth is how long a chain of guests of guests is followed.
const maxDepth = 4

// joins reports whether a container of v uses the network of a container that is not the task's.
func (v *View) joins() bool {
	for i := range v.Containers {
		of, ok := strings.CutPrefix(v.Containers[i].NetworkMode, "container:")
		if ok && !slices.ContainsFunc(v.Containers, func(c ContainerView) bool {
			return c.ID == of || c.DockerName == of || c.ID != "" && c.ID[:min(len(c.ID), shortID)] == of
		}) {
			return true
		}
	}
	return false
}

// in appends to list those that may send from the namespace of c, which is one of v's: c itself, unless it
// is a pause container, and its guests. Two are enough: then nobody is meant.
func (g guests) in(list []holder, v *View, c *ContainerView, depth int) []holder {
	known := func(h holder) bool { return h.container == c }
	if depth == maxDepth || len(list) > 1 || slices.ContainsFunc(list, known) {
		return list
	}
	if c.Type != task.TypeCNIPause && c.KnownStatus != task.StatusStopped {
		list = append(list, holder{v, c})
	}
	for _, ref := range [...]string{c.ID, c.ID[:min(len(c.ID), shortID)], c.DockerName} {
		for _, guest := range g[ref] {
			list = g.in(list, guest.view, guest.container, depth+1)
		}
	}
	return list
}

// shortID is how many digits of a container's id Docker takes for it.
const shortID = 12

// withAskers returns v with what Only returns, v itself if it has that.
func (v *View) withAskers(g guests) *View {
	askers := make([]*ContainerView, len(v.Task.Endpoints))
	for i, ep := range v.Task.Endpoints {
		c := v.byID[ep.Container]
		if c == nil {
			continue
		}
		if all := g.in(nil, v, c, 0); len(all) == 1 && all[0].view.Tag == v.Tag {
			askers[i] = all[0].container
		}
	}
	if slices.Equal(askers, v.askers) {
		return v
	}
	next := *v
	next.askers = askers
	return &next
}
