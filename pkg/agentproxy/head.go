package agentproxy

import (
	"bytes"

	"github.com/valyala/fasthttp"
)

// requestHead appends the request as the agent is to get it, up to its body: the first line and the
// header lines as they were received, in their order and spelling, without those that concern the
// client's connection only. It returns false if there is more than one way to read the request.
func requestHead(dst []byte, h *fasthttp.RequestHeader) (head []byte, ok bool) {
	if h.IsConnect() { // a tunnel, not a request
		return nil, false
	}
	var hop [][]byte // names that a Connection line declares hop-by-hop
	var lengths, encodings int
	ok = eachLine(h.RawHeaders(), func(_, name, value []byte) {
		switch {
		case isName(name, "Connection"):
			for token := range bytes.SplitSeq(value, []byte(",")) {
				hop = append(hop, bytes.TrimSpace(token))
			}
		case isName(name, "Content-Length"):
			lengths++
		case isName(name, "Transfer-Encoding"):
			encodings++
		}
	})
	chunked := h.ContentLength() == -1
	if !ok || lengths+encodings > 1 || (encodings == 1) != chunked {
		return nil, false
	}
	dst = append(dst, h.Method()...)
	dst = append(dst, ' ')
	dst = append(dst, h.RequestURI()...)
	dst = append(dst, ' ')
	dst = append(dst, h.Protocol()...)
	dst = append(dst, "\r\n"...)
	_ = eachLine(h.RawHeaders(), func(line, name, _ []byte) {
		if isHopByHop(name) {
			return
		}
		for _, n := range hop {
			if bytes.EqualFold(n, name) && !isName(name, "Host") &&
				!isName(name, "Content-Length") {
				return
			}
		}
		dst = append(dst, line...)
	})
	if chunked {
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
	}
	return append(dst, "Connection: close\r\n\r\n"...), true
}

// eachLine calls f for each header line (with its line end), or returns false if one is not exactly
// "name: value\r\n". A line that one server reads as a continuation and another does not is a way
// to smuggle a request.
func eachLine(raw []byte, f func(line, name, value []byte)) bool {
	for len(raw) > 0 {
		line, rest, ok := bytes.Cut(raw, []byte("\r\n"))
		if !ok {
			return false
		}
		if len(line) == 0 {
			return true
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok || !IsToken(name) || bytes.ContainsAny(value, "\r\n\x00") {
			return false
		}
		f(raw[:len(line)+2], name, bytes.TrimSpace(value))
		raw = rest
	}
	return true
}

// HasContentLength reports whether a request's raw header has such a line, or may have.
func HasContentLength(raw []byte) bool {
	found := false
	ok := eachLine(raw, func(_, name, _ []byte) {
		found = found || isName(name, "Content-Length")
	})
	return found || !ok
}

// IsToken reports whether b is a token of RFC 9110, 5.6.2.
func IsToken(b []byte) bool {
	for _, ch := range b {
		switch {
		case 'a' <= ch && ch <= 'z', 'A' <= ch && ch <= 'Z', '0' <= ch && ch <= '9':
		case bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), ch) >= 0:
		default:
			return false
		}
	}
	return len(b) > 0
}

func isName(name []byte, want string) bool {
	return len(name) == len(want) && bytes.EqualFold(name, []byte(want))
}

func isHopByHop(name []byte) bool {
	for _, hop := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "TE",
		"Trailer", "Transfer-Encoding", "Upgrade"} {
		if isName(name, hop) {
			return true
		}
	}
	return false
}
