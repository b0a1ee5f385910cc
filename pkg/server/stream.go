package server

import (
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"

	"metad/pkg/task"
)

// streamBuffer is how many bytes of a stream the kernel may hold for a client that does not read.
const streamBuffer = 16 << 10

// stream answers with a line for each new sample of the container until it stops, the client leaves, or
// the client is too slow: nothing is kept for it here.
func (s *Server) stream(ctx *fasthttp.RequestCtx, c *conn, id string) *failure {
	if !s.streams.take() {
		return errBusy
	}
	samples, cancel := s.cfg.Samples.Subscribe(id)
	c.onClose(func() {
		cancel()
		s.streams.give()
	})
	chunked := ctx.Request.Header.IsHTTP11()
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
	head = append(head, "Connection: close\r\n\r\n"...)
	if tc, ok := c.Conn.(*net.TCPConn); ok {
		_ = tc.SetWriteBuffer(streamBuffer) // only makes the slow client's end come sooner
	}
	s.hijack(ctx, func(nc net.Conn) {
		gone := make(chan struct{})
		defer func() {
			_ = c.SetReadDeadline(time.Unix(1, 0)) // the reader's buffer is fasthttp's again after this
			<-gone
		}()
		go func() {
			defer close(gone)
			var b [1]byte
			for {
				if _, err := nc.Read(b[:]); err != nil {
					return
				}
			}
		}()
		s.writeSamples(c, head, samples, chunked, gone)
	})
	return nil
}

// writeSamples writes buf and then a line for each sample.
func (s *Server) writeSamples(c *conn, buf []byte, samples <-chan *task.Sample, chunked bool, gone <-chan struct{}) {
	for {
		_ = c.SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
		if _, err := c.Write(buf); err != nil {
			return
		}
		select {
		case sample, ok := <-samples:
			if ok {
				buf = appendLine(buf[:0], sample.JSON[:sample.V2], chunked)
				continue
			}
		case <-s.stopped:
		case <-gone:
			return
		}
		if chunked {
			_, _ = c.Write([]byte("0\r\n\r\n"))
		}
		return
	}
}

// appendLine appends json, the brace that ends it and a newline, as a chunk if chunked.
func appendLine(dst, json []byte, chunked bool) []byte {
	if chunked {
		dst = strconv.AppendInt(dst, int64(len(json)+len("}\n")), 16)
		dst = append(dst, "\r\n"...)
	}
	dst = append(append(dst, json...), "}\n"...)
	if chunked {
		dst = append(dst, "\r\n"...)
	}
	return dst
}
