package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"metad/pkg/task"
)

// fakeSamples lets a test hand out samples.
type fakeSamples struct {
	mu   sync.Mutex
	sent int
	subs map[string]map[chan *task.Sample]bool
}

func (f *fakeSamples) Subscribe(id string) (<-chan *task.Sample, func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ch := make(chan *task.Sample, 1)
	if f.subs == nil {
		f.subs = map[string]map[chan *task.Sample]bool{}
	}
	if f.subs[id] == nil {
		f.subs[id] = map[chan *task.Sample]bool{}
	}
	f.subs[id][ch] = true
	return ch, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.subs[id], ch)
	}
}

// send offers json to the container's subscribers and returns how many there are.
func (f *fakeSamples) send(id, json string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ch := range f.subs[id] {
		select {
		case ch <- &task.Sample{JSON: []byte(json), V2: len(json) - 1}:
			f.sent++
		default:
		}
	}
	return len(f.subs[id])
}

func (f *fakeSamples) stop(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ch := range f.subs[id] {
		close(ch)
		delete(f.subs[id], ch)
	}
}

func streaming(t *testing.T, change func(*Config)) (*host, *fakeSamples) {
	t.Helper()
	f := &fakeSamples{}
	cfg := testConfig()
	cfg.Samples = f
	if change != nil {
		change(&cfg)
	}
	return newHost(t, cfg, newTask(), newOther()), f
}

const streamTarget = "/v2/stats/" + idA + "?stream=true"

func TestStream(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "HTTP/1.0"} {
		h, f := streaming(t, nil)
		c := h.dial(t, addrT)
		fmt.Fprintf(c, "GET %s %s\r\nHost: x\r\n\r\n", streamTarget, proto)
		eventually(t, "subscribed", func() bool { return f.send(idA, `{"n":1}`) == 1 })
		r := bufio.NewReader(c)
		resp := head(t, r)
		if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != typeJSON ||
			resp.Header.Get("X-Rate-Limit-Limit") != "40.00" || !resp.Close {
			t.Errorf("got %d %v", resp.StatusCode, resp.Header)
		}
		lines := bufio.NewReader(resp.Body)
		if line, err := lines.ReadString('\n'); line != "{\"n\":1}\n" || err != nil {
			t.Fatalf("got %q, %v", line, err)
		}
		f.send(idA, `{"n":2}`)
		if line, err := lines.ReadString('\n'); line != "{\"n\":2}\n" || err != nil {
			t.Fatalf("got %q, %v", line, err)
		}
		f.stop(idA) // the container stopped: so does the stream, and says so
		if rest, err := io.ReadAll(lines); len(rest) != 0 || err != nil {
			t.Errorf("%s: got %q, %v", proto, rest, err)
		}
		h.quiet(t)
	}
}

// What is no stream: another task's container, a stopped one, HEAD, a server without samples.
func TestStreamRefused(t *testing.T) {
	h, f := streaming(t, nil)
	want(t, h.get(t, addrT, "/v2/stats/"+idB+"?stream=true"), 400, typeJSON, `"Unable to get container stats for: `+idB+`"`)
	want(t, h.get(t, addrT, "/v2/stats/"+idA+"?stream=false"), 200, typeJSON, "null")
	want(t, h.do(t, addrT, "HEAD", streamTarget), 200, typeJSON, "")
	if n := f.send(idA, "{}") + f.send(idB, "{}"); n != 0 {
		t.Errorf("%d subscriptions", n)
	}
	h = newHost(t, testConfig(), newTask())
	want(t, h.get(t, addrT, streamTarget), 200, typeJSON, "null")
}

func TestStreamBounded(t *testing.T) {
	h, f := streaming(t, func(c *Config) { c.MaxStreams = 1 })
	c := h.dial(t, addrT)
	_, _ = c.Write(request(streamTarget))
	eventually(t, "subscribed", func() bool { return f.send(idA, "{}") == 1 })
	if _, err := bufio.NewReader(head(t, bufio.NewReader(c)).Body).ReadString(
		'\n'); err != nil {
		t.Fatal(err)
	}
	if r := h.get(t, addrT, streamTarget); r.StatusCode != 503 ||
		r.Header.Get("Retry-After") != "1" {
		t.Errorf("got %d", r.StatusCode)
	}
	_ = c.Close() // seen without a sample to send
	h.quiet(t)
	if n := f.send(idA, "{}"); n != 0 {
		t.Errorf("%d subscriptions left", n)
	}
}

// A client that does not read is dropped; samples are not kept for it, nor many by the kernel.
func TestStreamSlowReader(t *testing.T) {
	h, f := streaming(t, func(c *Config) { c.WriteTimeout = 100 * time.Millisecond })
	c := h.dial(t, addrT)
	_ = c.(*net.TCPConn).SetReadBuffer(4096)
	_, _ = c.Write(request(streamTarget))
	eventually(t, "subscribed", func() bool { return f.send(idA, "{}") == 1 })
	sample := strings.Repeat("x", 3000)
	eventually(t, "dropped", func() bool {
		for range 50 {
			f.send(idA, sample)
		}
		return h.Counters().Open == 0
	})
	h.quiet(t)
	if n := f.send(idA, "{}"); n != 0 {
		t.Errorf("%d subscriptions left", n)
	}
	if f.sent > 100 {
		t.Errorf("%d samples taken for it", f.sent)
	}
}

// A panic outside of fasthttp's hands ends the connection, too, and no more.
func TestStreamPanic(t *testing.T) {
	h, f := streaming(t, nil)
	c := h.dial(t, addrT)
	_, _ = c.Write(request(streamTarget))
	eventually(t, "subscribed", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		for ch := range f.subs[idA] {
			ch <- &task.Sample{V2: 1} // never to be sent
			return true
		}
		return false
	})
	_ = readAll(t, c)
	if n := h.Counters().Panics; n != 1 {
		t.Errorf("counted %d, want 1", n)
	}
	h.quiet(t)
}

func TestStreamEndsAtShutdown(t *testing.T) {
	h, f := streaming(t, nil)
	c := h.dial(t, addrT)
	_, _ = c.Write(request(streamTarget))
	eventually(t, "subscribed", func() bool { return f.send(idA, "{}") == 1 })
	if err := <-h.shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	if all := readAll(t, c); !strings.HasSuffix(all, "0\r\n\r\n") {
		t.Errorf("got %q", all)
	}
	h.quiet(t)
}
