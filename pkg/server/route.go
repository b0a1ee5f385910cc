package server

import (
	"bytes"
	"strings"

	"github.com/valyala/fasthttp"

	"metad/pkg/task"
)

// route is one path that metad answers itself.
type route struct {
	// path is matched exactly, as by the agent: a slash at its end is part of it.
	//
	// "{docker id}" at the end stands for any text that is not empty, slashes included.
	// "{container}" after /v3 and /v4 stands for a container's endpoint id; or for "self" or
	// nothing, which is the client's own container; or for "containers/" and a name in the
	// client's task.
	path    string
	version task.Version // of the answer
	answer  func(*Server, *fasthttp.RequestCtx, *conn) *failure
	forms   forms
	lost    lost
}

// forms describes the kind of an answer.
type forms uint8

const (
	ofContainer forms = 1 << iota // it is about one container, not about a task
	ofStats                       // it is statistics, not metadata
	ofHost                        // it is about every task of the host
)

// lost has the answers for a path whose object does not exist.
type lost struct {
	source    *failure // the client's address belongs to no task
	gone      *failure // the client's task at its last answer no longer exists
	container *failure // the task has no such container
	several   *failure // nothing says which of the task's containers the client is
	id        *failure // no container has the endpoint id
}

// routes is every path that metad answers itself. It passes all others on to the agent.
var routes = newRouteTable([]route{
	{"/v2/metadata", task.V2, (*Server).taskMetadata, 0, lostV2(errNoTask)},
	{"/v2/metadata/", task.V2, (*Server).taskMetadata, 0, lostV2(errNoTask)},
	{"/v2/metadata/self", task.V2, (*Server).containerMetadata, ofContainer,
		lostV2(errNoContainer)},
	{"/v2/metadata/{docker id}", task.V2, (*Server).containerMetadata, ofContainer,
		lostV2(errNoContainer)},
	{"/v2/metadataWithTags", task.V2, (*Server).taskWithTags, 0, lostV2(errNoTask)},
	{"/v2/metadataWithTags/", task.V2, (*Server).taskWithTags, 0, lostV2(errNoTask)},
	{"/v2/metadata/taskWithTags", task.V2, (*Server).taskWithTags, 0, lostV2(errNoTask)},
	{"/v2/stats", task.V2, (*Server).taskStats, ofStats, lostV2(errNoTaskStats)},
	{"/v2/stats/", task.V2, (*Server).taskStats, ofStats, lostV2(errNoTaskStats)},
	{"/v2/stats/self", task.V2, (*Server).containerStats, ofContainer | ofStats,
		lostV2(errNoStats)},
	{"/v2/stats/{docker id}", task.V2, (*Server).containerStats, ofContainer | ofStats,
		lostV2(errNoStats)},

	{"/v3/{container}", task.V3, (*Server).containerMetadata, ofContainer,
		lostBy(500, "V3 container metadata", containerID)},
	{"/v3/{container}/task", task.V3, (*Server).taskMetadata, 0, lostBy(500, "V3 task metadata",
		taskARN)},
	{"/v3/{container}/taskWithTags", task.V3, (*Server).taskWithTags, 0,
		lostBy(500, "V3 task metadata", taskARN)},
	{"/v3/{container}/stats", task.V3, (*Server).containerStats, ofContainer | ofStats,
		lostBy(400, "V3 container stats", taskARN)},
	{"/v3/{container}/task/stats", task.V3, (*Server).taskStats, ofStats,
		lostBy(400, "V3 task stats", taskARN)},

	{"/v4/{container}", task.V4, (*Server).containerMetadata, ofContainer,
		lostBy(404, "V4 container metadata", containerID)},
	{"/v4/{container}/task", task.V4, (*Server).taskMetadata, 0, lostBy(404, "V4 task metadata",
		taskARN)},
	{"/v4/{container}/taskWithTags", task.V4, (*Server).taskWithTags, 0,
		lostBy(404, "V4 task metadata", taskARN)},
	{"/v4/{container}/stats", task.V4, (*Server).containerStats, ofContainer | ofStats,
		lostBy(404, "V4 container stats", taskARN)},
	{"/v4/{container}/task/stats", task.V4, (*Server).taskStats, ofStats,
		lostBy(404, "V4 task stats", taskARN)},
	{"/v4/{container}/tasks", task.V4, (*Server).hostMetadata, ofContainer | ofHost, lostHost},
	{"/v4/{container}/tasks/stats", task.V4, (*Server).hostStats,
		ofContainer | ofHost | ofStats, lostHost},
})

// The object and the key, in the words of the agent's errors (agent/handlers/v3,
// ecs-agent/tmds/handlers/v4).
var (
	containerID = [2]string{"container ID", "docker ID"}
	taskARN     = [2]string{"task arn", "task Arn"}
)

// lostV2 is for the v2 paths, which identify the task by the source address. gone is also the
// answer for a container that the task does not have.
func lostV2(gone *failure) lost {
	return lost{source: errUnknownSource, gone: gone, container: gone, several: errWhichV2}
}

// lostBy is for the v3 and v4 paths. handler is the name in the agent's errors, and the status is
// the agent's for an unknown id. If the agent cannot name a container in that way, the status is
// 404.
func lostBy(status int, handler string, wanted [2]string) lost {
	why := handler + " handler: unable to get " + wanted[0] + " from request: "
	source := jsonText(404, why+"unable to associate '{addr}' with task")
	return lost{
		source:    source,
		gone:      source,
		container: jsonText(404, why+"task '{arn}' has no container '{id}'"),
		several:   jsonText(404, why+whichContainer),
		id: jsonText(status, why+"unable to get "+wanted[1]+
			" from v3 endpoint ID: {id}"),
	}
}

// whichContainer is the text of the answer if the client's own container is not known.
const whichContainer = "more than one container of task '{arn}' can have sent it from '{addr}'"

// lostHost is for paths that do not exist for a container without the label.
var lostHost = lost{errNoRoute, errNoRoute, errNoRoute, errNoRoute, errNoRoute}

// Route is a path that metad answers itself, for the reference.
type Route struct {
	Path   string // as route.path
	Answer string // what is answered, in words
}

// Routes returns every path that metad answers itself. Everything else is the agent's.
func Routes() []Route {
	var all []Route
	for _, r := range routes.all {
		what, of := "metadata", "the task"
		if r.forms&ofStats != 0 {
			what = "statistics"
		}
		switch {
		case r.forms&ofHost != 0:
			of = "every task of the host, for a container with the label " +
				"metad.host-tasks"
		case r.forms&ofContainer != 0:
			of = "the container"
		}
		if strings.HasSuffix(strings.ToLower(strings.TrimSuffix(r.path, "/")), "withtags") {
			of += ", with the tags of ECS"
		}
		all = append(all, Route{r.path, what + " of " + of})
	}
	return all
}

// subject is the way in which a path names its object.
type subject uint8

const (
	theCaller  subject = iota // the client's task, and its container if there is a proof
	byDockerID                // a container of the client's task
	byName                    // the same
	byEndpoint                // any container, by its endpoint id
)

// target is the object and the form that a path requests.
type target struct {
	*route // nil: metad does not serve the path
	by     subject
	name   []byte // the id or name in the path, decoded
}

// routeTable is routes, arranged for match. Immutable.
type routeTable struct {
	all      []route
	exact    map[string]target
	prefixes []prefix                     // those that end in {docker id}
	versions map[string]map[string]*route // "/v4" → what follows {container} → route
}

type prefix struct {
	text string
	*route
}

func newRouteTable(routes []route) *routeTable {
	t := &routeTable{all: routes, exact: map[string]target{},
		versions: map[string]map[string]*route{}}
	for i := range routes {
		r := &routes[i]
		if text, ok := strings.CutSuffix(r.path, "{docker id}"); ok {
			t.prefixes = append(t.prefixes, prefix{text, r})
			continue
		}
		version, form, ok := strings.Cut(r.path, "/{container}")
		if !ok {
			t.exact[r.path] = target{route: r}
			continue
		}
		t.exact[version+form] = target{route: r}
		t.exact[version+"/self"+form] = target{route: r}
		if t.versions[version] == nil {
			t.versions[version] = map[string]*route{}
		}
		t.versions[version][form] = r
	}
	return t
}

// match returns the target of a decoded and clean path. It does not allocate.
//
// The fixed words of a path are not endpoint ids: a container whose id is such a word cannot answer
// for the others.
func (t *routeTable) match(path []byte) target {
	if found, ok := t.exact[string(path)]; ok {
		return found
	}
	for _, p := range t.prefixes {
		if len(path) > len(p.text) && string(path[:len(p.text)]) == p.text {
			return target{p.route, byDockerID, path[len(p.text):]}
		}
	}
	const version = len("/v4")
	if len(path) <= version || path[version] != '/' {
		return target{}
	}
	forms := t.versions[string(path[:version])]
	name, form := cutSegment(path[version+1:])
	by := byEndpoint
	if string(name) == "containers" && len(form) > 1 {
		name, form = cutSegment(form[1:])
		by = byName
	}
	r := forms[string(form)]
	if _, word := t.exact[string(path[:version+1+len(name)])]; r == nil || by == byEndpoint &&
		word {
		return target{}
	}
	return target{r, by, name}
}

// cutSegment returns path up to its first slash, and the rest with that slash.
func cutSegment(path []byte) (segment, rest []byte) {
	if i := bytes.IndexByte(path, '/'); i >= 0 {
		return path[:i], path[i:]
	}
	return path, nil
}
