package server

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
)

const (
	endpointA     = "0b69d5c0-d655-4695-98cd-5d2d526d9d5a" // of A in T
	endpointB     = "4f0c7d5e-1b1b-4f4e-9a3b-0d6c8f1e2a3b" // of B
	credentialsID = "3a2b1c0d-1111-2222-3333-444455556666"
	credentials   = `{"RoleArn":"arn:aws:iam::111122223333:role/r","AccessKeyId":"AKIA","SecretAccessKey":"s","Token":"t","Expiration":"2033-01-02T03:04:05Z"}`
	taggedT       = `{"Cluster":"default","TaskARN":"` + arnT +
		`","TaskTags":{"a":"b"},"ContainerInstanceTags":{"c":"d"}}`
)

// fakeAgent answers as the ECS agent does what metad passes on, and keeps every byte it gets.
type fakeAgent struct {
	addr string

	mu   sync.Mutex
	open int
	raw  []*bytes.Buffer // one for each connection
}

func (a *fakeAgent) config() Config {
	cfg := testConfig()
	cfg.AgentURL = "http://" + a.addr
	return cfg
}

// requests returns what each connection so far has sent.
func (a *fakeAgent) requests() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for _, b := range a.raw {
		out = append(out, b.String())
	}
	return out
}

// got checks that some connection began with line.
func (a *fakeAgent) got(t testing.TB, line string) {
	t.Helper()
	for _, r := range a.requests() {
		if strings.HasPrefix(r, line+"\r\n") {
			return
		}
	}
	t.Errorf("the agent never got %q, but %q", line, a.requests())
}

func (a *fakeAgent) connections() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.open
}

// recordedConn keeps what is read from it.
type recordedConn struct {
	net.Conn
	a    *fakeAgent
	raw  *bytes.Buffer
	once sync.Once
}

func (c *recordedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.a.mu.Lock()
	c.raw.Write(p[:n])
	c.a.mu.Unlock()
	return n, err
}

func (c *recordedConn) Close() error {
	c.once.Do(func() {
		c.a.mu.Lock()
		c.a.open--
		c.a.mu.Unlock()
	})
	return c.Conn.Close()
}

type recordingListener struct {
	net.Listener
	a *fakeAgent
}

func (l recordingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.a.mu.Lock()
	defer l.a.mu.Unlock()
	l.a.open++
	raw := &bytes.Buffer{}
	l.a.raw = append(l.a.raw, raw)
	return &recordedConn{Conn: c, a: l.a, raw: raw}, nil
}

// serveAgent runs an agent that handles with h until the test ends.
func serveAgent(t testing.TB, h http.Handler) *fakeAgent {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := &fakeAgent{addr: ln.Addr().String()}
	s := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(recordingListener{ln, a}) // http.ErrServerClosed
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return a
}

// rawAgent runs an agent that hands every connection to f, until the test ends.
func rawAgent(t testing.TB, f func(net.Conn)) *fakeAgent {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := &fakeAgent{addr: ln.Addr().String()}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := (recordingListener{ln, a}).Accept()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer c.Close()
				f(c)
			}()
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
	})
	return a
}

// refusing returns an address where nobody listens.
func refusing(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
	return ln.Addr().String()
}

// mute returns the address of an agent that reads and never answers.
func mute(t testing.TB) string {
	t.Helper()
	return rawAgent(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }).addr
}

// newAgent runs an agent with T's and B's endpoint ids and one set of credentials.
func newAgent(t testing.TB) *fakeAgent {
	t.Helper()
	reply := func(w http.ResponseWriter, status int, body string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
	creds := func(w http.ResponseWriter, id string) {
		switch id {
		case credentialsID:
			reply(w, 200, credentials)
		case "":
			reply(w, 400, `{"code":"NoIdInRequest","message":"CredentialsV2Request: No Credential ID in the request","HTTPErrorCode":400}`)
		default:
			reply(w, 400, `{"code":"InvalidIdInRequest","message":"CredentialsV2Request: Credentials not found","HTTPErrorCode":400}`)
		}
	}
	return serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := r.URL.Path
		switch {
		case path == "/v1/credentials":
			creds(w, r.URL.Query().Get("id"))
		case strings.HasPrefix(path, "/v2/credentials/"):
			creds(w, strings.TrimPrefix(path, "/v2/credentials/"))
		case path == "/v3/"+endpointA+"/taskWithTags":
			reply(w, 200, taggedT)
		case path == "/v3/"+endpointB+"/taskWithTags":
			reply(w, 200, strings.ReplaceAll(taggedT, arnT, arnB))
		case strings.HasPrefix(path, "/v3/"):
			reply(w, 500, `"V3 task metadata handler: unable to get task arn from request: unable to get task Arn from v3 endpoint ID: x"`)
		case strings.HasPrefix(path, "/api/e/"):
			body, err := io.ReadAll(r.Body)
			switch {
			case err != nil:
				return
			case r.Method == "GET":
				reply(w, 200, `{"protection":{}}`)
			case r.Method == "PUT":
				reply(w, 200, `{"protection":`+string(body)+`}`)
			default:
				w.WriteHeader(405)
			}
		default:
			http.NotFound(w, r)
		}
	}))
}
