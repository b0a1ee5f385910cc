package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httputil"
	"os"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"
)

// Every request that is passed on has a connection to the agent of its own, and is the last of the
// client's connection. So both directions can be copied as they come, bytes that nobody here
// understands included, and nothing that a client writes can become part of another request. Only
// what RFC 9110 calls hop-by-hop is not passed on.

// dialAgent connects to the agent, for as long as until deadline.
func (s *Server) dialAgent(deadline time.Time) (net.Conn, failure) {
	ctx, cancel := context.WithDeadline(s.life, deadline)
	defer cancel()
	up, err := s.dial(ctx, "tcp", s.agent)
	if err == nil {
		_ = up.SetDeadline(deadline) // fails only on a closed connection, which shows soon enough
		return up, served
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, noRoute // no agent here, or not now: nobody has the path
	}
	return nil, agentError(err)
}

func agentError(err error) failure {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return agentSlow
	}
	return agentFailed
}

// forward passes the request on to the agent and its answer back.
func (s *Server) forward(ctx *fasthttp.RequestCtx, c *conn) failure {
	h := &ctx.Request.Header
	head, ok := forwardedHead(nil, h)
	if !ok {
		return badRequest
	}
	length := int64(h.ContentLength())
	if length > s.cfg.MaxBodyBytes {
		return bodyTooLong
	}
	if !s.forwards.take() {
		return s.unforwarded(ctx, c, busy)
	}
	deadline := time.Now().Add(s.cfg.AgentTimeout)
	up, f := s.dialAgent(deadline)
	if f != served {
		s.forwards.give()
		return s.unforwarded(ctx, c, f)
	}
	x := &exchange{
		client: c, agent: up, head: head,
		body: ctx.RequestBodyStream(), length: length, limit: s.cfg.MaxBodyBytes,
		bodiless: ctx.IsHead(),
		guard:    s.guard,
		faults:   make(chan failure, 1), uploaded: make(chan struct{}),
	}
	// Not in the handler below: nobody promises that it is called.
	c.onClose(func() {
		_ = up.Close()
		s.forwards.give()
	})
	// Answers to pipelined requests before this one may still be in fasthttp's buffer: it writes
	// them before it calls the handler, which is why the exchange has to wait for it.
	s.hijack(ctx, func(net.Conn) {
		_ = c.SetDeadline(deadline.Add(lingering)) // after the agent's: there may be a 504 to write
		x.run()
	})
	return served
}

// unforwarded prepares an answer of our own to a request that did not reach the agent.
func (s *Server) unforwarded(ctx *fasthttp.RequestCtx, c *conn, why failure) failure {
	if f := s.finishBody(ctx); f != served {
		return f
	}
	s.setRateHeaders(ctx, c)
	return why
}

// forwardedHead appends the request as the agent is to get it, up to its body: the first line and the
// header lines as they were received, in their order and spelling, without those that concern
// this connection only. It returns false if there is more than one way to read the request.
func forwardedHead(dst []byte, h *fasthttp.RequestHeader) (head []byte, ok bool) {
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
			if bytes.EqualFold(n, name) && !isName(name, "Host") && !isName(name, "Content-Length") {
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
// "name: value\r\n": what one side reads as a continuation and the other does not is how requests get
// smuggled.
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
		if !ok || !isToken(name) || bytes.ContainsAny(value, "\r\n\x00") {
			return false
		}
		f(raw[:len(line)+2], name, bytes.TrimSpace(value))
		raw = rest
	}
	return true
}

// hasContentLength reports whether there is such a header line, or may be.
func hasContentLength(raw []byte) bool {
	found := false
	ok := eachLine(raw, func(_, name, _ []byte) {
		found = found || isName(name, "Content-Length")
	})
	return found || !ok
}

// isToken reports whether b is a token of RFC 9110, 5.6.2.
func isToken(b []byte) bool {
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
	for _, hop := range []string{"Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade"} {
		if isName(name, hop) {
			return true
		}
	}
	return false
}

// exchange is one request on its way to the agent, and the answer on its way back. The connections'
// deadlines bound it.
type exchange struct {
	client, agent net.Conn
	head          []byte
	body          io.Reader // nil: none
	length        int64     // of the body, -1: chunked
	limit         int64     // of the body
	bodiless      bool      // the answer has no body whatever its header says

	guard    func()        // deferred, handles a panic
	faults   chan failure  // gets what the client did wrong in its body
	uploaded chan struct{} // closed when nobody reads body any more
}

// lingering is how long a client may go on sending a body that nobody wants before its connection is
// closed. Closed at once, it could lose the answer with the reset.
const lingering = 500 * time.Millisecond

// run passes everything. It leaves closing the client's connection to its caller.
func (x *exchange) run() {
	go x.upload()
	begun, err := x.download()
	_ = x.agent.Close()
	if err != nil && !begun {
		f := agentError(err)
		select {
		case f = <-x.faults: // why the agent did not answer
		default:
		}
		_, _ = x.client.Write(rawAnswer(f))
	}
	select {
	case <-x.uploaded:
		return
	default:
	}
	if c, ok := x.client.(*conn); ok {
		if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
			_ = w.CloseWrite()
		}
	}
	_ = x.client.SetReadDeadline(time.Now().Add(lingering))
	<-x.uploaded
}

// upload sends the request. When the agent stops listening, it goes on reading, so that the client
// gets to the point of looking for the answer.
func (x *exchange) upload() {
	defer close(x.uploaded)
	defer x.guard()
	_, err := x.agent.Write(x.head)
	if x.body == nil {
		return
	}
	var to io.Writer = x.agent
	if x.length == -1 {
		to = httputil.NewChunkedWriter(x.agent)
	}
	buf := make([]byte, 16<<10)
	var total int64
	for {
		n, errRead := x.body.Read(buf)
		total += int64(n)
		if total > x.limit {
			x.fault(bodyTooLong)
			return
		}
		if err == nil && n > 0 {
			_, err = to.Write(buf[:n])
		}
		if errRead == nil {
			continue
		}
		if !errors.Is(errRead, io.EOF) || x.length >= 0 && total != x.length {
			x.fault(readError(errRead))
			return
		}
		if err == nil && x.length == -1 {
			_, _ = io.WriteString(x.agent, "0\r\n\r\n") // the client's trailers, if any, end here
		}
		return
	}
}

// fault ends the exchange because of something that the client did.
func (x *exchange) fault(f failure) {
	x.faults <- f
	_ = x.agent.Close()
}

// maxHeld is how many bytes of an answer's body are waited for before any of it is sent. An answer of
// no more than that which breaks off becomes a 502, not half an answer.
const maxHeld = 64 << 10

// download sends the answer and reports whether any of it has been sent.
func (x *exchange) download() (begun bool, err error) {
	r := bufio.NewReaderSize(x.agent, 16<<10)
	answer, length, err := answerHead(r, x.bodiless)
	if err != nil {
		return false, err
	}
	body, whole, err := hold(r, length)
	if err != nil {
		return false, err
	}
	if _, err := x.client.Write(append(answer, body...)); err != nil || whole {
		return true, err
	}
	if length >= 0 {
		_, err = io.CopyN(x.client, r, length-int64(len(body)))
	} else {
		_, err = io.Copy(x.client, r) // chunked as it came, or up to the end of the connection
	}
	return true, err
}

// hold reads the first maxHeld bytes of a body, as they come, or the whole of it if it is no longer.
func hold(r *bufio.Reader, length int64) (body []byte, whole bool, err error) {
	if length >= 0 {
		body = make([]byte, min(length, maxHeld))
		_, err = io.ReadFull(r, body)
		return body, length <= maxHeld, err
	}
	var raw bytes.Buffer
	from := io.TeeReader(io.LimitReader(r, maxHeld), &raw)
	if length == toEnd {
		_, err = io.Copy(io.Discard, from)
		return raw.Bytes(), err == nil && raw.Len() < maxHeld, err
	}
	chunks := bufio.NewReader(from)
	_, err = io.Copy(io.Discard, httputil.NewChunkedReader(chunks))
	for err == nil { // trailers, up to an empty line
		var line []byte
		if line, err = chunks.ReadSlice('\n'); len(bytes.TrimRight(line, "\r\n")) == 0 {
			break
		}
	}
	if err != nil && raw.Len() == maxHeld {
		return raw.Bytes(), false, nil
	}
	return raw.Bytes()[:raw.Len()-chunks.Buffered()], true, err
}

// maxAnswerHead bounds the status line and header of an answer of the agent.
const maxAnswerHead = 64 << 10

var errAnswer = errors.New("malformed answer")

// Lengths of a body that has none.
const (
	toEnd    = -1 // of the connection
	inChunks = -2
)

// answerHead reads an answer of the agent up to its body and returns it as the client is to get it,
// with the number of bytes that follow, toEnd or inChunks.
func answerHead(r *bufio.Reader, bodiless bool) (head []byte, length int64, err error) {
	for {
		raw, err := readHead(r)
		if err != nil {
			return nil, 0, err
		}
		line, rest, _ := bytes.Cut(raw, []byte("\r\n"))
		// HTTP/1.1 200 OK
		if len(line) < len("HTTP/1.1 200") || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[8] != ' ' || bytes.ContainsAny(line, "\r\x00") {
			return nil, 0, errAnswer
		}
		status := string(line[9:12])
		switch {
		case status == "101":
			return nil, 0, errAnswer // nobody asked
		case status[0] == '1':
			continue // fasthttp has said 100 Continue already
		case status == "204" || status == "304":
			bodiless = true
		}
		head = append(append(head, line...), "\r\n"...)
		length = toEnd
		framings := 0
		ok := eachLine(rest, func(line, name, value []byte) {
			switch {
			case isName(name, "Connection"), isName(name, "Keep-Alive"), isName(name, "Proxy-Connection"):
				return
			case isName(name, "Transfer-Encoding"):
				framings++
				length = inChunks
				if !isName(value, "chunked") {
					framings++
				}
			case isName(name, "Content-Length"):
				framings++
				if n, err := fasthttp.ParseUint(value); err == nil {
					length = int64(n)
				} else {
					framings++
				}
			}
			head = append(head, line...)
		})
		if !ok || framings > 1 { // nobody can tell where it ends
			return nil, 0, errAnswer
		}
		if bodiless {
			length = 0
		}
		return append(head, "Connection: close\r\n\r\n"...), length, nil
	}
}

// readHead reads up to and including the first empty line, and gives every line the end it should have.
func readHead(r *bufio.Reader) ([]byte, error) {
	var head []byte
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return nil, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if head = append(append(head, line...), "\r\n"...); len(head) > maxAnswerHead {
			return nil, fmt.Errorf("%w: header over %d bytes", errAnswer, maxAnswerHead)
		}
		if len(line) == 0 && len(head) > 2 {
			return head, nil
		}
	}
}
