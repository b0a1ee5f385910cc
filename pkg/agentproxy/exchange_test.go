package agentproxy

import (
	"bufio"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
)

type panicReader struct{}

func (panicReader) Read([]byte) (int, error) { panic("read") }

// A body is read in a goroutine of the exchange: a panic there goes to the exchange's Guard, and
// the exchange ends all the same.
func TestPanicInBody(t *testing.T) {
	client, clients := net.Pipe()
	up, agents := net.Pipe()
	go func() {
		_, _ = bufio.NewReader(agents).ReadString('\n')
		_, _ = io.WriteString(agents, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		_, _ = io.Copy(io.Discard, agents)
	}()
	go func() { _, _ = io.Copy(io.Discard, clients) }()
	a := &Agent{MaxBodyBytes: 1, Timeout: time.Minute}
	var h fasthttp.RequestHeader
	if err := h.Read(
		bufio.NewReader(strings.NewReader("POST / HTTP/1.1\r\nHost: h\r\n" +
			"Content-Length: 1\r\n\r\n"))); err != nil {
		t.Fatal(err)
	}
	x, err := a.Prepare(&h, panicReader{})
	if err != nil {
		t.Fatal(err)
	}
	guarded := make(chan any, 1)
	x.agent, x.deadline = up, time.Now().Add(time.Minute)
	x.Guard = func() { guarded <- recover() }
	x.Run(client)
	if got := <-guarded; got != "read" {
		t.Errorf("guarded against %v, want the panic", got)
	}
}
