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
	tk.Containers[0].Stats.Store(&task.Sample{JSON: []byte(`{"name":"` + secret + `"}`),
		V2: len(secret) + len(`{"name":""`)})
	return tk
}

// clientPaths are what clients that are known ask for: what the SDKs, the OpenTelemetry and Datadog
// and Telegraf and Fluent Bit and Elastic agents, the ECS local endpoints' users and scripts put
// after http://169.254.170.2.
var clientPaths = func() []string {
	paths := []string{
		"/v1/credentials?id=" + credentialsID, "/v2/credentials/" + credentialsID, "/v2/credentials/",
		"/v2/metadata", "/v2/metadata/", "/v2/metadata/" + idA, "/v2/metadata/self", "/v2/metadataWithTags",
		"/v2/stats", "/v2/stats/", "/v2/stats/" + idA, "/v2/stats/self", "/v2/stats/" + idA + "?stream=true",
		"/v1/metadata", "/v1/tasks?dockerid=" + idA, "/creds", "/role/r", "/latest/meta-data/",
		"/api/" + endpointA + "/task-protection/v1/state", "/api/" + endpointA + "/fault/v1/network-latency/start",
	}
	for _, version := range []string{"/v3", "/v4"} {
		for _, who := range []string{"", "/", "/self", "/" + endpointA, "/" + endpointW,
			"/containers/app", "/containers/", "/containers/a%2Fb", "/..", "/%2e%2e"} {
			for _, form := range []string{"", "/", "/task", "/task/",
				"/task?stream=true", "//task", "/taskWithTags", "/stats", "/task/stats", "/task/stats?stream=true",
				"/tasks", "/tasks/stats", "/associations/elastic-inference", "/associations/elastic-inference/x", "/networks", "/metadata"} {
				paths = append(paths, version+who+form)
			}
		}
	}
	return paths
}()

// FuzzRoute: a path leads to one route at most; what it names is a part of it; and a route that
// names a container by its endpoint id leads there from that id and no other.
func FuzzRoute(f *testing.F) {
	for _, path := range clientPaths {
		f.Add([]byte(path))
	}
	f.Fuzz(func(t *testing.T, path []byte) {
		at := routes.match(path)
		switch {
		case at.route == nil:
			if len(at.name) != 0 {
				t.Errorf("nothing, named %q", at.name)
			}
			return
		case (at.by == theCaller) != (at.name == nil):
			t.Errorf("subject %d, name %q", at.by, at.name)
		case !bytes.Contains(path, at.name):
			t.Errorf("%q is not in it", at.name)
		}
		var again string
		switch at.by {
		case theCaller:
			again = strings.Replace(at.path, "/{container}", "/self", 1)
		case byDockerID:
			again = strings.Replace(at.path, "{docker id}", string(at.name), 1)
		case byName:
			again = strings.Replace(at.path, "{container}",
				"containers/"+string(at.name), 1)
		case byEndpoint:
			again = strings.Replace(at.path, "{container}", string(at.name), 1)
		}
		if got := routes.match([]byte(again)); got.route != at.route ||
			!bytes.Equal(got.name, at.name) || got.by != at.by {
			t.Errorf("%q: %s, but %q: %v", path, at.path, again, got.route)
		}
		if at.by != theCaller && again != string(path) {
			t.Errorf("%q is taken for %q", path, again)
		}
	})
}

// FuzzRequest: whatever T sends, T gets well-formed answers of known status, each one of T's own
// documents or an error, and never a byte of another task's.
func FuzzRequest(f *testing.F) {
	own := sampled()
	own.Containers[0].EndpointID, own.Containers[0].NetworkMode = endpointA, "container:"+idP
	own.Endpoints[0].Container = idP
	h := newStopped(f, testConfig(), own, secretTask())
	documents := map[string]bool{"": true, sampleA: true, sampleP: true,
		`{"` + idA + `":` + sampleA + `,"` + idP + `":` + sampleP + `}`: true}
	whole, each := task.Render(own)
	for _, v := range []task.Version{task.V2, task.V3, task.V4} {
		documents[whole[v].String()] = true
		for _, d := range each {
			documents[d[v].String()] = true
		}
	}
	known := map[int]bool{200: true, 301: true, 400: true, 404: true, 408: true, 417: true,
		431: true, 500: true, 505: true, 100: true}
	for _, path := range clientPaths {
		f.Add([]byte("GET " + path + " HTTP/1.1\r\nHost: h\r\n\r\n"))
	}
	for _, target := range []string{"/v2/metadata", "/v2/metadata/" + idA,
		"/v2/metadata/" + idB, "/v2/stats", "/v2/stats/" + idB, "/v2/metadataWithTags",
		"/v2/metadata/%0a", "//v2/./x/../stats?stream=true", "http://h/v2/metadata", "/v2/metadata/..%2f" + idB, "/%zz", "*", "/v2/metadata#x"} {
		for _, method := range []string{"GET", "POST", "HEAD"} {
			f.Add([]byte(method + " " + target + " HTTP/1.1\r\nHost: h\r\n\r\n"))
		}
	}
	f.Add([]byte(
		"POST /v2/stats HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: " +
			"chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /v2/metadata HTTP/1.0\r\n\r\n"))
	f.Add([]byte(
		"POST /v2/stats HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: " +
			"100-continue\r\nX-Forwarded-For: 127.1.0.3\r\n\r\nhelloGET / " +
			"HTTP/1.1\r\nHost: x\r\n\r\n"))
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
			if errors.Is(err, io.ErrUnexpectedEOF) &&
				bytes.Contains(raw, []byte("stream")) {
				// a stream is not ended for a client that has left, as this one has
				err = nil
			}
			if err != nil || !known[resp.StatusCode] {
				t.Fatalf("status %d, %v in %q", resp.StatusCode, err, out)
			}
			switch {
			// a stream's line ends in one
			case resp.StatusCode == 200 &&
				!documents[strings.TrimSuffix(string(body), "\n")]:
				t.Fatalf("none of T's documents: %q", body)
			case resp.StatusCode != 200 && resp.Header.Get("Content-Type") == typeJSON:
				var text string
				if err := json.Unmarshal(body, &text); err != nil ||
					!strings.Contains(strings.ToLower(text), "unable to ") {
					t.Fatalf("%v in %q", err, body)
				}
			}
		}
	})
}

// hopByHop are the headers that concern one connection only, but for Connection, which metad writes
// anew.
var hopByHop = []string{"Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding",
	"Upgrade"}

// FuzzForward: whatever a client sends, the agent gets on each connection one request that net/http
// reads to its end, with nothing after it, nothing hop-by-hop in it, and for no path that metad
// serves.
func FuzzForward(f *testing.F) {
	cfg := testConfig()
	cfg.AgentURL = "http://agent"
	h := newStopped(f, cfg, sampled(), secretTask())
	type result struct {
		req *http.Request
		err error
	}
	var results chan result // of this run
	h.agent.Dial = func(context.Context, string, netip.Addr) (net.Conn, error) {
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
				// the client's body was cut short, and so is the agent's
				results <- result{req, nil}
				return
			}
			_, _ = io.WriteString(agents,
				"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			rest, _ := io.ReadAll(r)
			if len(rest) > 0 {
				err = fmt.Errorf("after the request: %q", rest)
			}
			results <- result{req, err}
		}()
		return ours, nil
	}
	for _, head := range []string{"Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n",
		"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
		"Connection: x, content-length\r\nContent-Length: 5\r\n", "Transfer-Encoding: identity\r\nContent-Length: 5\r\n", "X: y\r\n z\r\n", "X : y\r\n", "Expect: 100-continue\r\nContent-Length: 5\r\n", ""} {
		for _, target := range []string{"/v4/x", "/v2/credentials/a%2fb?q",
			"http://h/v2/metadata", "/v2/metadata"} {
			f.Add([]byte("POST " + target + " HTTP/1.1\r\nHost: h\r\n" + head +
				"\r\nhelloGET /v3/smuggled HTTP/1.1\r\nHost: h\r\n\r\n"))
			f.Add([]byte("POST " + target + " HTTP/1.1\r\nHost: h\r\n" + head +
				"\r\n5\r\nhello\r\n0\r\nContent-Length: 1\r\n\r\nGET " +
				"/v3/smuggled HTTP/1.1\r\nHost: h\r\n\r\n"))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		results = make(chan result, 1)
		out := h.serveOnce(t, raw)
		if bytes.Contains(out, []byte(secret)) && !bytes.Contains(raw, []byte("zq7")) {
			t.Fatalf("another task's: %q", out)
		}
		if h.Counters().Panics != 0 || h.forwards.count() != 0 {
			t.Fatalf("%d panics, %d forwards left", h.Counters().Panics,
				h.forwards.count())
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
		if at := routes.match([]byte(cleanPath(got.req.URL.Path))); at.route != nil &&
			at.by != byEndpoint {
			t.Fatalf("passed on %q", got.req.URL.Path)
		}
	})
}
