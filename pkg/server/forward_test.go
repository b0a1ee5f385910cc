package server

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
)

// heldBytes is how much of an answer is held back until it is known to be whole.
const heldBytes = 64 << 10

// What the agent gets is what the client sent, and the other way round, byte for byte, but for the
// lines that concern one connection only.
func TestForwardBytes(t *testing.T) {
	f := func(name, sent, got, answered, received string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			t.Helper()
			a := rawAgent(t, func(c net.Conn) {
				r := bufio.NewReader(c)
				req, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, req.Body)
				_, _ = io.WriteString(c, answered)
				if w, ok := c.(*recordedConn).Conn.(*net.TCPConn); ok {
					_ = w.CloseWrite()
				}
				_, _ = io.Copy(io.Discard, r)
			})
			h := newHost(t, a.config(), newTask())
			c := h.dial(t, addrT)
			_, _ = io.WriteString(c, sent)
			if b := readAll(t, c); b != received {
				t.Errorf("client got\n%q, want\n%q", b, received)
			}
			h.quiet(t)
			if rs := a.requests(); len(rs) != 1 || rs[0] != got {
				t.Errorf("agent got\n%q, want\n%q", rs, got)
			}
		})
	}
	const ok, okGot = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"

	head := "FROB /v4/a%2Fb;p?q=%zz&&u=http://h/ HTTP/1.1\r\nHost: 169.254.170.2\r\naCCEPT: " +
		" a\t\r\nX-B: 1\r\nx-a: \xe9\r\nX-B: 2\r\n" +
		"Authorization: t=\r\nCookie: a=b; c\r\nUser-Agent:\r\nX-Forwarded-For: 1.2.3.4\r\n"
	answer := "HTTP/1.1 299 Very fine \r\nDate: yesterday\r\nServer: a\r\nset-cookie: " +
		"a=b\r\nX-Z: 1\r\nSet-Cookie: c=d\r\nContent-Length: 5\r\nx-y:\r\nContent-Type: " +
		"x\r\n"
	f("order and spelling", head+"\r\n", head+"Connection: close\r\n\r\n",
		answer+"\r\nhe\x00lo", answer+"Connection: close\r\n\r\nhe\x00lo")

	f("hop-by-hop stays here",
		"GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, X-Mine, "+
			"host\r\nKeep-Alive: 5\r\nX-Mine: 1\r\nProxy-Connection: x\r\nTE: "+
			"trailers\r\nTrailer: a\r\nUpgrade: h2c\r\nX-Other: 1\r\n\r\n",
		"GET /v4/x HTTP/1.1\r\nHost: h\r\nX-Other: 1\r\nConnection: close\r\n\r\n",
		"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: "+
			"timeout=5\r\nContent-Length: 2\r\n\r\nok", okGot)

	f("body", "PUT /api/e HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello", "PUT /api/e HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello", ok, okGot)
	f("body of a GET", "GET /api/e HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello", "GET /api/e HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello", ok, okGot)
	f("chunks", "PUT /api/e HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: "+
		"chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n",
		"PUT /api/e HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: "+
			"close\r\n\r\n5\r\nhello\r\n0\r\n\r\n", ok, okGot)
	f("expectation",
		"PUT /api/e HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: "+
			"100-continue\r\n\r\nhello",
		"PUT /api/e HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: "+
			"100-continue\r\nConnection: close\r\n\r\nhello",
		"HTTP/1.1 100 Continue\r\n\r\n"+ok, "HTTP/1.1 100 Continue\r\n\r\n"+okGot)
	f("HTTP/1.0", "GET /v4/x HTTP/1.0\r\n\r\n",
		"GET /v4/x HTTP/1.0\r\nConnection: close\r\n\r\n",
		"HTTP/1.0 200 OK\r\n\r\nok", "HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nok")
	f("absolute form", "GET http://h/v4/x HTTP/1.1\r\nHost: h\r\n\r\n", "GET http://h/v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", ok, okGot)
	f("HEAD", "HEAD /v4/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"HEAD /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n")
	f("not modified", "GET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\nConnection: close\r\n\r\n")
	chunked := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n"
	f("chunked answer", "GET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
		chunked+"\r\n1;ext=1\r\na\r\n2\r\nbc\r\n0\r\nX: 1\r\n\r\n",
		chunked+"Connection: close\r\n\r\n1;ext=1\r\na\r\n2\r\nbc\r\n0\r\nX: 1\r\n\r\n")
	f("more than it said", "GET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
		ok+"HTTP/1.1 200 OK\r\n\r\nsmuggled", okGot)
	f("end of connection", "GET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
		"HTTP/1.1 200\r\n\r\nuntil the end",
		"HTTP/1.1 200\r\nConnection: close\r\n\r\nuntil the end")
	failed := string(errAgentFailed.raw())
	const get, getGot = "GET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n",
		"GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
	for _, body := range []string{"Content-Length: 99\r\n\r\nok",
		"Transfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n5\r\nok",
		"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n", "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
		"Transfer-Encoding: gzip\r\n\r\nzz\r\n"} {
		f("closing mid-answer", get, getGot, "HTTP/1.1 200 OK\r\n"+body, failed)
	}
	// Of an answer that is too long to be held, the client gets what there is.
	long := strings.Repeat("x", 2*heldBytes)
	for _, h := range []string{"Content-Length: 999999\r\n", "",
		"Transfer-Encoding: chunked\r\n"} {
		body := long
		if strings.HasPrefix(h, "T") {
			body = fmt.Sprintf("%x\r\n%s", heldBytes+9, long)
		}
		f("closing mid-answer, long", get, getGot, "HTTP/1.1 200 OK\r\n"+h+"\r\n"+body, "HTTP/1.1 200 OK\r\n"+h+"Connection: close\r\n\r\n"+body)
	}
	for _, n := range []int{heldBytes - 1, heldBytes, heldBytes + 1} {
		body := long[:n]
		h := fmt.Sprintf("Content-Length: %d\r\n", n)
		f("as long as is held", get, getGot, "HTTP/1.1 200 OK\r\n"+h+"\r\n"+body, "HTTP/1.1 200 OK\r\n"+h+"Connection: close\r\n\r\n"+body)
		f("as long as is held, no length", get, getGot, "HTTP/1.1 200 OK\r\n\r\n"+body, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"+body)
		body = fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", n-15, body[15:])
		h = "Transfer-Encoding: chunked\r\n"
		f("as long as is held, chunks", get, getGot, "HTTP/1.1 200 OK\r\n"+h+"\r\n"+body, "HTTP/1.1 200 OK\r\n"+h+"Connection: close\r\n\r\n"+body)
	}
	f("no answer", "GET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n", "GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", "", failed)
	for _, garbage := range []string{"hello\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\n\r\n", "HTTP/2.0 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
		"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok", "HTTP/1.1 200 O\rK\r\n\r\n",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 70_000) + "\r\n\r\n", "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 20_000) + "\r\n"} {
		f("garbage", "GET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n", "GET /v4/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", garbage, failed)
	}
	// What was asked before it in the same breath is answered first; what comes after, not at
	// all.
	f("pipelined", "GET /none HTTP/1.1\r\nHost: h\r\n\r\nGET /v4/x HTTP/1.1\r\nHost: h\r\n\r\n", "GET /none HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", ok, okGot)
}

// A pipelined request that metad answers itself is answered before the one after it is passed on.
func TestForwardAfterPipelined(t *testing.T) {
	h := newHost(t, newAgent(t).config(), newTask())
	c := h.dial(t, addrT)
	_, _ = c.Write(append(request("/v2/metadata/"+idA),
		request("/v2/credentials/"+credentialsID)...))
	r := bufio.NewReader(c)
	if got := read(t, r, "GET"); !strings.HasPrefix(got.body, `{"DockerId":"`+idA) {
		t.Errorf("first: got %s", got.body)
	}
	want(t, read(t, r, "GET"), 200, typeJSON, credentials)
	h.quiet(t)
}

// echo sends back what it gets, in chunks or at once.
func echo(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).EnableFullDuplex()
	if r.ContentLength >= 0 {
		w.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
	}
	_, _ = io.Copy(w, r.Body)
}

func TestForwardLargeBodies(t *testing.T) {
	a := serveAgent(t, http.HandlerFunc(echo))
	h := newHost(t, a.config(), newTask())
	for _, size := range []int{1, 8 << 10, 8<<10 + 1, 1 << 20, 10 << 20} {
		for _, chunked := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/%v", size, chunked), func(t *testing.T) {
				body := make([]byte, size)
				for i := range body {
					body[i] = byte(i * i >> 8)
				}
				c := h.dial(t, addrT)
				go func() {
					w := bufio.NewWriter(c)
					defer w.Flush()
					if !chunked {
						fmt.Fprintf(w,
							"POST /api/e HTTP/1.1\r\nHost: "+
								"h\r\nContent-Length: %d\r\n\r\n",
							size)
						_, _ = w.Write(body)
						return
					}
					fmt.Fprintf(w,
						"POST /api/e HTTP/1.1\r\nHost: "+
							"h\r\nTransfer-Encoding: chunked\r\n\r\n")
					cw := httputil.NewChunkedWriter(w)
					for b := body; len(b) > 0; {
						n := min(len(b), 7001)
						_, _ = cw.Write(b[:n])
						b = b[n:]
					}
					_ = cw.Close()
					_, _ = io.WriteString(w, "\r\n")
				}()
				got := read(t, bufio.NewReader(c), "POST")
				if got.StatusCode != 200 ||
					sha256.Sum256([]byte(got.body)) != sha256.Sum256(body) {
					t.Errorf("got %d and %d bytes, want 200 and the %d sent",
						got.StatusCode, len(got.body), size)
				}
			})
		}
	}
	h.quiet(t)
	eventually(t, "agent's connections closed", func() bool { return a.connections() == 0 })
}

func TestForwardConcurrent(t *testing.T) {
	const clients = 1000
	a := serveAgent(t, http.HandlerFunc(echo))
	cfg := a.config()
	cfg.MaxConnsPerTask, cfg.MaxForwards, cfg.AgentTimeout = clients, 2*clients, time.Minute
	h := newHost(t, cfg, newTask())
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			body := strings.Repeat(fmt.Sprintf("%04d", i), 1+i%64)
			c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: addrT.AsSlice()}}).Dial(
				"tcp", h.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			fmt.Fprintf(c,
				"POST /api/%d HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s",
				i, len(body), body)
			b, err := io.ReadAll(c)
			if err != nil || !bytes.HasSuffix(b, []byte("\r\n\r\n"+body)) ||
				!bytes.HasPrefix(b, []byte("HTTP/1.1 200 OK\r\n")) {
				t.Errorf("client %d: got %q, %v", i, b, err)
			}
		})
	}
	wg.Wait()
	h.quiet(t)
	eventually(t, "agent's connections closed", func() bool { return a.connections() == 0 })
}

// The agent that answers before it has the body, and reads no more of it.
func TestForwardEarlyAnswer(t *testing.T) {
	a := rawAgent(t, func(c net.Conn) {
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, _ = io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
	})
	cfg := a.config()
	cfg.AgentTimeout = time.Hour // not what ends it
	h := newHost(t, cfg, newTask())
	c := h.dial(t, addrT)
	fmt.Fprintf(c, "POST /api/e HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s", 4<<20,
		strings.Repeat("x", 20<<10))
	want(t, read(t, bufio.NewReader(c), "POST"), 413, "", "no")
	h.quiet(t)
}

// An answer ends where it says, not when the agent closes.
func TestForwardAnswerEnds(t *testing.T) {
	for method, answer := range map[string]string{
		"GET":  "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n",
		"PUT":  "HTTP/1.1 204 No Content\r\n",
		"HEAD": "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n",
		"POST": "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n",
		"SEND": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n",
	} {
		body := ""
		if method == "SEND" {
			body = "2\r\nok\r\n0\r\nX: y\r\n\r\n"
		}
		a := rawAgent(t, func(c net.Conn) {
			_, _ = io.WriteString(c, answer+"\r\n"+body)
			_, _ = io.Copy(io.Discard, c)
		})
		cfg := a.config()
		cfg.AgentTimeout = time.Hour
		h := newHost(t, cfg, newTask())
		c := h.dial(t, addrT)
		_, _ = io.WriteString(c, method+" /v4/x HTTP/1.1\r\nHost: h\r\n\r\n")
		if got := readAll(t, c); got != answer+"Connection: close\r\n\r\n"+body {
			t.Errorf("%s: got %q", method, got)
		}
		h.quiet(t)
	}
}

// The client that leaves in the middle of its body: the agent must not take what came for all of
// it.
func TestForwardClientLeaves(t *testing.T) {
	for _, framing := range []string{"Content-Length: 100000\r\n\r\n",
		"Transfer-Encoding: chunked\r\n\r\n3000\r\n"} {
		ended := make(chan error, 1)
		a := serveAgent(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			_, err := io.Copy(io.Discard, r.Body)
			ended <- err
		}))
		cfg := a.config()
		cfg.AgentTimeout = time.Hour // not what ends it
		h := newHost(t, cfg, newTask())
		c := h.dial(t, addrT)
		_, _ = io.WriteString(c, "POST /api/e HTTP/1.1\r\nHost: h\r\n"+framing+
			strings.Repeat("x", 9000))
		eventually(t, "agent has the request", func() bool { return a.connections() == 1 })
		_ = c.Close()
		select {
		case err := <-ended:
			if err == nil {
				t.Errorf("%q: the agent took part of a body for all of it", framing)
			}
		case <-time.After(time.Minute):
			t.Fatal("the agent still waits for the body")
		}
		h.quiet(t)
	}
}

// The client that leaves in the middle of the answer.
func TestForwardClientLeavesAnswer(t *testing.T) {
	ended := make(chan error, 1)
	a := rawAgent(t, func(c net.Conn) {
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		for err == nil {
			_, err = c.Write(make([]byte, 64<<10))
		}
		ended <- err
	})
	cfg := a.config()
	cfg.AgentTimeout = time.Minute
	h := newHost(t, cfg, newTask())
	c := h.dial(t, addrT)
	_, _ = c.Write(request("/v4/x"))
	_, _ = io.ReadFull(c, make([]byte, 100))
	_ = c.Close()
	<-ended
	h.quiet(t)
}

func TestForwardFailures(t *testing.T) {
	f := func(name string, cfg Config, raw string, status int, contentType, text string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			t.Helper()
			h := newHost(t, cfg, newTask())
			r := h.send(t, addrT, raw)
			if r.StatusCode != status || r.Header.Get("Content-Type") != contentType ||
				!strings.Contains(r.body, text) {
				t.Errorf("got %d %s", r.StatusCode, r.body)
			}
			h.quiet(t)
		})
	}
	at := func(addr string) Config {
		cfg := testConfig()
		cfg.AgentURL = "http://" + addr
		return cfg
	}
	get, put := string(request("/api/x")),
		"PUT /api/x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
	f("none", testConfig(), get, 404, typeText, "404 page not found\n")
	f("gone", at(refusing(t)), get, 404, typeText, "404 page not found\n")
	f("gone, body", at(refusing(t)), put, 404, typeText, "404 page not found\n")
	slow := at(mute(t))
	slow.AgentTimeout = 50 * time.Millisecond
	f("slow", slow, get, 504, typeJSON, `"code":"AgentTimeout"`)
	f("slow, body", slow, put, 504, typeJSON, `"code":"AgentTimeout"`)
	half := at(rawAgent(t, func(c net.Conn) {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
		_, _ = io.Copy(io.Discard, c)
	}).addr)
	half.AgentTimeout = 50 * time.Millisecond
	f("stalls in its answer", half, get, 504, typeJSON, `"code":"AgentTimeout"`)
	f("closes", at(rawAgent(t, func(net.Conn) {}).addr), get, 502, typeJSON, `"code":"AgentFailed"`)
	unasked := newAgent(t)
	big := unasked.config()
	big.MaxBodyBytes = 4
	f("too long", big, put, 413, typeText, "413 Request Entity Too Large")
	if n := len(unasked.requests()); n != 0 {
		t.Errorf("the agent got %d requests", n)
	}
	endless := at(mute(t)) // an agent that answers before it has the body would be heard
	endless.MaxBodyBytes = 4
	f("too long in the end", endless, "PUT /v4/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 413, typeText, "413")
	f("bad chunk", at(mute(t)), "PUT /v4/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, typeText, "400 Bad Request")
	// Not to be over before the agent is connected: then the body would be read to its end
	// first.
	stalled := at(mute(t))
	stalled.AgentTimeout = time.Second
	f("client stalls", stalled, "PUT /v4/x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n"+strings.Repeat("x", 9000), 504, typeJSON, "AgentTimeout")
}

func TestForwardBusy(t *testing.T) {
	cfg := testConfig()
	cfg.AgentURL = "http://" + mute(t)
	cfg.MaxForwards = 1
	h := newHost(t, cfg, newTask())
	c := h.dial(t, addrT)
	_, _ = c.Write(request("/v4/x"))
	eventually(t, "passed on", func() bool { return h.forwards.count() == 1 })
	r := h.get(t, addrT, "/v4/x")
	if r.StatusCode != 503 || r.Header.Get("Retry-After") != "1" ||
		!strings.Contains(r.body, `"code":"Busy"`) {
		t.Errorf("got %d %v %s", r.StatusCode, r.Header, r.body)
	}
	// What metad knows itself it still answers.
	if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 200 {
		t.Errorf("got %d", r.StatusCode)
	}
}

// What two servers could read differently never reaches the agent.
func TestForwardSmuggling(t *testing.T) {
	a := newAgent(t)
	h := newHost(t, a.config(), newTask())
	f := func(name, headers, body string) {
		t.Helper()
		for _, target := range []string{"/v4/x", "/v2/metadata"} {
			c := h.dial(t, addrT)
			_, _ = io.WriteString(c, "POST "+target+" HTTP/1.1\r\nHost: h\r\n"+headers+
				"\r\n"+body)
			r := read(t, bufio.NewReader(c), "POST")
			if r.StatusCode != 400 {
				t.Errorf("%s, %s: got %d, want 400", name, target, r.StatusCode)
			}
		}
	}
	const chunks = "5\r\nhello\r\n0\r\n\r\n"
	f("both lengths", "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", chunks)
	f("both lengths, other order", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", chunks)
	f("two lengths", "Content-Length: 5\r\nContent-Length: 6\r\n", "hello!")
	f("same length twice", "Content-Length: 5\r\nContent-Length: 5\r\n", "hello")
	f("length list", "Content-Length: 5, 5\r\n", "hello")
	f("signed length", "Content-Length: +5\r\n", "hello")
	f("huge length", "Content-Length: 99999999999999999999\r\n", "hello")
	f("hex length", "Content-Length: 0x5\r\n", "hello")
	f("two encodings", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", chunks)
	f("encoding list", "Transfer-Encoding: gzip, chunked\r\n", chunks)
	f("unknown encoding", "Transfer-Encoding: xchunked\r\n", chunks)
	f("vertical tab", "Transfer-Encoding: \x0bchunked\r\n", chunks)
	f("space before colon", "Transfer-Encoding : chunked\r\n", chunks)
	f("folded", "X: y\r\n Transfer-Encoding: chunked\r\nContent-Length : 5\r\n", "hello")
	f("nul", "X: a\x00b\r\n", "")
	f("bare line feed", "X: y\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n", chunks)
	f("no name", ": x\r\n", "")
	if got := a.requests(); len(got) != 0 {
		t.Errorf("the agent got %q", got)
	}

	// Where only one reading is passed on, the agent gets that.
	only := func(name, raw string) {
		t.Helper()
		r := h.send(t, addrT, raw)
		if r.StatusCode != 400 {
			t.Errorf("%s: got %d, want 400", name, r.StatusCode)
		}
	}
	only("identity", "POST /v4/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello")
	only("identity alone", "POST /v4/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n")
	only("folded", "GET /v4/x HTTP/1.1\r\nHost: h\r\nX: y\r\n z\r\n\r\n")
	only("name with space", "GET /v4/x HTTP/1.1\r\nHost: h\r\nX Y: z\r\n\r\n")
	only("encoding in HTTP/1.0", "POST /v4/x HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"+chunks)
	only("tunnel", "CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n")
	only("tunnel by path", "CONNECT /v4/x HTTP/1.1\r\nHost: h\r\n\r\n")
	if got := a.requests(); len(got) != 0 {
		t.Errorf("the agent got %q", got)
	}
	h.quiet(t)
}

// A real SDK gets its credentials, and its errors.
func TestForwardSDK(t *testing.T) {
	h := newHost(t, newAgent(t).config(), newTask())
	get := func(id string) (aws.Credentials, error) {
		return endpointcreds.New("http://"+h.addr+"/v2/credentials/"+id,
			func(o *endpointcreds.Options) {
				o.Retryer = aws.NopRetryer{}
			}).Retrieve(t.Context())
	}
	got, err := get(credentialsID)
	if err != nil || got.AccessKeyID != "AKIA" || got.SecretAccessKey != "s" ||
		got.SessionToken != "t" || !got.CanExpire {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := get("unknown"); err == nil || !strings.Contains(err.Error(),
		"InvalidIdInRequest") {
		t.Errorf("unknown id: got %v", err)
	}
	h.agent.Timeout = 50 * time.Millisecond
	h.agent.Addr = mute(t)
	if _, err := get(credentialsID); err == nil || !strings.Contains(err.Error(),
		"AgentTimeout") {
		t.Errorf("mute agent: got %v", err)
	}
}
