package lookup

import (
	"maps"
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
// ECS_CONTAINER_METADATA_URI(_V4), and its task; nil, nil if no container has it, the one that had
// it has stopped, or two have it. It takes no lock and does not allocate.
func (t *Table) Endpoint(id []byte) (*View, *ContainerView) {
	h := t.snap.Load().endpoints.maps[idPart(id)][string(id)]
	return h.view, h.container
}

// EndpointConflicts returns how often an endpoint id began to be held by two containers at once.
func (t *Table) EndpointConflicts() uint64 { return t.endpointConflicts.Load() }

// complete adds to next's views what comes of several tasks together: who may ask from an address.
// Where no container uses the network of another task's, and none did before, that is each view's
// own matter.
func (t *Table) complete(c *change) {
	before := t.joined
	for tag := range c.tags {
		if v := c.old.byTag(tag); v != nil && v.joined {
			t.joined--
		}
		if v := c.next.byTag(tag); v != nil && v.joined {
			t.joined++
		}
	}
	if before == 0 && t.joined == 0 {
		for tag := range c.tags {
			if v := c.next.byTag(tag); v != nil && v != c.old.byTag(tag) {
				c.next.tags.set(tagPart(tag), tag,
					v.withAskers(guestsOf([]*View{v})))
			}
		}
		return
	}
	all := slices.Collect(maps.Values(maps.Collect(c.next.tags.all())))
	g := guestsOf(all)
	for _, v := range all {
		if next := v.withAskers(g); next != v {
			c.next.tags.set(tagPart(v.Tag), v.Tag, next)
			c.tags[v.Tag] = true
			c.mentions(v.Task)
		}
	}
}

// indexEndpoints brings up to date what the endpoint ids name that c mentions. An environment that
// was copied with its id names two containers: the id is then neither's.
func (t *Table) indexEndpoints(c *change) {
	for id := range c.ids {
		tags := t.claims.ids[id]
		if len(tags) != 1 {
			c.next.endpoints.delete(idPart(id), id)
			t.tellCopied(c, id, tags)
			continue
		}
		delete(t.copied, id)
		v := c.next.byTag(tags[0])
		for i := range v.Containers {
			if k := &v.Containers[i]; k.EndpointID == id && holdsEndpoint(k.Container) {
				c.next.endpoints.set(idPart(id), id, holder{v, k})
			}
		}
	}
}

// tellCopied tells that an endpoint id has begun to be held by two containers, those of the tasks
// with the tags; none if it is nobody's.
func (t *Table) tellCopied(c *change, id string, tags []uint32) {
	if len(tags) == 0 {
		delete(t.copied, id)
		return
	}
	if t.copied[id] {
		return
	}
	t.copied[id] = true
	t.endpointConflicts.Add(1)
	all := c.next.byTag(tags[len(tags)-1]).Containers
	i := slices.IndexFunc(all, func(k ContainerView) bool { return k.EndpointID == id })
	t.log.Warn("endpoint id held by two containers: given to neither",
		zap.String("container", all[i].ID))
}

// guests are the containers that use another container's network namespace and have not stopped, by
// what Docker names the other one by.
type guests map[string][]holder

func guestsOf(views []*View) guests {
	g := guests{}
	for _, v := range views {
		for i := range v.Containers {
			c := &v.Containers[i]
			if of, ok := strings.CutPrefix(c.NetworkMode, "container:"); ok &&
				c.KnownStatus != task.StatusStopped {
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
			return c.ID == of || c.DockerName == of || c.ID != "" &&
				c.ID[:min(len(c.ID), shortID)] == of
		}) {
			return true
		}
	}
	return false
}

// in appends to list those that may send from the namespace of c, which is one of v's: c itself,
// unless it is a pause container, and its guests. Two are enough: then nobody is meant.
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
