package server

import (
	"bytes"
	"errors"
	"net/url"
	"path"
	"strings"
)

// route is what a path asks for.
type route uint8

const (
	routeOther          route = iota // not ours: the agent's, if there is one
	routeTask                        // /v2/metadata
	routeContainer                   // /v2/metadata/<id>
	routeTags                        // /v2/metadataWithTags
	routeTaskStats                   // /v2/stats
	routeContainerStats              // /v2/stats/<id>
)

// routeOf tells what the decoded and clean path asks for. Matching is exact, as the agent's: a slash
// after an id is part of the id. It does not allocate.
func routeOf(path []byte) (r route, id []byte) {
	switch string(path) {
	case "/v2/metadata", "/v2/metadata/":
		return routeTask, nil
	case "/v2/stats", "/v2/stats/":
		return routeTaskStats, nil
	case "/v2/metadataWithTags", "/v2/metadataWithTags/", "/v2/metadata/taskWithTags":
		return routeTags, nil
	}
	const metadata, stats = "/v2/metadata/", "/v2/stats/"
	switch {
	case len(path) > len(metadata) && string(path[:len(metadata)]) == metadata:
		return routeContainer, path[len(metadata):]
	case len(path) > len(stats) && string(path[:len(stats)]) == stats:
		return routeContainerStats, path[len(stats):]
	}
	return routeOther, nil
}

// plainPath returns the path of a request target and true if the path can be used as it stands: it is
// absolute, holds no escape, and nothing in it may need cleaning. It does not allocate. A '#' is a
// character like any other: clients do not send fragments.
func plainPath(target []byte) ([]byte, bool) {
	if len(target) == 0 || target[0] != '/' {
		return nil, false
	}
	for i, ch := range target {
		switch ch {
		case '?':
			return target[:i], true
		case '%':
			return nil, false
		case '/', '.':
			if i > 0 && target[i-1] == '/' {
				return nil, false
			}
		}
	}
	return target, true
}

// parsePath is plainPath for all other targets. redirect is where the client should have asked, empty
// if it asked well. An error means that the target is none.
func parsePath(target []byte) (p []byte, redirect string, err error) {
	u, err := url.ParseRequestURI(string(target))
	if err != nil {
		return nil, "", err
	}
	if u.Opaque != "" || target[0] == '*' { // "mailto:x", or the server as a whole
		return nil, "", errNoPath
	}
	if clean := cleanPath(u.Path); clean != u.Path {
		u.Path = clean
		return nil, u.String(), nil
	}
	return []byte(u.Path), "", nil
}

var errNoPath = errors.New("request target without a path")

// cleanPath removes empty, "." and ".." elements and keeps a slash at the end, as the agent's router
// does (gorilla/mux, cleanPath).
func cleanPath(p string) string {
	clean := path.Clean("/" + p)
	if strings.HasSuffix(p, "/") && clean != "/" {
		clean += "/"
	}
	return clean
}

// hasNewline reports whether no pattern of the agent's router matches p: its dots match no newline.
func hasNewline(p []byte) bool { return bytes.IndexByte(p, '\n') >= 0 }
