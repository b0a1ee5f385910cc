package server

import (
	"bufio"
	"io"
	"net/netip"
	"testing"

	"metad/pkg/task"
)

// open starts a stream and returns its lines.
func (h *host) open(t *testing.T, from netip.Addr, target string) *bufio.Reader {
	t.Helper()
	c := h.dial(t, from)
	_, _ = c.Write(request(target))
	resp := head(t, bufio.NewReader(c))
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != typeJSON || !resp.Close {
		t.Fatalf("%s: got %d %v", target, resp.StatusCode, resp.Header)
	}
	return bufio.NewReader(resp.Body)
}

// ended checks that a stream has ended as it should.
func ended(t *testing.T, r io.Reader) {
	t.Helper()
	if rest, err := io.ReadAll(r); len(rest) != 0 || err != nil {
		t.Errorf("got %q, %v, want the end", rest, err)
	}
}

// A stream of a metadata document is the document now, and again whenever it has changed; it ends
// when what it is about is no more.
func TestFollowDocument(t *testing.T) {
	for _, of := range []struct {
		target   string
		document func(*task.Task) string
	}{
		{"/v2/metadata", func(tk *task.Task) string { return taskDocument(task.V2, tk) }},
		{"/v3/task", func(tk *task.Task) string { return taskDocument(task.V3, tk) }},
		{"/v4/" + endpointW + "/task", func(tk *task.Task) string { return taskDocument(task.V4, tk) }},
		{"/v4", func(tk *task.Task) string { return containerDocumentOf(tk, 0) }},
		{"/v4/containers/web", func(tk *task.Task) string { return containerDocumentOf(tk, 0) }},
		{"/v4/" + endpointW, func(tk *task.Task) string { return containerDocumentOf(tk, 0) }},
		{"/v2/metadata/" + idW, func(tk *task.Task) string {
			_, each := task.Render(tk)
			return each[0][task.V2].String()
		}},
	} {
		h := newHost(t, testConfig(), newShop(), newOther())
		apply := func(tasks ...*task.Task) {
			t.Helper()
			if err := h.table.Apply(tasks); err != nil {
				t.Fatal(err)
			}
		}
		lines := h.open(t, addrW, of.target+"?stream=true")
		if got := lineOf(t, lines); got != of.document(newShop()) {
			t.Fatalf("%s: got %s", of.target, got)
		}
		apply(newShop(), newOther()) // other pointers, nothing to tell
		healthy := newShop()
		healthy.Containers[0].Health = &task.Health{Status: "HEALTHY"}
		apply(healthy, newOther())
		if got := lineOf(t, lines); got != of.document(healthy) {
			t.Fatalf("%s: got %s, want it healthy", of.target, got)
		}
		apply(newOther())
		ended(t, lines)
		h.quiet(t)
	}
}

// A container's stream does not speak of what changes elsewhere in its task, and ends with its
// endpoint id when the container stops.
func TestFollowContainerAlone(t *testing.T) {
	h := newHost(t, testConfig(), newShop())
	lines := h.open(t, addrD, "/v4/"+endpointW+"?stream=true")
	lineOf(t, lines)
	sibling := newShop()
	stop(sibling.Containers[1])
	if err := h.table.Apply([]*task.Task{sibling}); err != nil {
		t.Fatal(err)
	}
	stopped := newShop()
	stop(stopped.Containers[0])
	if err := h.table.Apply([]*task.Task{stopped}); err != nil {
		t.Fatal(err)
	}
	ended(t, lines)
	h.quiet(t)
}

// A stream of a task's statistics has a line whenever a container has a new sample, those of
// containers that start later too.
func TestFollowTaskStats(t *testing.T) {
	f := &fakeSamples{}
	cfg := testConfig()
	cfg.Samples = f
	first := newShop()
	first.Containers = first.Containers[:1]
	h := newHost(t, cfg, first)
	send := func(c *task.Container, json string) {
		t.Helper()
		c.Stats.Store(&task.Sample{JSON: []byte(json), V2: len(json) - 1})
		eventually(t, "subscribed", func() bool { return f.send(c.ID, json) == 1 })
	}
	lines := h.open(t, addrW, "/v4/task/stats?stream=true")
	web := first.Containers[0]
	send(web, `{"n":1}`)
	if got := lineOf(t, lines); got != `{"`+idW+`":{"n":1}}` {
		t.Fatalf("got %s", got)
	}
	both := newShop()
	both.Containers[0] = web
	if err := h.table.Apply([]*task.Task{both}); err != nil {
		t.Fatal(err)
	}
	db := both.Containers[1]
	send(db, `{"m":1}`)
	if got := lineOf(t, lines); got != `{"`+idW+`":{"n":1},"`+idD+`":{"m":1}}` {
		t.Fatalf("got %s", got)
	}
	stopped := newShop()
	stopped.Containers[0] = web
	stop(stopped.Containers[1])
	stopped.Containers[1].PID = 0
	if err := h.table.Apply([]*task.Task{stopped}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "unsubscribed", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return len(f.subs[idD]) == 0
	})
	send(web, `{"n":2}`)
	if got := lineOf(t, lines); got != `{"`+idW+`":{"n":2},"`+idD+`":{}}` {
		t.Fatalf("got %s", got)
	}
	if err := h.table.Apply(nil); err != nil {
		t.Fatal(err)
	}
	ended(t, lines)
	h.quiet(t)
	if n := f.send(idW, `{}`) + f.send(idD, `{}`); n != 0 {
		t.Errorf("%d subscriptions left", n)
	}
}

// Every version's stream of one container's samples has the version's form.
func TestFollowVersions(t *testing.T) {
	f := &fakeSamples{}
	cfg := testConfig()
	cfg.Samples = f
	h := newHost(t, cfg, newShop())
	for target, form := range map[string]string{
		"/v2/stats/" + idW: `{"n":1}`, "/v2/stats/self": `{"n":1}`, "/v3/stats": `{"n":1}`, "/v3/" + endpointW + "/stats": `{"n":1}`,
		"/v4/stats": `{"n":1,"r":2}`, "/v4/" + endpointW + "/stats": `{"n":1,"r":2}`, "/v4/containers/web/stats": `{"n":1,"r":2}`,
	} {
		c := h.dial(t, addrW)
		_, _ = c.Write(request(target + "?stream=true"))
		resp := head(t, bufio.NewReader(c))
		eventually(t, "subscribed", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			for ch := range f.subs[idW] {
				ch <- &task.Sample{JSON: []byte(`{"n":1,"r":2}`), V2: len(`{"n":1`)}
				return true
			}
			return false
		})
		if got := lineOf(t, bufio.NewReader(resp.Body)); got != form {
			t.Errorf("%s: got %s", target, got)
		}
		_ = c.Close()
		h.quiet(t)
	}
}

// A stream of a document ends when the client leaves, when the server stops, and for a client that
// reads nothing of what it asked for.
func TestFollowDocumentEnds(t *testing.T) {
	h := newHost(t, testConfig(), newShop())
	c := h.dial(t, addrW)
	_, _ = c.Write(request("/v4/task?stream=true"))
	head(t, bufio.NewReader(c))
	_ = c.Close()
	h.quiet(t)
	lines := h.open(t, addrW, "/v4/task?stream=true")
	lineOf(t, lines)
	if err := <-h.shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	ended(t, lines)
	h.quiet(t)
}
