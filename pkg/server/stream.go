package server

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"
)

// streamBuffer is how many bytes of a stream the kernel may hold for a client that does not read.
const streamBuffer = 16 << 10

// wantsStream reports whether the query requests a stream. A HEAD request never does.
func wantsStream(ctx *fasthttp.RequestCtx) bool {
	return !ctx.IsHead() && len(ctx.URI().QueryString()) > 0 &&
		ctx.QueryArgs().GetBool("stream")
}

// stream answers with the lines that write writes, until write returns. It buffers nothing for a
// client that reads too slowly, but closes its connection. write gets its own copy of the request.
func (s *Server) stream(ctx *fasthttp.RequestCtx, c *conn, write func(*lines, *question)) *failure {
	if !s.streams.take(c.src) {
		return errBusy
	}
	c.onClose(func() { s.streams.give(c.src) })
	req := c.question
	req.target.name = bytes.Clone(req.target.name) // fasthttp will reuse the memory
	l := &lines{c: c, timeout: s.cfg.WriteTimeout, chunked: ctx.Request.Header.IsHTTP11(),
		stopped: s.stopped, gone: make(chan struct{})}
	l.buf = streamHead(ctx, l.chunked)
	if tc, ok := c.Conn.(*net.TCPConn); ok {
		_ = tc.SetWriteBuffer(streamBuffer) // only so that a slow client is noticed sooner
	}
	s.hijack(ctx, func(nc net.Conn) {
		defer func() {
			// fasthttp reuses the reader's buffer after this
			_ = c.SetReadDeadline(time.Unix(1, 0))
			<-l.gone
		}()
		go l.watch(nc)
		if l.flush() {
			write(l, &req)
			l.end()
		}
	})
	return nil
}

// streamHead returns the head of the answer.
func streamHead(ctx *fasthttp.RequestCtx, chunked bool) []byte {
	head := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nDate: %s\r\nContent-Type: %s\r\n",
		time.Now().UTC().Format(http.TimeFormat), typeJSON)
	for name, value := range ctx.Response.Header.All() {
		if len(name) > 2 && name[0] == 'X' { // the rate limiter's
			head = fmt.Appendf(head, "%s: %s\r\n", name, value)
		}
	}
	if chunked {
		head = append(head, "Transfer-Encoding: chunked\r\n"...)
	}
	return append(head, "Connection: close\r\n\r\n"...)
}

// lines writes the lines of one stream. It is for one goroutine.
type lines struct {
	c       *conn
	timeout time.Duration // for one line
	chunked bool
	buf     []byte // to be written
	failed  bool   // the client left, or was too slow

	stopped <-chan struct{} // closed when the server stops
	gone    chan struct{}   // closed when the client leaves
}

// watch reads from the client until it leaves. The client sends nothing more.
func (l *lines) watch(nc net.Conn) {
	defer close(l.gone)
	var b [1]byte
	for {
		if _, err := nc.Read(b[:]); err != nil {
			return
		}
	}
}

// write writes json and a newline. It returns false if the client left or is too slow.
func (l *lines) write(json []byte) bool {
	l.buf = l.buf[:0]
	if l.chunked {
		l.buf = strconv.AppendInt(l.buf, int64(len(json)+1), 16)
		l.buf = append(l.buf, "\r\n"...)
	}
	l.buf = append(append(l.buf, json...), '\n')
	if l.chunked {
		l.buf = append(l.buf, "\r\n"...)
	}
	return l.flush()
}

// flush writes the buffer.
func (l *lines) flush() bool {
	_ = l.c.SetWriteDeadline(time.Now().Add(l.timeout))
	if _, err := l.c.Write(l.buf); err != nil {
		l.failed = true
	}
	return !l.failed
}

// end tells the client, if it is still there, that no more lines will come.
func (l *lines) end() {
	if l.chunked && !l.failed {
		l.buf = append(l.buf[:0], "0\r\n\r\n"...)
		l.flush()
	}
}

// next returns the next value of news. It returns false if news is closed, the client left or the
// server stops.
func next[T any](l *lines, news <-chan T) (v T, ok bool) {
	select {
	case v, ok = <-news:
		return v, ok
	case <-l.stopped:
	case <-l.gone:
		l.failed = true
	}
	return v, false
}
