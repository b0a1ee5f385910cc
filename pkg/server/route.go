package server

import (
	"strings"

	"github.com/valyala/fasthttp"
)

// route is one path that metad answers itself.
type route struct {
	// path is matched exactly, as by the agent: a slash at its end is part of it. "{id}" at the end
	// stands for any text that is not empty, slashes included.
	path   string
	answer func(*Server, *fasthttp.RequestCtx, *conn) *failure
	// gone is what a connection is told that has had an answer, when its task is there no more.
	gone *failure
}

// routes is every path that metad answers itself. Everything else is the agent's.
var routes = newRouteTable([]route{
	{"/v2/metadata", (*Server).taskMetadata, errNoTask},
	{"/v2/metadata/", (*Server).taskMetadata, errNoTask},
	{"/v2/metadata/{id}", (*Server).containerMetadata, errNoContainer},
	{"/v2/metadataWithTags", (*Server).taskWithTags, errNoTask},
	{"/v2/metadataWithTags/", (*Server).taskWithTags, errNoTask},
	{"/v2/metadata/taskWithTags", (*Server).taskWithTags, errNoTask},
	{"/v2/stats", (*Server).taskStats, errNoTaskStats},
	{"/v2/stats/", (*Server).taskStats, errNoTaskStats},
	{"/v2/stats/{id}", (*Server).containerStats, errNoStats},
})

// routeTable is routes, arranged for finding one. Immutable.
type routeTable struct {
	exact    map[string]*route
	prefixes []prefix
}

// prefix is a route whose path ends in {id}, and what its path begins with.
type prefix struct {
	text string
	*route
}

func newRouteTable(routes []route) *routeTable {
	t := &routeTable{exact: make(map[string]*route, len(routes))}
	for i := range routes {
		r := &routes[i]
		if text, ok := strings.CutSuffix(r.path, "{id}"); ok {
			t.prefixes = append(t.prefixes, prefix{text, r})
			continue
		}
		t.exact[r.path] = r
	}
	return t
}

// match returns the route of a decoded and clean path, nil if it is not metad's, and the id in the
// path, which is a part of it. It does not allocate.
func (t *routeTable) match(path []byte) (r *route, id []byte) {
	if r := t.exact[string(path)]; r != nil {
		return r, nil
	}
	for _, p := range t.prefixes {
		if len(path) > len(p.text) && string(path[:len(p.text)]) == p.text {
			return p.route, path[len(p.text):]
		}
	}
	return nil, nil
}
