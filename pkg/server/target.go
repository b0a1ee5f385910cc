package server

import (
	"bytes"
	"errors"
	"net/url"
	"path"
	"strings"
)

// plainPath returns the path of a request target and true if the path can be used as it stands: it
// is absolute, holds no escape, and nothing in it may need cleaning. It does not allocate. A '#' is
// a character like any other: clients do not send fragments.
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

// parsePath is plainPath for all other targets. redirect is the path that the client should use
// instead, or empty. An error means that the target is malformed.
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

// cleanPath removes empty, "." and ".." elements and keeps a slash at the end, as the agent's
// router does (gorilla/mux, cleanPath).
func cleanPath(p string) string {
	clean := path.Clean("/" + p)
	if strings.HasSuffix(p, "/") && clean != "/" {
		clean += "/"
	}
	return clean
}

// hasNewline reports whether p has a newline. The agent's router matches no such path, because the
// dots of its patterns do not match a newline.
func hasNewline(p []byte) bool { return bytes.IndexByte(p, '\n') >= 0 }
