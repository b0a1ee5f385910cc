package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"metad/pkg/admin"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/task"
)

// This file has what the admin socket answers to the commands that look into a running metad.

// lookPaths says what the paths of looks answer.
var lookPaths = []admin.Path{
	{Path: "/explain", SocketOnly: true, What: "?what= a container or an address: " +
		"everything between it and its answer, as metad explain shows it"},
	{Path: "/document", SocketOnly: true, What: "?what= a container: its document of v4"},
	{Path: "/verdicts", SocketOnly: true, What: "how packets ended, as metad verdicts shows " +
		"it"},
	{Path: "/map", SocketOnly: true, What: "the kernel's map, as metad map shows it"},
	{Path: "/events", SocketOnly: true, What: "refused packets and those of unknown sources, " +
		"a line of JSON for each; with ?follow=1 those that come, too"},
}

// looks are the socket's paths beside those of admin.Paths.
func (d *daemon) looks() map[string]http.Handler {
	return map[string]http.Handler{
		"/verdicts": answering(func(*http.Request) (any, error) { return d.verdicts() }),
		"/map":      answering(func(*http.Request) (any, error) { return d.kernelMap() }),
		"/explain": answering(func(r *http.Request) (any, error) {
			what := r.FormValue("what")
			if what == "" {
				return nil, errNothing
			}
			s, err := d.situation(r.Context())
			if err != nil {
				return nil, err
			}
			return explain(what, s), nil
		}),
		"/document": answering(func(r *http.Request) (any, error) {
			return document(r.FormValue("what"), d.tasks.table.Views())
		}),
		"/events": d.dropped.handler(func(e loader.Event) event {
			return eventOf(e, d.tasks.table.Views())
		}),
	}
}

// document returns the metadata document, of v4, of the container that what names.
func document(what string, views []*lookup.View) (json.RawMessage, error) {
	_, c := (&explanation{situation: situation{views: views}}).find(what)
	if c == nil {
		return nil, fmt.Errorf("metad knows no container %q", what)
	}
	return c.Document(task.V4).AppendTo(nil), nil
}

// answering answers with JSON, or 500 and the error.
func answering(f func(*http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // the client is gone
	})
}

func (d *daemon) verdicts() ([]verdict, error) {
	counts, err := d.own.loader.Verdicts()
	all := make([]verdict, len(counts))
	for i, c := range counts {
		all[i] = verdict{Name: c.Name, Packets: c.Packets, Meaning: meanings[c.Name]}
	}
	return all, err
}

// mapEntry is one address of the kernel's map.
type mapEntry struct {
	Address     string
	Task        string // id, as the map has it
	Tag         uint32
	Ifindex     uint32
	Device      string // "": gone
	MAC         string
	Packets     uint64
	Bytes       uint64
	Connections uint64
	LastSeen    time.Time // zero: never
}

// kernelMap returns the kernel's map of tasks, and what each address has sent, by address.
func (d *daemon) kernelMap() ([]mapEntry, error) {
	entries, err := d.own.loader.Entries()
	if err != nil {
		return nil, err
	}
	counters, err := d.own.loader.Counters()
	if err != nil {
		return nil, err
	}
	all := []mapEntry{}
	for addr, v := range entries {
		c := counters[addr]
		device, _ := deviceOf(int(v.Ifindex))
		var id strings.Builder
		for _, b := range v.TaskId {
			if b == 0 {
				break
			}
			id.WriteByte(byte(b))
		}
		all = append(all, mapEntry{addr.String(), id.String(), v.Tag, v.Ifindex, device,
			macText(v.Mac),
			c.Packets, c.Bytes, c.Connections, c.LastSeen})
	}
	slices.SortFunc(all, func(a, b mapEntry) int {
		return netip.MustParseAddr(a.Address).Compare(netip.MustParseAddr(b.Address))
	})
	return all, nil
}

func macText(mac [6]byte) string { return net.HardwareAddr(mac[:]).String() }

// deviceOf returns the name of a device of the host, and of the bridge that it is a port of.
func deviceOf(ifindex int) (name, bridge string) {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return "", ""
	}
	if m := l.Attrs().MasterIndex; m != 0 {
		if b, err := netlink.LinkByIndex(m); err == nil {
			bridge = b.Attrs().Name
		}
	}
	return l.Attrs().Name, bridge
}

// situation collects what explain needs.
func (d *daemon) situation(ctx context.Context) (situation, error) {
	entries, err := d.own.loader.Entries()
	if err != nil {
		return situation{}, err
	}
	views := d.tasks.table.Views()
	var seen []event
	for _, e := range d.dropped.recent() {
		seen = append(seen, eventOf(e, views))
	}
	return situation{
		docker: d.follower.Status().Connected, packets: d.own.loader.Ready(),
		views: views, entries: entries, ports: d.own.loader.Ports(),
		device: deviceOf,
		holder: func(id string) *lookup.ContainerView {
			_, c := d.tasks.table.Endpoint([]byte(id))
			return c
		},
		events: seen, agent: d.askAgent(ctx), now: time.Now(),
	}, nil
}

// askAgent finds out whether the ECS agent answers, within a second.
func (d *daemon) askAgent(ctx context.Context) agentState {
	addr := agentAddr(d.cfg.agentURL)
	if !addr.IsValid() {
		return agentOff
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr.String()+"/",
		nil)
	if err != nil {
		return agentOff
	}
	transport := &http.Transport{DisableKeepAlives: true}
	if d.guard != nil && !d.guard.trusted.Load() {
		c, err := new(net.Dialer).DialContext(ctx, "tcp4", addr.String())
		if err != nil {
			return agentNone
		}
		_ = c.Close()
		return agentForeign
	}
	resp, err := transport.RoundTrip(req)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return agentNone
	case err != nil:
		return agentSilent
	}
	_ = resp.Body.Close()
	return agentThere
}

// event is a packet that somebody should hear of, as the socket shows it.
type event struct {
	Time     time.Time
	Verdict  string
	Addr     string // its source
	MAC      string // its source
	Ifindex  int    // where it came in
	Device   string
	Task     string // whose port that is; "": nobody's
	HeldBack uint64 // packets of the verdict since the last event that none was made for
}

// refused reports whether the packet was dropped.
func (e event) refused() bool { return refuses(e.Verdict) }

// refuses reports whether packets with a verdict are dropped.
func refuses(verdict string) bool {
	return strings.HasPrefix(strings.ToLower(meanings[verdict]), "dropped")
}

// eventOf says whose port it is that e came in by.
func eventOf(e loader.Event, views []*lookup.View) event {
	out := event{Time: e.Time, Verdict: e.Verdict, Addr: e.Addr.String(), MAC: macText(e.MAC),
		Ifindex: e.Ifindex, HeldBack: e.HeldBack}
	out.Device, _ = deviceOf(e.Ifindex)
	for _, v := range views {
		for _, ep := range v.Task.Endpoints {
			if ep.Ifindex == e.Ifindex {
				out.Task = v.Task.ID
			}
		}
	}
	return out
}

// eventLog keeps the last events, and tells those who follow. Its methods are safe for concurrent
// use.
type eventLog struct {
	mu        sync.Mutex // guards what follows
	last      []loader.Event
	followers map[chan loader.Event]bool
}

// keptEvents is how many events are remembered, and how many a follower may be behind.
const keptEvents = 256

// add takes note of e. A follower that is too far behind misses it.
func (l *eventLog) add(e loader.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.last) == keptEvents {
		l.last = append(l.last[:0], l.last[1:]...)
	}
	l.last = append(l.last, e)
	for ch := range l.followers {
		select {
		case ch <- e:
		default:
		}
	}
}

func (l *eventLog) recent() []loader.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.last)
}

// follow returns the events so far and a channel of those that come.
func (l *eventLog) follow() (so []loader.Event, news chan loader.Event, end func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	news = make(chan loader.Event, keptEvents)
	if l.followers == nil {
		l.followers = map[chan loader.Event]bool{}
	}
	l.followers[news] = true
	return slices.Clone(l.last), news, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.followers, news)
	}
}

// handler answers with a line of JSON for each event, as show has it: those so far, and with
// ?follow=1 those that come.
func (l *eventLog) handler(show func(loader.Event) event) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		so, news, end := l.follow()
		defer end()
		w.Header().Set("Content-Type", "application/x-ndjson")
		lines, out := json.NewEncoder(w), http.NewResponseController(w)
		for _, e := range so {
			_ = lines.Encode(show(e))
		}
		_ = out.Flush()
		for r.FormValue("follow") == "1" {
			select {
			case e := <-news:
				if lines.Encode(show(e)) != nil || out.Flush() != nil {
					return
				}
			case <-r.Context().Done():
				return
			}
		}
	})
}
