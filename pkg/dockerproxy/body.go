package dockerproxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
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
	targets     []string // where mounts, volumes and tmpfs of the user are in the container, cleaned
	volumesFrom []string // names or ids of containers

	top, hostConfig object
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

	var binds []string
	var volumes, tmpfs map[string]json.RawMessage
	var mounts []struct{ Target string }
	for _, f := range []struct {
		in    object
		name  string
		value any
	}{
		{b.top, "Image", &b.image},
		{b.top, "Labels", &b.labels},
		{b.top, "Env", &b.env},
		{b.top, "Volumes", &volumes},
		{b.hostConfig, "Binds", &binds},
		{b.hostConfig, "Mounts", &mounts},
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

	for _, bind := range binds {
		parts := strings.Split(bind, ":")
		if len(parts) > 1 { // source:target[:mode], else an anonymous volume
			parts = parts[1:]
		}
		b.addTarget(parts[0])
	}
	for _, m := range mounts {
		b.addTarget(m.Target)
	}
	for target := range volumes { // a path; if it is a bind after all, either part counts
		for part := range strings.SplitSeq(target, ":") {
			b.addTarget(part)
		}
	}
	for target := range tmpfs {
		b.addTarget(target)
	}
	slices.Sort(b.targets)
	return b, nil
}

func (b *createBody) addTarget(target string) {
	b.targets = append(b.targets, path.Clean("/"+target))
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
		o.members = append(o.members, member{key: key.(string), start: end - len(value), end: end})
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

// setsVariable reports whether the user sets (or unsets) the environment variable.
func (b *createBody) setsVariable(name string) bool {
	return slices.ContainsFunc(b.env, func(e string) bool {
		key, _, _ := strings.Cut(e, "=")
		return key == name
	})
}

// with returns the body with env appended to the environment and bind to the binds.
func (b *createBody) with(env, bind string) []byte {
	edits := []edit{b.appendTo(b.top, "Env", quote(env))}
	if b.hostConfig.open == 0 {
		edits = append(edits, b.set(b.top, "HostConfig", `{"Binds":[`+quote(bind)+`]}`))
	} else {
		edits = append(edits, b.appendTo(b.hostConfig, "Binds", quote(bind)))
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

// appendTo appends a value to the array in o called name, making it if there is none. parseCreate
// has seen that it is an array or null.
func (b *createBody) appendTo(o object, name, value string) edit {
	m, _ := o.member(name)
	if m == nil || b.null(m) {
		return b.set(o, name, "["+value+"]")
	}
	closing := m.end - 1
	if len(bytes.TrimSpace(b.raw[m.start+1:closing])) > 0 {
		value = "," + value
	}
	return edit{closing, closing, value}
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
