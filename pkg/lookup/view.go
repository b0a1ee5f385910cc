package lookup

import (
	"net/netip"

	"metad/bpf"
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
	byNumber  []*ContainerView // by their numbers in tags; 0 is nobody's
	levels    [2]uint8         // depths of their cgroups
}

// ContainerView is one container's part of a View.
type ContainerView struct {
	*task.Container
	// StatsKey is what precedes the container's sample in the task's statistics: `"<id>":`.
	StatsKey []byte

	documents task.Documents
	number    int  // in tags; 0: the kernel does not name it
	host      bool // it uses the host's network; set if it has a number
}

// Document returns the task's metadata document. It does not allocate.
func (v *View) Document(ver task.Version) task.Document { return v.documents[ver] }

// Document returns the container's metadata document. It does not allocate.
func (c *ContainerView) Document(ver task.Version) task.Document { return c.documents[ver] }

// Number returns the number in tags by which the kernel names the container, 0 if it does not: its
// cgroup is not known, or is not looked at.
func (v *View) Number(c *ContainerView) int {
	if !v.provable(c) {
		return 0
	}
	return c.number
}

// Settled reports whether there is a view and nothing better is to be expected soon for a
// connection with the mark tag: the task is not Settling, and has the container that the tag names.
func (v *View) Settled(tag uint32) bool {
	if v == nil || v.Task.Settling {
		return false
	}
	n := number(tag)
	return n == 0 || v.numbered(n) != nil
}

// Sender returns the container that a connection from addr with the mark tag comes from; nil if
// nothing says which. The kernel's word comes first: the container in whose cgroup the socket was
// made. Where it says nothing, it is Only(addr). A pause container can be named by the kernel
// alone. It does not allocate.
func (v *View) Sender(tag uint32, addr netip.Addr) *ContainerView {
	if n := number(tag); n != 0 {
		return v.numbered(n)
	}
	return v.Only(addr)
}

// InCgroup returns the task's container that has the cgroup alone, nil if there is none.
func (v *View) InCgroup(cgroup uint64) *ContainerView { return v.numbered(v.numberOf(cgroup)) }

// NamespaceOf returns a process in the network namespace that has addr, one of the task's
// addresses; 0 if none is known. The namespace may be another's by the time that it is opened.
func (v *View) NamespaceOf(addr netip.Addr) (pid int) {
	for _, ep := range v.Task.Endpoints {
		if c := v.byID[ep.Container]; ep.Addr == addr && c != nil {
			return c.PID
		}
	}
	return 0
}

// number returns the number of the container that tag names, 0: none.
func number(tag uint32) int {
	if tag&bpf.TagPort != 0 {
		return 0
	}
	return bpf.ContainerNumber(tag)
}

func (v *View) numbered(n int) *ContainerView {
	if n < len(v.byNumber) {
		return v.byNumber[n]
	}
	return nil
}

// numberOf returns the number of the container with the cgroup, 0: none.
func (v *View) numberOf(cgroup uint64) int {
	for n, c := range v.byNumber {
		if c != nil && c.Cgroup.ID == cgroup {
			return n
		}
	}
	return 0
}

// Container returns the task's container with the full Docker id, or nil. It does not allocate.
func (v *View) Container(id []byte) *ContainerView { return v.byID[string(id)] }

// Named returns the task's container that has name in the task definition, or else as its Docker
// name; nil if there is none. Of several, as when Compose scales a service, one that has not
// stopped, the oldest. It does not allocate.
func (v *View) Named(name []byte) *ContainerView {
	if c := v.find(func(c *ContainerView) bool { return c.Name == string(name) }); c != nil {
		return c
	}
	return v.find(func(c *ContainerView) bool { return c.DockerName == string(name) })
}

// find returns the first container that is meant and has not stopped, or else the first that is
// meant.
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

// Only returns the only container that a packet from addr, one of the task's addresses, can have
// come from; nil if it can have come from several, or addr is none of the task's. A pause container
// asks for nothing; one that uses the network of another task's container counts. It does not
// allocate.
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
		// hexadecimal: nothing to escape
		cv.StatsKey = append(append([]byte{'"'}, c.ID...), '"', ':')
		if c.ID != "" {
			v.byID[c.ID] = cv
		}
	}
	return v
}
