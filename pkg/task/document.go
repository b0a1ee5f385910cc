package task

import (
	"bytes"
	"encoding/json"
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
		b := buildContainer(t, c)
		containers[i] = b.documents()
		for v := range elements {
			if c.ID == "" && c.KnownStatus == StatusPulled && Version(v) != V4 {
				continue
			}
			list := containers[i][v].segments
			if len(elements[v]) > 0 { // not the first: take the comma before it too
				elements[v] = append(elements[v], b.buf[:1+len(list[0])])
				list = list[1:]
			}
			elements[v] = append(elements[v], list...)
		}
	}
	return buildTask(t, &elements).documents(), containers
}

// buildTask lays out t's documents around the elements of their lists of containers.
//
//	v2, v3: {"Cluster": text, …, "KnownStatus": status,
//	         "Containers": […], "Limits": {}, …, "AvailabilityZone": text}
//	v4: {"Cluster": text, …, "KnownStatus": status,
//	     "Limits": {}, …, "LaunchType": text, "Containers": […], …}
func buildTask(t *Task, elements *[versions][][]byte) *builder {
	b := &builder{}
	list := func(v Version) {
		if len(elements[v]) > 0 {
			b.add([]byte(`,"Containers":[`), v)
			b.share(elements[v], v)
			b.add([]byte("]"), v)
		}
	}
	b.add([]byte("{"), V2, V3, V4)
	b.add(members(newTaskHead(t))[1:], V2, V3, V4)
	list(V2)
	list(V3)
	b.add(members(newTaskRest(t)), V2, V3, V4)
	b.add([]byte("}"), V2, V3)
	b.add(members(taskLaunch{t.LaunchType}), V4)
	list(V4)
	b.add(members(newTaskTail(t)), V4)
	b.add([]byte("}"), V4)
	return b
}

// buildContainer lays out the documents of c, one of t's containers, after a comma that is in none
// of them: they are elements of t's documents too.
//
//	v2, v3: {"DockerId": id, …, "Type": type, "Networks": […], "Health": {}, "Volumes": […]}
//	v4: {"DockerId": id, …, "Type": type, "Health": {}, "Volumes": […],
//	     "LogDriver": text, …, "Networks": […], …}
func buildContainer(t *Task, c *Container) *builder {
	b := &builder{}
	b.add([]byte(","))
	b.add([]byte("{"), V2, V3, V4)
	b.add(members(newContainerHead(c))[1:], V2, V3, V4)
	ports2, ports4 := members(containerPorts{newPorts(c, false)}),
		members(containerPorts{newPorts(c, true)})
	if bytes.Equal(ports2, ports4) {
		b.add(ports2, V2, V3, V4)
	} else {
		b.add(ports2, V2, V3)
		b.add(ports4, V4)
	}
	b.add(members(newContainerBody(t, c)), V2, V3, V4)
	if len(c.Networks) > 0 {
		b.add(members(containerNetworks{newNetworks(c.Networks)}), V2, V3)
	} else {
		b.add(members(containerNetworks{newDockerNetworks(t, c)}), V3)
	}
	b.add(members(newContainerRest(c)), V2, V3, V4)
	b.add([]byte("}"), V2, V3)
	b.add(members(newContainerTail(t, c)), V4)
	b.add([]byte("}"), V4)
	return b
}

// builder lays out one thing's documents in one piece of memory. Text is added in the order that it
// has in each of the documents that it is a part of.
type builder struct {
	buf   []byte
	parts [versions][]part
}

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

// documents returns what was laid out. Nothing can be added after it.
func (b *builder) documents() (d Documents) {
	b.buf = append(make([]byte, 0, len(b.buf)), b.buf...)
	n := 0
	for v := range b.parts {
		n += len(b.parts[v])
	}
	all := make([][]byte, 0, n)
	for v, list := range b.parts {
		first := len(all)
		for _, p := range list {
			if p.shared == nil {
				p.shared = b.buf[p.start:p.end:p.end]
			}
			all = append(all, p.shared)
		}
		d[v] = Document{all[first:len(all):len(all)]}
	}
	return d
}

// members returns the members of the JSON object that v is, each after a comma.
func members(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // all values of the wire types have a JSON form
		panic(err)
	}
	if len(b) == len("{}") {
		return nil
	}
	b[0] = ','
	return b[:len(b)-1]
}
