package inject

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"path"
	"regexp"
	"strings"

	"metad/pkg/mdfile"
	"metad/pkg/task"
)

// The variables that hold the endpoint's address, and what their values begin with.
const (
	EnvURI   = "ECS_CONTAINER_METADATA_URI"
	EnvURIV4 = "ECS_CONTAINER_METADATA_URI_V4"

	uriV3 = "http://169.254.170.2/v3/"
	uriV4 = "http://169.254.170.2/v4/"
)

// A token is 32 hexadecimal digits, as the ids of ECS tasks are. It is random; where the
// container's id is known, the last digits are made of that and of the random ones. So a metad can
// tell what another one has just put into a container from what the container's configuration was
// copied with.
const (
	tokenLen  = 32
	randomLen = 20
)

func token(containerID string) string {
	var b [tokenLen / 2]byte
	_, _ = rand.Read(b[:]) // never fails
	t := hex.EncodeToString(b[:])
	if containerID == "" {
		return t
	}
	return t[:randomLen] + check(containerID, t[:randomLen])
}

func check(containerID, random string) string {
	sum := sha256.Sum256([]byte(containerID + random))
	return hex.EncodeToString(sum[:])[:tokenLen-randomLen]
}

func isToken(s string) bool {
	return len(s) == tokenLen && strings.Trim(s, "0123456789abcdef") == ""
}

// tokenOf returns the token in the value of one of the variables, "" if there is none: the last
// part of an address, or the directory of a file.
func tokenOf(value string) string {
	last := path.Base(value)
	if last == mdfile.FileName || last == mdfile.AgentFileName {
		last = path.Base(path.Dir(value))
	} else if taskID, rest, ok := strings.Cut(last, "-"); ok && isToken(taskID) {
		last = rest
	}
	if !isToken(last) {
		return ""
	}
	return last
}

// madeFor reports whether the value was made for the container with the id.
func madeFor(value, containerID string) bool {
	t := tokenOf(value)
	return t != "" && containerID != "" && t[randomLen:] == check(containerID, t[:randomLen])
}

// ownURI reports whether the value is an address as metad makes them. The agent's ids are UUIDs, or
// a task's id and a decimal number.
func ownURI(value string) bool {
	if !strings.HasPrefix(value, uriV3) && !strings.HasPrefix(value, uriV4) {
		return false
	}
	return strings.Count(value, "/") == strings.Count(uriV4, "/") && tokenOf(value) != ""
}

// Own reports whether e is a variable that metad has put into the container that this one's
// configuration was copied from, and that one of keys replaces. mounts are those that were copied
// with it.
func (i *Injector) Own(e string, mounts []Mount, keys []string) bool {
	key, value, _ := strings.Cut(e, "=")
	for _, k := range keys {
		if name, _, _ := strings.Cut(k, "="); name != key {
			continue
		}
		if key == mdfile.EnvVar {
			return i.ownFile(value, mounts)
		}
		return ownURI(value)
	}
	return false
}

// OwnMount reports whether m is a mount of a metadata file that metad has made. The ECS agent's may
// lie beneath the same directory of the host; their names in the container are UUIDs.
func (i *Injector) OwnMount(m Mount) bool {
	l := i.files.Layout()
	if !within(path.Clean(m.Source), l.Root()) {
		return false
	}
	parent, name := path.Split(m.Target)
	switch path.Clean(parent) {
	case l.In(mdfile.FormAgent).Base(), l.In(mdfile.FormPrivate).Base():
		return isToken(name)
	}
	return path.Clean(parent) == path.Join(l.In(mdfile.FormProposal).Base(), "metadata")
}

// ownFile reports whether the value names a file in one of the mounts that are metad's own; where
// the mounts are not known, whether only metad would name it so.
func (i *Injector) ownFile(value string, mounts []Mount) bool {
	dir := path.Dir(value)
	for _, m := range mounts {
		if m.Target == dir && i.OwnMount(m) {
			return true
		}
	}
	return within(dir, i.files.Layout().In(mdfile.FormPrivate).Base()) && tokenOf(value) != ""
}

// The ways in which a container comes by its file and addresses.
const (
	WayProxy  = "proxy"
	WayNRI    = "nri"
	WayAgent  = "agent"
	WayItself = "itself"
)

// Ways says which way c got its metadata file and the endpoint's address, "" if it has none.
func (i *Injector) Ways(c *task.Container) (file, uris string) {
	for _, e := range c.MetadataEnv {
		switch key, value, _ := strings.Cut(e, "="); key {
		case mdfile.EnvVar:
			file = i.fileWay(value, c.Volumes)
		case EnvURI, EnvURIV4:
			uris = uriWay(value, c.ID)
		}
	}
	return file, uris
}

func (i *Injector) fileWay(value string, volumes []task.Volume) string {
	l := i.files.Layout()
	for _, v := range volumes {
		if v.Destination != path.Dir(value) || !within(v.Source, l.Root()) {
			continue
		}
		switch {
		case !i.OwnMount(Mount{v.Source, v.Destination}):
			return WayAgent
		case within(v.Destination, l.In(mdfile.FormPrivate).Base()):
			return WayNRI
		}
		return WayProxy
	}
	return WayItself
}

// agentID is an endpoint id as the agent makes them.
var agentID = regexp.MustCompile(
	`^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}-[0-9]+)$`)

func uriWay(value, containerID string) string {
	switch id := path.Base(value); {
	case ownURI(value) && madeFor(value, containerID):
		return WayNRI
	case ownURI(value):
		return WayProxy
	case agentID.MatchString(id):
		return WayAgent
	}
	return WayItself
}
