package lookup

import (
	"net/netip"

	"metad/pkg/task"
)

// View is all the server needs to answer for one task: immutable, rendered when it was made.
type View struct {
	Tag  uint32
	Task *task.Task

	// Containers in the task's order, those without an id (being created) included.
	Containers []ContainerView

	documents task.Documents
	byID      map[string]*ContainerView
	askers    []*ContainerView // for each of the task's endpoints: what Only returns
	joined    bool             // a container uses the network of another task's
}

// ContainerView is one container's part of a View.
type ContainerView struct {
	*task.Container
	// StatsKey is what precedes the container's sample in the task's statistics: `"<id>":`.
	StatsKey []byte

	documents task.Documents
}

// Document returns the task's metadata document. It does not allocate.
func (v *View) Document(ver task.Version) task.Document { return v.documents[ver] }

// Document returns the container's metadata document. It does not allocate.
func (c *ContainerView) Document(ver task.Version) task.Document { return c.documents[ver] }

// settled reports whether there is a view and nothing better is to be expected soon.
func (v *View) settled() bool { return v != nil && !v.Task.Settling }

// Container returns the task's container with the full Docker id, or nil. It does not allocate.
func (v *View) Container(id []byte) *ContainerView { return v.byID[string(id)] }

// Named returns the task's container that has name in the task definition, or else as its Docker name; nil if
// there is none. Of several, as when Compose scales a service, one that has not stopped, the oldest. It does not
// allocate.
func (v *View) Named(name []byte) *ContainerView {
	if c := v.find(func(c *ContainerView) bool { return c.Name == string(name) }); c != nil {
		return c
	}
	return v.find(func(c *ContainerView) bool { return c.DockerName == string(name) })
}

// find returns the first container that is meant and has not stopped, or else the first that is meant.
func (v *View) find(meant func(*ContainerView) bool) (found *ContainerView) {
	for i := range v.Containers {
		c := &v.Containers[i]
		if c.ID == "" || !meant(c) {
			continue
		}
		if c.KnownStatus != task.StatusStopped {
			return c
		}
		if found == nil {
			found = c
		}
	}
	return found
}

// Only returns the only container that a packet from addr, one of the task's addresses, can have come from; nil
// if it can have come from several, or addr is none of the task's. A pause container asks for nothing; one that
// uses the network of another task's container counts. It does not allocate.
func (v *View) Only(addr netip.Addr) *ContainerView {
	for i := range v.askers {
		if v.Task.Endpoints[i].Addr == addr {
			return v.askers[i]
		}
	}
	return nil
}

func newView(tag uint32, t *task.Task) *View {
	whole, each := task.Render(t)
	v := &View{
		Tag:        tag,
		Task:       t,
		Containers: make([]ContainerView, len(t.Containers)),
		documents:  whole,
		byID:       make(map[string]*ContainerView, len(t.Containers)),
	}
	for i, c := range t.Containers {
		cv := &v.Containers[i]
		cv.Container = c
		cv.documents = each[i]
		cv.StatsKey = append(append([]byte{'"'}, c.ID...), '"', ':') // hexadecimal: nothing to escape
		if c.ID != "" {
			v.byID[c.ID] = cv
		}
	}
	v.joined = v.joins()
	return v
}
