package server

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"metad/pkg/task"
)

// Slowloris: a request that does not get on loses its connection, and with it what it held.
func TestSlowRequests(t *testing.T) {
	cfg := testConfig()
	cfg.ReadTimeout, cfg.IdleTimeout = 100*time.Millisecond, 100*time.Millisecond
	h := newHost(t, cfg, newTask())
	f := func(name, sent, status string) {
		t.Helper()
		c := h.dial(t, addrT)
		_, _ = io.WriteString(c, sent)
		stop := make(chan struct{})
		go func() { // never silent for long
			for {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond):
					_, _ = io.WriteString(c, "x")
				}
			}
		}()
		b, _ := io.ReadAll(c) // may end in a reset: we go on writing
		close(stop)
		if !strings.HasPrefix(string(b), status) {
			t.Errorf("%s: got %q, want %q", name, b, status)
		}
	}
	f("first line", "GE", "HTTP/1.1 408 ")
	f("header", "GET /v2/metadata HTTP/1.1\r\nHost: x\r\nX-A: ", "HTTP/1.1 408 ")
	f("body", "POST /v2/metadata HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", "HTTP/1.1 408 ")
	c := h.dial(t, addrT) // nothing at all
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 && !strings.HasPrefix(string(b),
		"HTTP/1.1 408 ") {
		t.Errorf("silence: got %q, %v", b, err)
	}
	c = h.dial(t, addrT) // nothing more
	_, _ = c.Write(request("/v2/metadata"))
	if b, err := io.ReadAll(c); err != nil || strings.Count(string(b), "HTTP/1.1") != 1 {
		t.Errorf("idle: got %q, %v", b, err)
	}
	h.quiet(t)
}

// A client that asks and does not read does not keep its connection.
func TestSlowReader(t *testing.T) {
	tk := newTask()
	for i := range 200 {
		c := running(fmt.Sprintf("%064x", i), "c")
		c.Labels = map[string]string{"k": strings.Repeat("x", 10_000)}
		tk.Containers = append(tk.Containers, c)
	}
	cfg := testConfig()
	cfg.WriteTimeout = 100 * time.Millisecond
	h := newHost(t, cfg, tk)
	c := h.dial(t, addrT)
	_ = c.(*net.TCPConn).SetReadBuffer(4096)
	for range 10 {
		_, _ = c.Write(request("/v2/metadata"))
	}
	eventually(t, "accepted", func() bool { return h.Counters().Open == 1 })
	h.quiet(t)
}

func TestHugeRequests(t *testing.T) {
	h := newHost(t, testConfig(), newTask())
	f := func(name, raw string, status int) {
		t.Helper()
		c := h.dial(t, addrT)
		go func() { _, _ = io.WriteString(c, raw) }()
		if r := read(t, bufio.NewReader(c), "GET"); r.StatusCode != status ||
			status != 200 && !r.Close {
			t.Errorf("%s: got %d, close %v; want %d", name, r.StatusCode, r.Close,
				status)
		}
	}
	line := "X-A: " + strings.Repeat("x", 90) + "\r\n"
	f("header", "GET /v2/metadata HTTP/1.1\r\nHost: x\r\n"+strings.Repeat(line, 1000)+"\r\n", 431)
	f("one line", "GET /v2/metadata HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", 9000)+"\r\n\r\n", 431)
	f("first line", "GET /"+strings.Repeat("x", 9000)+" HTTP/1.1\r\nHost: x\r\n\r\n", 431)
	f("just fits", "GET /v2/metadata HTTP/1.1\r\nHost: x\r\n"+strings.Repeat(line, 70)+"\r\n", 200)
}

// Bodies that nobody wants do not become requests.
func TestUnwantedBodies(t *testing.T) {
	h := newHost(t, testConfig(), newTask())
	smuggled := "GET /v2/metadata/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, size := range []int{len(smuggled), 20 << 10, maxSkippedBody} {
		body := strings.Repeat("\r\n", (size-len(smuggled))/2) + smuggled
		for _, head := range []string{
			fmt.Sprintf("POST /v2/metadata HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body),
			fmt.Sprintf("POST /v2/metadata HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n%s", len(body), body),
			fmt.Sprintf("POST /v2//stats HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body),
			fmt.Sprintf("PUT /v2/%%0a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body),
			fmt.Sprintf("GET /nope HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body),
		} {
			c := h.dial(t, addrT)
			go func() {
				_, _ = io.WriteString(c, head)
				_, _ = c.Write(
					[]byte("GET /v2/metadata/next HTTP/1.1\r\nHost: " +
						"x\r\nConnection: close\r\n\r\n"))
			}()
			all := readAll(t, c)
			if strings.Contains(all, "smuggled") || !strings.Contains(all, "'next'") {
				t.Errorf("%.60q, %d bytes: got %q", head, size, all)
			}
		}
	}
	c := h.dial(t, addrT)
	go func() {
		fmt.Fprintf(c,
			"POST /v2/metadata HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n",
			maxSkippedBody+100)
		_, _ = c.Write(make([]byte, maxSkippedBody+100))
	}()
	if r := read(t, bufio.NewReader(c), "POST"); r.StatusCode != 200 || !r.Close {
		t.Errorf("too long to skip: got %d, close %v", r.StatusCode, r.Close)
	}
}

func TestPipelining(t *testing.T) {
	h := newHost(t, testConfig(), newTask())
	c := h.dial(t, addrT)
	const n = 500
	go func() {
		for i := range n {
			fmt.Fprintf(c, "GET /v2/metadata/%d HTTP/1.1\r\nHost: x\r\n\r\n", i)
		}
	}()
	r := bufio.NewReader(c)
	for i := range n {
		want(t, read(t, r, "GET"), 400, typeJSON, fmt.Sprintf(`"Unable to generate metadata for container '%d'"`, i))
	}
}

func TestOddRequests(t *testing.T) {
	h := newHost(t, testConfig(), newTask())
	doc := taskDocument(task.V2, newTask())
	ok := func(raw string) {
		t.Helper()
		want(t, h.send(t, addrT, raw), 200, typeJSON, doc)
	}
	ok("GET http://169.254.170.2/v2/metadata HTTP/1.1\r\nHost: x\r\n\r\n")
	ok("GET http://other.example:99/v2/metadata?x HTTP/1.1\r\nHost: x\r\n\r\n")
	ok("GET /v2/metadata HTTP/1.0\r\n\r\n")
	ok("GET /v2/%6detadata HTTP/1.1\r\nHost: x\r\n\r\n")
	ok("GET /v2/metadata HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\n\r\n")
	ok("\r\nGET /v2/metadata HTTP/1.1\r\nHost: x\r\n\r\n")

	r := h.send(t, addrT, "GET /v2/metadata HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
	if r.StatusCode != 200 || r.Header.Get("Connection") != "keep-alive" {
		t.Errorf("HTTP/1.0 with keep-alive: got %d %v", r.StatusCode, r.Header)
	}
	c := h.dial(t, addrT)
	_, _ = io.WriteString(c, "GET /v2/metadata HTTP/1.0\r\n\r\n")
	// and closed, or this would not return
	if all := readAll(t, c); !strings.HasSuffix(all, doc) {
		t.Errorf("HTTP/1.0: got %q", all)
	}

	for _, connection := range []string{"close", "Close", "keep-alive, CLOSE", "x ,close , y"} {
		c := h.dial(t, addrT)
		_, _ = io.WriteString(c, "GET /v2/metadata HTTP/1.1\r\nHost: x\r\nConnection: "+
			connection+"\r\n\r\n")
		r := bufio.NewReader(c)
		if got := read(t, r, "GET"); !got.Close {
			t.Errorf("Connection: %s: stays open", connection)
		}
	}
	if r := h.get(t, addrT, "/v2/metadata", "Connection: closed"); r.Close {
		t.Error("Connection: closed: is closed")
	}

	f := func(raw string, status int) {
		t.Helper()
		r := h.send(t, addrT, raw)
		if r.StatusCode != status || !r.Close {
			t.Errorf("%q: got %d, close %v; want %d and closed", raw, r.StatusCode,
				r.Close, status)
		}
	}
	f("GET /v2/metadata/%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("GET /v2/metadata/% HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("GET /v2/metadata/\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("GET /v2/metadata\x7f HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("GET v2/metadata HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("GET mailto:x HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("GET /v2/metadata HTTP/1.1\r\n\r\n", 400)
	f("GET /v2/metadata HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400)
	f("GET /v2/metadata\r\n\r\n", 400)
	f("GET  HTTP/1.1\r\nHost: x\r\n\r\n", 400)
	f("\x16\x03\x01\x02\x00\x01\r\n\r\n", 400)
	f("GET /v2/metadata HTTP/1.2\r\nHost: x\r\n\r\n", 505)
	f("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
	f("GET /v2/metadata HTTP/1.1\r\nHost: x\r\nExpect: miracle\r\n\r\n", 417)
	f("POST /v2/metadata HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400)
	h.quiet(t)
}
