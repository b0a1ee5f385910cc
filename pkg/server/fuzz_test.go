package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"metad/pkg/task"
)

// onceConn is a connection on which everything has been sent before the server looks.
type onceConn struct {
	in     bytes.Reader
	out    bytes.Buffer
	closed chan struct{}
	once   sync.Once
}

func newOnceConn(raw []byte) *onceConn {
	c := &onceConn{closed: make(chan struct{})}
	c.in.Reset(raw)
	return c
}

func (c *onceConn) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c *onceConn) Write(p []byte) (int, error) { return c.out.Write(p) }
func (c *onceConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}
func (c *onceConn) LocalAddr() net.Addr { return &net.TCPAddr{} }
func (c *onceConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(addrT, 1))
}
func (c *onceConn) SetDeadline(time.Time) error      { return nil }
func (c *onceConn) SetReadDeadline(time.Time) error  { return nil }
func (c *onceConn) SetWriteDeadline(time.Time) error { return nil }

// serveOnce lets h answer raw as T's, and returns what it wrote.
func (h *host) serveOnce(t testing.TB, raw []byte) []byte {
	t.Helper()
	c := newOnceConn(raw)
	nc, err := (&listener{s: h.Server}).admit(c)
	if err != nil {
		t.Fatal(err)
	}
	_ = h.http.ServeConn(nc) // the malformed is an error to fasthttp
	<-c.closed               // later, if the connection was passed on
	return c.out.Bytes()
}

// secret is in everything that belongs to B's task.
const secret = "zq7-nobody-else's"

func secretTask() *task.Task {
	tk := newOther()
	tk.Family = secret
	tk.Containers[0].Name = secret
	tk.Containers[0].Stats.Store(&task.Sample{JSON: []byte(`{"name":"` + secret + `"}`), V2: len(secret) + len(`{"name":""`)})
	return tk
}

// FuzzRequest: whatever T sends, T gets well-formed answers of known status, each one of T's own documents
// or an error, and never a byte of another task's.
func FuzzRequest(f *testing.F) {
	h := newStopped(f, testConfig(), sampled(), secretTask())
	documents := map[string]bool{"": true, sampleA: true, sampleP: true, `{"` + idA + `":` + sampleA + `,"` + idP + `":` + sampleP + `}`: true}
	for _, tk := range []*task.Task{sampled()} {
		documents[taskDocument(task.V2, tk)] = true
		for _, c := range tk.Containers {
			documents[containerDocument(task.V2, c)] = true
		}
	}
	known := map[int]bool{200: true, 301: true, 400: true, 404: true, 408: true, 417: true, 431: true, 505: true, 100: true}
	for _, target := range []string{"/v2/metadata", "/v2/metadata/" + idA, "/v2/metadata/" + idB, "/v2/stats", "/v2/stats/" + idB, "/v2/metadataWithTags",
		"/v2/metadata/%0a", "//v2/./x/../stats?stream=true", "http://h/v2/metadata", "/v2/metadata/..%2f" + idB, "/%zz", "*", "/v2/metadata#x"} {
		for _, method := range []string{"GET", "POST", "HEAD"} {
			f.Add([]byte(method + " " + target + " HTTP/1.1\r\nHost: h\r\n\r\n"))
		}
	}
	f.Add([]byte("POST /v2/stats HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /v2/metadata HTTP/1.0\r\n\r\n"))
	f.Add([]byte("POST /v2/stats HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\nX-Forwarded-For: 127.1.0.3\r\n\r\nhelloGET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		out := h.serveOnce(t, raw)
		if bytes.Contains(out, []byte(secret)) && !bytes.Contains(raw, []byte("zq7")) {
			t.Fatalf("another task's: %q", out)
		}
		if n := h.Counters().Panics; n != 0 {
			t.Fatalf("panic")
		}
		if bytes.Contains(raw, []byte("HEAD ")) {
			return // one cannot tell from the answers alone where each ends
		}
		r := bufio.NewReader(bytes.NewReader(out))
		for {
			if _, err := r.Peek(1); errors.Is(err, io.EOF) {
				return
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%v in %q", err, out)
			}
			body, err := io.ReadAll(resp.Body)
			if err != nil || !known[resp.StatusCode] {
				t.Fatalf("status %d, %v in %q", resp.StatusCode, err, out)
			}
			switch {
			case resp.StatusCode == 200 && !documents[string(body)]:
				t.Fatalf("none of T's documents: %q", body)
			case resp.StatusCode == 400 && resp.Header.Get("Content-Type") == typeJSON:
				var text string
				if err := json.Unmarshal(body, &text); err != nil || !strings.HasPrefix(text, "Unable to ") {
					t.Fatalf("%v in %q", err, body)
				}
			}
		}
	})
}

// hopByHop are the headers that concern one connection only, but for Connection, which metad writes
// anew.
var hopByHop = []string{"Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// FuzzForward: whatever a client sends, the agent gets on each connection one request that net/http reads
// to its end, with nothing after it, nothing hop-by-hop in it, and for no path that metad serves.
func FuzzForward(f *testing.F) {
	cfg := testConfig()
	cfg.AgentURL = "http://agent"
	h := newStopped(f, cfg, sampled(), secretTask())
	type result struct {
		req *http.Request
		err error
	}
	var results chan result // of this run
	h.agent.Dial = func(context.Context, string, string) (net.Conn, error) {
		ours, agents := net.Pipe()
		results := results
		go func() {
			defer agents.Close()
			r := bufio.NewReader(agents)
			req, err := http.ReadRequest(r)
			if err != nil {
				results <- result{nil, err}
				return
			}
			if _, err = io.Copy(io.Discard, req.Body); err != nil {
				results <- result{req, nil} // the client's body was cut short, and so is the agent's
				return
			}
			_, _ = io.WriteString(agents, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			rest, _ := io.ReadAll(r)
			if len(rest) > 0 {
				err = fmt.Errorf("after the request: %q", rest)
			}
			results <- result{req, err}
		}()
		return ours, nil
	}
	for _, head := range []string{"Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
		"Connection: x, content-length\r\nContent-Length: 5\r\n", "Transfer-Encoding: identity\r\nContent-Length: 5\r\n", "X: y\r\n z\r\n", "X : y\r\n", "Expect: 100-continue\r\nContent-Length: 5\r\n", ""} {
		for _, target := range []string{"/v4/x", "/v2/credentials/a%2fb?q", "http://h/v2/metadata", "/v2/metadata"} {
			f.Add([]byte("POST " + target + " HTTP/1.1\r\nHost: h\r\n" + head + "\r\nhelloGET /v3/smuggled HTTP/1.1\r\nHost: h\r\n\r\n"))
			f.Add([]byte("POST " + target + " HTTP/1.1\r\nHost: h\r\n" + head + "\r\n5\r\nhello\r\n0\r\nContent-Length: 1\r\n\r\nGET /v3/smuggled HTTP/1.1\r\nHost: h\r\n\r\n"))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		results = make(chan result, 1)
		out := h.serveOnce(t, raw)
		if bytes.Contains(out, []byte(secret)) && !bytes.Contains(raw, []byte("zq7")) {
			t.Fatalf("another task's: %q", out)
		}
		if h.Counters().Panics != 0 || len(h.forwards) != 0 {
			t.Fatalf("%d panics, %d forwards left", h.Counters().Panics, len(h.forwards))
		}
		if !bytes.HasSuffix(out, []byte("Connection: close\r\n\r\nok")) {
			return
		}
		got := <-results // one connection only: it is the last of the client's
		if got.err != nil {
			t.Fatalf("%v; sent %q", got.err, raw)
		}
		for name := range got.req.Header {
			if slices.Contains(hopByHop, name) {
				t.Fatalf("passed on %s; sent %q", name, raw)
			}
		}
		if r, _ := routes.match([]byte(cleanPath(got.req.URL.Path))); r != nil {
			t.Fatalf("passed on %q", got.req.URL.Path)
		}
	})
}
