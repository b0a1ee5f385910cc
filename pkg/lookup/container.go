package lookup

import (
	"iter"
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
// That can differ for the tasks that have changed, and for those whose network their containers use
// or have used.
func (t *Table) complete(c *change) {
	affected := map[uint32]bool{}
	for tag := range c.tags {
		affected[tag] = true
		for _, v := range [...]*View{c.old.byTag(tag), c.next.byTag(tag)} {
			if v != nil {
				t.addHosts(c, affected, v.Task, 0)
			}
		}
	}
	for tag := range affected {
		v := c.next.byTag(tag)
		if v == nil {
			continue
		}
		if next := v.withAskers(guestsOf(t.around(c, v))); next != v {
			c.next.tags.set(tagPart(tag), tag, next)
			c.tags[tag] = true
			c.mentions(v.Task)
		}
	}
}

// addHosts adds the tasks of other containers whose network those of tk use, and those of theirs.
func (t *Table) addHosts(c *change, tags map[uint32]bool, tk *task.Task, depth int) {
	if depth == maxDepth {
		return
	}
	for of := range strangers(tk) {
		for _, host := range t.hosts(c, of) {
			if !tags[host.Tag] {
				tags[host.Tag] = true
				t.addHosts(c, tags, host.Task, depth+1)
			}
		}
	}
}

// hosts returns the views of the tasks that have the container that Docker names by ref.
func (t *Table) hosts(c *change, ref string) (views []*View) {
	const idLength = 64
	if tag, ok := t.claims.containers[ref]; ok || len(ref) == idLength {
		if v := c.next.byTag(tag); v != nil {
			views = append(views, v)
		}
		return views
	}
	for _, v := range c.next.tags.all() { // Docker resolves names, but for old clients'
		if slices.ContainsFunc(v.Task.Containers, func(k *task.Container) bool {
			return k.Is(ref)
		}) {
			views = append(views, v)
		}
	}
	return views
}

// around returns v and the views of the tasks whose containers use the network of one of v's, and
// those that use theirs.
func (t *Table) around(c *change, v *View) []*View {
	views := []*View{v}
	if len(t.claims.guests) == 0 {
		return views
	}
	seen := map[uint32]bool{v.Tag: true}
	for i := 0; i < len(views); i++ {
		for _, k := range views[i].Task.Containers {
			for _, ref := range refs(k) {
				for _, tag := range t.claims.guests[ref] {
					if w := c.next.byTag(tag); w != nil && !seen[tag] {
						seen[tag] = true
						views = append(views, w)
					}
				}
			}
		}
	}
	return views
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

// strangers yields what Docker names the containers by whose network containers of t use, and that
// are not of t.
func strangers(t *task.Task) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, c := range t.Containers {
			of, ok := strings.CutPrefix(c.NetworkMode, "container:")
			if !ok || c.KnownStatus == task.StatusStopped ||
				slices.ContainsFunc(t.Containers,
					func(o *task.Container) bool { return o.Is(of) }) {
				continue
			}
			if !yield(of) {
				return
			}
		}
	}
}

// refs returns what Docker names the container by.
func refs(c *task.Container) [3]string {
	return [...]string{c.ID, c.ID[:min(len(c.ID), shortID)], c.DockerName}
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
	for _, ref := range refs(c.Container) {
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
