package lookup

import "metad/pkg/task"

// View is all the server needs to answer for one task: immutable, rendered when it was made.
type View struct {
	Tag  uint32
	Task *task.Task

	// Document is the task's v2 metadata document. Never written to again.
	Document []byte

	// Containers in the task's order, those without an id (being created) included.
	Containers []ContainerView

	byID map[string]*ContainerView
}

// ContainerView is one container's part of a View.
type ContainerView struct {
	*task.Container
	Document []byte // v2 metadata document; never written to again
	// StatsKey is what precedes the container's sample in the task's statistics: `"<id>":`.
	StatsKey []byte
}

// settled reports whether there is a view and nothing better is to be expected soon.
func (v *View) settled() bool { return v != nil && !v.Task.Settling }

// Container returns the task's container with the full Docker id, or nil. It does not allocate.
func (v *View) Container(id []byte) *ContainerView { return v.byID[string(id)] }

func newView(tag uint32, t *task.Task) *View {
	v := &View{
		Tag:        tag,
		Task:       t,
		Document:   task.AppendTask(nil, t),
		Containers: make([]ContainerView, len(t.Containers)),
		byID:       make(map[string]*ContainerView, len(t.Containers)),
	}
	for i, c := range t.Containers {
		cv := &v.Containers[i]
		cv.Container = c
		cv.Document = task.AppendContainer(nil, c)
		cv.StatsKey = append(append([]byte{'"'}, c.ID...), '"', ':') // hexadecimal: nothing to escape
		if c.ID != "" {
			v.byID[c.ID] = cv
		}
	}
	return v
}
