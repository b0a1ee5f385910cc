package dockerproxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"metad/pkg/inject"
	"metad/pkg/mdfile"
)

// Everything else passes without a change: paths, queries, headers, bodies, statuses.
func TestPassesUnchanged(t *testing.T) {
	g := newGround(t, config{Inject: inject.Config{File: true}}, mdfile.Layout{})
	type request struct{ method, uri, host, agent, auth, body string }
	var got request
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got = request{r.Method, r.RequestURI, r.Host, r.UserAgent(),
			r.Header.Get("X-Registry-Auth"), string(b)}
		if r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Accept-Encoding") != "" {
			t.Errorf("headers were added: %v", r.Header)
		}
		w.Header()["Date"] = nil
		w.Header()["Content-Type"] = nil
		w.Header().Set("Api-Version", "1.41")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprint(w, "<html>")
	}
	for _, want := range []request{
		{"GET", "/v1.41/containers/json?filters=%7B%22label%22%3A%7B%22a%3Bb%22%3Atrue%7D%7D&x=1;2", "docker", "Docker-Client/20.10", "", ""},
		{"GET", "/v1.41/images/a%2Fb/json", "docker", "x", "abc=", ""},
		{"PUT", "/containers/x/archive?path=%2F", "docker", "x", "", "tar"},
		{"POST", "/containers/create/", "docker", "x", "", `{"Image":"i"}`},
		{"GET", "/containers/create", "docker", "x", "", ""},
		{"POST", "/networks/create", "docker", "x", "", `{"Name":"n"}`},
		{"DELETE", "//x//y", "docker", "x", "", ""},
	} {
		r, err := http.NewRequest(want.method, "http://docker"+want.uri,
			strings.NewReader(want.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("User-Agent", want.agent)
		if want.auth != "" {
			r.Header.Set("X-Registry-Auth", want.auth)
		}
		resp, err := g.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
		if resp.StatusCode != http.StatusTeapot || string(body) != "<html>" ||
			resp.Header.Get("Api-Version") != "1.41" {
			t.Errorf("answer: got %d, %q, %v", resp.StatusCode, body, resp.Header)
		}
		if resp.Header.Get("Date") != "" || resp.Header.Get("Content-Type") != "" {
			t.Errorf("headers were added: %v", resp.Header)
		}
	}
}

// Streams pass as they come, in both directions, after an upgrade and without; the end of one
// direction is not the end of the other.
func TestStreams(t *testing.T) {
	g := newGround(t, config{}, mdfile.Layout{})
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" { // answers while it reads
			_ = http.NewResponseController(w).EnableFullDuplex()
			lines := bufio.NewReader(r.Body)
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					return
				}
				fmt.Fprint(w, "got ", line)
				_ = http.NewResponseController(w).Flush()
			}
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn,
			"HTTP/1.1 101 UPGRADED\r\nContent-Type: "+
				"application/vnd.docker.raw-stream\r\nConnection: "+
				"Upgrade\r\nUpgrade: tcp\r\n\r\nhello\n")
		all, _ := io.ReadAll(rw) // to the end of the client's half
		fmt.Fprintf(conn, "got %s", all)
	}

	conn, err := net.Dial("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprint(conn,
		"POST /v1.41/containers/x/attach?stream=1 HTTP/1.1\r\nHost: "+
			"docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: "+
			"0\r\n\r\n")
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols ||
		resp.Status != "101 UPGRADED" {
		t.Fatalf("upgrade: got %+v, %v", resp, err)
	}
	if line, err := in.ReadString('\n'); line != "hello\n" {
		t.Errorf("got %q, %v", line, err)
	}
	fmt.Fprint(conn, "input")
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(in); string(rest) != "got input" {
		t.Errorf("after the end of input: got %q, %v", rest, err)
	}

	body, input := io.Pipe()
	r, _ := http.NewRequest(http.MethodPost, "http://docker/build", body)
	answer, err := func() (*http.Response, error) {
		go fmt.Fprintln(input, "one")
		return g.client.Do(r)
	}()
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewReader(answer.Body)
	for _, want := range []string{"got one\n", "got two\n"} {
		if got, err := lines.ReadString('\n'); got != want {
			t.Fatalf("got %q, %v, want %q", got, err, want)
		}
		go fmt.Fprintln(input, "two")
	}
	input.Close()
}

// Archives are tunnelled: whole, in both directions, with the length known or not; a connection
// that was used for one is not used again; and who leaves ends the Engine's work.
func TestArchives(t *testing.T) {
	g := newGround(t, config{}, mdfile.Layout{})
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	left := make(chan error, 1)
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/endless/export"):
			for {
				if _, err := w.Write(big); err != nil {
					left <- err
					return
				}
			}
		case strings.HasSuffix(r.URL.Path, "/quiet/export"):
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			left <- r.Context().Err()
		case r.Method == http.MethodGet:
			_, _ = w.Write(big)
		default:
			body, err := io.ReadAll(r.Body)
			fmt.Fprint(w, r.Method, " ", r.RequestURI, " ", r.ContentLength, " ",
				bytes.Equal(body, big), " ", err, " ", r.UserAgent())
		}
	}
	do := func(method, uri string, body io.Reader, want string) {
		t.Helper()
		r, _ := http.NewRequest(method, "http://docker"+uri, body)
		r.Header.Set("User-Agent", "test")
		r.Header.Set("Expect", "100-continue")
		resp, err := g.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got, err := io.ReadAll(resp.Body); string(got) != want || err != nil {
			t.Errorf("%s %s: got %.200q, %v", method, uri, got, err)
		}
		if !resp.Close {
			t.Error("the client may use the connection again")
		}
	}
	for range 2 {
		do("GET", "/v1.41/containers/x/archive?path=%2Fa%3Bb", nil, string(big))
		do("GET", "/images/a%2Fb:c/get", nil, string(big))
		do("PUT", "/containers/x/archive?path=%2F", bytes.NewReader(big), "PUT /containers/x/archive?path=%2F 2097152 true <nil> test")
		do("PUT", "/v1.41/containers/x/archive", io.MultiReader(bytes.NewReader(big)), "PUT /v1.41/containers/x/archive -1 true <nil> test")
		do("POST", "/images/load", http.NoBody, "POST /images/load 0 false <nil> test")
	}

	for _, path := range []string{"/containers/endless/export", "/containers/quiet/export"} {
		resp, err := g.client.Get("http://docker" + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		select {
		case <-left:
		case <-time.After(time.Minute):
			t.Errorf("%s: the Engine works on for a client that has left", path)
		}
	}

	if err := os.Remove(g.proxy.cfg.Engine); err != nil {
		t.Fatal(err)
	}
	resp, err := g.client.Get("http://docker/containers/x/export")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusBadGateway {
		t.Errorf("without the Engine: got %d", resp.StatusCode)
	}
}

// The body may be longer than the bound, even far longer: it passes, and is not kept in memory.
func TestLongBodyPasses(t *testing.T) {
	g := newGround(t, config{Config: Config{MaxBodyBytes: 10}}, mdfile.Layout{})
	var n int64
	g.handle = func(w http.ResponseWriter, r *http.Request) {
		n, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}
	body := bytes.Repeat([]byte(" "), 10<<20)
	// chunked
	resp, err := g.client.Post("http://docker/containers/create", "application/json",
		io.MultiReader(bytes.NewReader(body)))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if n != int64(len(body)) {
		t.Errorf("got %d bytes, want %d", n, len(body))
	}
}

func TestLimiter(t *testing.T) {
	now := time.Unix(1000, 0)
	l := limiter{now: func() time.Time { return now }}
	allowed := 0
	for range 25 {
		if ok, _ := l.allow(); ok {
			allowed++
		}
	}
	now = now.Add(11 * time.Second)
	ok, held := l.allow()
	if allowed != 10 || !ok || held != 15 {
		t.Errorf("got %d allowed, then %v with %d held back", allowed, ok, held)
	}
}
