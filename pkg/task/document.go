package task

import (
	"bytes"
	"encoding/json"
	"slices"
	"sync"
)

// Version is a version of the endpoint, and so of the documents.
type Version uint8

// The versions. A v3 document is a v2 document that has Networks in every network mode.
const (
	V2 Version = iota
	V3
	V4

	versions = int(V4) + 1
)

// Document is rendered JSON in segments: what is the same in the documents of several versions, or
// in a container's document and in its task's, is in memory once. A Document is immutable, safe for
// concurrent use, and cheap to copy.
type Document struct{ segments [][]byte }

// Documents are one thing's documents in all versions, indexed by Version.
type Documents [versions]Document

// Segments returns the parts that make the document one after the other. Neither the list nor the
// parts may be changed.
func (d Document) Segments() [][]byte { return d.segments }

// Len returns the document's length in bytes.
func (d Document) Len() (n int) {
	for _, s := range d.segments {
		n += len(s)
	}
	return n
}

// AppendTo appends the document to dst.
func (d Document) AppendTo(dst []byte) []byte {
	for _, s := range d.segments {
		dst = append(dst, s...)
	}
	return dst
}

// String returns a copy of the document.
func (d Document) String() string { return string(d.AppendTo(nil)) }

// Render returns t's documents and those of each of its containers, in t's order. A container that
// is only pulled is in v4's task document alone: Docker knows no such container yet.
func Render(t *Task) (whole Documents, containers []Documents) {
	containers = make([]Documents, len(t.Containers))
	var elements [versions][][]byte
	for i, c := range t.Containers {
		b := builders.Get().(*builder)
		b.container(t, c)
		text := []byte(nil)
		containers[i], text = b.documents()
		for v := range elements {
			if c.ID == "" && c.KnownStatus == StatusPulled && Version(v) != V4 {
				continue
			}
			list := containers[i][v].segments
			if len(elements[v]) > 0 { // not the first: take the comma before it too
				elements[v] = append(elements[v], text[:1+len(list[0])])
				list = list[1:]
			}
			elements[v] = append(elements[v], list...)
		}
	}
	b := builders.Get().(*builder)
	b.task(t, &elements)
	whole, _ = b.documents()
	return whole, containers
}

// task lays out t's documents around the elements of their lists of containers.
//
//	v2, v3: {"Cluster": text, …, "KnownStatus": status,
//	         "Containers": […], "Limits": {}, …, "AvailabilityZone": text}
//	v4: {"Cluster": text, …, "KnownStatus": status,
//	     "Limits": {}, …, "LaunchType": text, "Containers": […], …}
func (b *builder) task(t *Task, elements *[versions][][]byte) {
	list := func(v Version) {
		if len(elements[v]) > 0 {
			b.add([]byte(`,"Containers":[`), v)
			b.share(elements[v], v)
			b.add([]byte("]"), v)
		}
	}
	b.first(newTaskHead(t), V2, V3, V4)
	list(V2)
	list(V3)
	b.members(newTaskRest(t), V2, V3, V4)
	b.add([]byte("}"), V2, V3)
	b.members(taskLaunch{t.LaunchType}, V4)
	list(V4)
	b.members(newTaskTail(t), V4)
	b.add([]byte("}"), V4)
}

// container lays out the documents of c, one of t's containers, after a comma that is in none
// of them: they are elements of t's documents too.
//
//	v2, v3: {"DockerId": id, …, "Type": type, "Networks": […], "Health": {}, "Volumes": […]}
//	v4: {"DockerId": id, …, "Type": type, "Health": {}, "Volumes": […],
//	     "LogDriver": text, …, "Networks": […], …}
func (b *builder) container(t *Task, c *Container) {
	b.add([]byte(","))
	b.first(newContainerHead(c), V2, V3, V4)
	if hasHostIP(c) {
		b.members(containerPorts{newPorts(c, false)}, V2, V3)
		b.members(containerPorts{newPorts(c, true)}, V4)
	} else {
		b.members(containerPorts{newPorts(c, true)}, V2, V3, V4)
	}
	b.members(newContainerBody(t, c), V2, V3, V4)
	if len(c.Networks) > 0 {
		b.members(containerNetworks{newNetworks(c.Networks)}, V2, V3)
	} else {
		b.members(containerNetworks{newDockerNetworks(t, c)}, V3)
	}
	b.members(newContainerRest(c), V2, V3, V4)
	b.add([]byte("}"), V2, V3)
	b.members(newContainerTail(t, c), V4)
	b.add([]byte("}"), V4)
}

// hasHostIP reports whether the ports of v4 differ from the others'.
func hasHostIP(c *Container) bool {
	return slices.ContainsFunc(c.Ports, func(p Port) bool { return p.HostIP != "" })
}

// builder lays out one thing's documents in one piece of memory. Text is added in the order that it
// has in each of the documents that it is a part of.
type builder struct {
	buf   []byte
	parts [versions][]part
	json  bytes.Buffer
	enc   *json.Encoder // to json
}

// builders keeps builders with their memory: a task is rendered at each change of it.
var builders = sync.Pool{New: func() any {
	b := &builder{}
	b.enc = json.NewEncoder(&b.json)
	return b
}}

// part is a part of one document: the builder's bytes from start to end, or shared.
type part struct {
	start, end int
	shared     []byte
}

// add makes text the next part of the documents of vs.
func (b *builder) add(text []byte, vs ...Version) {
	start := len(b.buf)
	b.buf = append(b.buf, text...)
	for _, v := range vs {
		if n := len(b.parts[v]); n > 0 && b.parts[v][n-1].shared == nil &&
			b.parts[v][n-1].end == start {
			b.parts[v][n-1].end = len(b.buf)
		} else {
			b.parts[v] = append(b.parts[v], part{start: start, end: len(b.buf)})
		}
	}
}

// share makes segments, which belong to other documents, the next parts of v's.
func (b *builder) share(segments [][]byte, v Version) {
	for _, s := range segments {
		b.parts[v] = append(b.parts[v], part{shared: s})
	}
}

// documents returns what was laid out, and the text of its parts that are not shared. The builder
// is not to be used after it.
func (b *builder) documents() (d Documents, text []byte) {
	text = bytes.Clone(b.buf)
	n := 0
	for v := range b.parts {
		n += len(b.parts[v])
	}
	all := make([][]byte, 0, n)
	for v, list := range b.parts {
		first := len(all)
		for _, p := range list {
			if p.shared == nil {
				p.shared = text[p.start:p.end:p.end]
			}
			all = append(all, p.shared)
		}
		d[v] = Document{all[first:len(all):len(all)]}
	}
	const most = 64 << 10
	if cap(b.buf) <= most && b.json.Cap() <= most {
		b.buf = b.buf[:0]
		for v := range b.parts {
			clear(b.parts[v])
			b.parts[v] = b.parts[v][:0]
		}
		builders.Put(b)
	}
	return d, text
}

// first begins the documents of vs with the members of the JSON object that v is.
func (b *builder) first(v any, vs ...Version) {
	text := b.object(v)
	b.add(text[:len(text)-1], vs...)
}

// members adds the members of the JSON object that v is, each after a comma.
func (b *builder) members(v any, vs ...Version) {
	text := b.object(v)
	if len(text) == len("{}") {
		return
	}
	text[0] = ','
	b.add(text[:len(text)-1], vs...)
}

// object returns the JSON of v, which is valid until the next call.
func (b *builder) object(v any) []byte {
	b.json.Reset()
	if err := b.enc.Encode(v); err != nil { // all values of the wire types have a JSON form
		panic(err)
	}
	return bytes.TrimSuffix(b.json.Bytes(), []byte("\n"))
}
