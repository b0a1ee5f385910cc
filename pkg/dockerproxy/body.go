package dockerproxy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strings"

	"github.com/docker/docker/api/types/container"

	"metad/pkg/inject"
)

// errBody is returned for a body that cannot be edited safely. It is passed on as it is, for the
// Engine to judge.
var errBody = errors.New("body of the create request")

// createBody is the body of POST /containers/create, as far as metad needs to understand it.
//
// It is edited by inserting into its bytes. So everything else stays as it was sent: fields that
// nobody here knows, the precision of numbers, the order of keys, even white space.
type createBody struct {
	raw []byte

	image       string
	labels      map[string]string
	env         []string
	binds       []string
	hostMounts  []mountSpec    // "Mounts"
	mounts      []inject.Mount // binds, mounts, volumes and tmpfs, by target
	volumesFrom []string       // names or ids of containers

	top, hostConfig object
}

// mountSpec is an element of HostConfig.Mounts.
type mountSpec struct{ Source, Target string }

func (m mountSpec) mount() inject.Mount {
	return inject.Mount{Source: m.Source, Target: path.Clean("/" + m.Target)}
}

// parseBind reads source:target[:mode], or the target of an anonymous volume.
func parseBind(bind string) inject.Mount {
	m := mountSpec{Target: bind}
	if parts := strings.Split(bind, ":"); len(parts) > 1 {
		m.Source, m.Target = parts[0], parts[1]
	}
	return m.mount()
}

// object is a JSON object inside a body.
type object struct {
	open    int // offset of the byte after '{'; 0 if there is no such object
	members []member
}

type member struct {
	key        string
	start, end int // of the value
}

// parseCreate reads raw, which it keeps. The error is errBody.
func parseCreate(raw []byte) (*createBody, error) {
	b := &createBody{raw: raw}
	var err error
	if b.top, err = b.object(0); err != nil {
		return nil, err
	}
	if len(b.top.members) == 0 {
		return nil, fmt.Errorf("%w: empty", errBody)
	}
	hostConfig, err := b.top.member("HostConfig")
	if err == nil && hostConfig != nil && !b.null(hostConfig) {
		b.hostConfig, err = b.object(hostConfig.start)
	}
	if err != nil {
		return nil, err
	}

	if b.hostConfig.open == 0 && b.topLevelHostConfig() {
		return nil, fmt.Errorf("%w: what belongs to HostConfig stands at the top", errBody)
	}
	var volumes, tmpfs map[string]json.RawMessage
	for _, f := range []struct {
		in    object
		name  string
		value any
	}{
		{b.top, "Image", &b.image},
		{b.top, "Labels", &b.labels},
		{b.top, "Env", &b.env},
		{b.top, "Volumes", &volumes},
		{b.hostConfig, "Binds", &b.binds},
		{b.hostConfig, "Mounts", &b.hostMounts},
		{b.hostConfig, "Tmpfs", &tmpfs},
		{b.hostConfig, "VolumesFrom", &b.volumesFrom},
	} {
		m, err := f.in.member(f.name)
		if err != nil {
			return nil, err
		}
		if m == nil {
			continue
		}
		if err := json.Unmarshal(raw[m.start:m.end], f.value); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", errBody, f.name, err)
		}
	}

	for _, bind := range b.binds {
		b.mounts = append(b.mounts, parseBind(bind))
	}
	for _, m := range b.hostMounts {
		b.mounts = append(b.mounts, m.mount())
	}
	for target := range volumes { // a path; if it is a bind after all, either part counts
		for part := range strings.SplitSeq(target, ":") {
			b.mounts = append(b.mounts, mountSpec{Target: part}.mount())
		}
	}
	for target := range tmpfs {
		b.mounts = append(b.mounts, mountSpec{Target: target}.mount())
	}
	slices.SortFunc(b.mounts, func(x, y inject.Mount) int {
		return strings.Compare(x.Target, y.Target)
	})
	return b, nil
}

// hostConfigFields are the names in HostConfig, in lower case.
var hostConfigFields = fieldNames(reflect.TypeFor[container.HostConfig](),
	map[string]bool{"cpuset": true})

func fieldNames(t reflect.Type, names map[string]bool) map[string]bool {
	for f := range t.Fields() {
		if f.Anonymous {
			fieldNames(f.Type, names)
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names[strings.ToLower(cmp.Or(name, f.Name))] = true
	}
	return names
}

// topLevelHostConfig reports whether the body has the old form, with the members of HostConfig at
// the top. Engines before 25 take it, and stop looking there as soon as there is a HostConfig.
func (b *createBody) topLevelHostConfig() bool {
	return slices.ContainsFunc(b.top.members, func(m member) bool {
		return hostConfigFields[strings.ToLower(m.key)]
	})
}

// object reads the JSON object that begins at offset.
func (b *createBody) object(offset int) (object, error) {
	var o object
	dec := json.NewDecoder(bytes.NewReader(b.raw[offset:]))
	t, err := dec.Token()
	if err != nil {
		return o, fmt.Errorf("%w: %w", errBody, err)
	}
	if t != json.Delim('{') {
		return o, fmt.Errorf("%w: not an object", errBody)
	}
	o.open = offset + int(dec.InputOffset())
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return o, fmt.Errorf("%w: %w", errBody, err)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return o, fmt.Errorf("%w: %w", errBody, err)
		}
		end := offset + int(dec.InputOffset())
		o.members = append(o.members, member{key: key.(string), start: end - len(value),
			end: end})
	}
	if _, err := dec.Token(); err != nil {
		return o, fmt.Errorf("%w: %w", errBody, err)
	}
	return o, nil
}

// member returns the member that the Engine takes for name: like everything written in Go it does
// not mind the case of letters. Nil if there is none; an error if there is more than one, because
// what they mean together differs from field to field.
func (o object) member(name string) (*member, error) {
	var found *member
	for i := range o.members {
		if !strings.EqualFold(o.members[i].key, name) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("%w: %s is there twice", errBody, name)
		}
		found = &o.members[i]
	}
	return found, nil
}

func (b *createBody) null(m *member) bool { return string(b.raw[m.start:m.end]) == "null" }

// additions is what goes into a body, and what comes out of it because it was put in at an earlier
// creation.
type additions struct {
	env         []string // KEY=value
	bind        string   // "": none
	ownVariable func(e string) bool
	ownMount    func(inject.Mount) bool
}

// with returns the body with env appended to the environment and bind to the binds.
func (b *createBody) with(a additions) []byte {
	edits := []edit{b.change(b.top, "Env", func(i int) bool { return a.ownVariable(b.env[i]) },
		a.env...)}
	switch {
	case a.bind == "":
	case b.hostConfig.open == 0:
		edits = append(edits, b.set(b.top, "HostConfig", `{"Binds":[`+quote(a.bind)+`]}`))
	default:
		edits = append(edits,
			b.change(b.hostConfig, "Binds",
				func(i int) bool { return a.ownMount(parseBind(b.binds[i])) },
				a.bind),
			b.change(b.hostConfig, "Mounts", func(i int) bool {
				return a.ownMount(b.hostMounts[i].mount())
			}))
	}
	slices.SortStableFunc(edits, func(x, y edit) int { return x.start - y.start })

	var out []byte
	from := 0
	for _, e := range edits {
		out = append(out, b.raw[from:e.start]...)
		out = append(out, e.text...)
		from = e.end
	}
	return append(out, b.raw[from:]...)
}

// edit replaces the bytes from start to end, none if they are equal, by text.
type edit struct {
	start, end int
	text       string
}

// change drops elements of the array in o called name and appends values to it, making it if there
// is none. parseCreate has seen that it is an array or null.
func (b *createBody) change(o object, name string, drop func(i int) bool, values ...string) edit {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = quote(v)
	}
	m, _ := o.member(name)
	switch {
	case (m == nil || b.null(m)) && len(values) == 0:
		return edit{}
	case m == nil || b.null(m):
		return b.set(o, name, "["+strings.Join(quoted, ",")+"]")
	}
	var elements []json.RawMessage
	_ = json.Unmarshal(b.raw[m.start:m.end], &elements)
	var kept []string
	for i, e := range elements {
		if !drop(i) {
			kept = append(kept, string(e))
		}
	}
	if len(kept) < len(elements) {
		return edit{m.start, m.end, "[" + strings.Join(append(kept, quoted...), ",") + "]"}
	}
	closing := m.end - 1
	text := strings.Join(quoted, ",")
	if len(elements) > 0 && text != "" {
		text = "," + text
	}
	return edit{closing, closing, text}
}

// set puts a value in the place of null, or adds it to o as the first member.
func (b *createBody) set(o object, name, value string) edit {
	if m, _ := o.member(name); m != nil {
		return edit{m.start, m.end, value}
	}
	text := quote(name) + ":" + value
	if len(o.members) > 0 {
		text += ","
	}
	return edit{o.open, o.open, text}
}

func quote(s string) string {
	b, _ := json.Marshal(s) // a string always can be
	return string(b)
}
