//go:build root

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"metad/internal/testdocker"
	"metad/internal/testnet"
)

// load asks for metadata from several tasks without a pause, half of the connections kept alive,
// and keeps account of the answers.
type load struct {
	tasks []loadTask
	stop  atomic.Bool
	wait  sync.WaitGroup

	mu     sync.Mutex // guards what follows
	right  int        // the asker's own task
	agent  int        // the stand-in agent's answer
	wrong  []string
	failed []failure
	slow   []failure // took longer than a second, answered or not
}

type failure struct {
	at, took time.Duration
	conn     string // the connection it happened on
	err      error
}

func (f failure) String() string {
	return fmt.Sprintf("%v+%v %s %v", f.at.Round(time.Millisecond),
		f.took.Round(time.Millisecond), f.conn, f.err)
}

type loadTask struct {
	ns   netns.NsHandle
	arn  string
	addr netip.Addr
}

// saved reports whether the snapshot has each task with its address. A task that is there without
// one, as its first version was, is not known to the next metad: it would take the task's packets
// and answer that nobody has the address.
func saved(runDir string, tasks []loadTask) bool {
	file := readFile(filepath.Join(runDir, "snapshot.json"))
	return !slices.ContainsFunc(tasks, func(k loadTask) bool {
		return !strings.Contains(file, k.arn) ||
			!strings.Contains(file, fmt.Sprintf(`"Addr":%q`, k.addr))
	})
}

const agentAnswer = "the agent"

var loadStart = time.Now()

// startLoad starts conns connections spread over n tasks that it makes in h.
func startLoad(t *testing.T, h *testdocker.Host, n, conns int) *load {
	t.Helper()
	l := &load{}
	for i := range n {
		task := h.RunTask(t, testdocker.Task{ID: fmt.Sprintf("load-%d", i),
			Containers: []testdocker.Container{{Name: "app"}}})
		ns, err := netns.GetFromPid(h.Inspect(t, task.Pause).State.Pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Close() })
		l.tasks = append(l.tasks, loadTask{ns, task.ARN, task.Port.Addr})
	}
	waitFor(t, "every task to be known", func() bool {
		for _, k := range l.tasks {
			var c loadConn
			if body, err := c.ask(k, false); err != nil ||
				!strings.Contains(body, k.arn) {
				return false
			}
		}
		return true
	})
	for i := range conns {
		l.wait.Go(func() { l.run(l.tasks[i%n], i/n%2 == 0) })
	}
	t.Cleanup(l.end)
	return l
}

func (l *load) end() {
	l.stop.Store(true)
	l.wait.Wait()
}

func (l *load) run(k loadTask, keepAlive bool) {
	var c loadConn
	defer c.close()
	for !l.stop.Load() {
		begin := time.Now()
		body, err := c.ask(k, keepAlive)
		took := time.Since(begin)
		l.mu.Lock()
		switch {
		case err != nil:
			l.failed = append(l.failed, failure{begin.Sub(loadStart), took,
				c.what(took), err})
		case body == agentAnswer:
			l.agent++
		case strings.Contains(body, `"TaskARN":"`+k.arn+`"`):
			l.right++
		default:
			l.wrong = append(l.wrong, fmt.Sprintf("%v+%v %s", begin.Sub(loadStart),
				took, body))
		}
		if took > time.Second {
			l.slow = append(l.slow, failure{begin.Sub(loadStart), took, c.what(took),
				err})
		}
		l.mu.Unlock()
		if err != nil {
			c.close()
		}
	}
}

// hung returns the requests that waited in vain.
func (l *load) hung() (hung []failure) {
	for _, f := range l.failed {
		var e net.Error
		if errors.As(f.err, &e) && e.Timeout() {
			hung = append(hung, f)
		}
	}
	return hung
}

func (l *load) requests() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.right + l.agent + len(l.wrong) + len(l.failed)
}

// loadConn is a client's connection, opened when there is none.
type loadConn struct {
	c      net.Conn
	br     *bufio.Reader
	local  net.Addr // of the last connection that came about
	opened time.Time
	dialed time.Duration // how long that took
}

// what describes the connection of a request that took so long.
func (c *loadConn) what(took time.Duration) string {
	if c.local == nil {
		return "never connected"
	}
	if age := time.Since(c.opened); age > took {
		return fmt.Sprintf("%v, open for %v", c.local, (age - took).Round(time.Millisecond))
	}
	return fmt.Sprintf("%v, new, opened in %v", c.local, c.dialed.Round(time.Millisecond))
}

func (c *loadConn) close() {
	if c.c != nil {
		c.c.Close()
		c.c = nil
	}
}

func (c *loadConn) ask(k loadTask, keepAlive bool) (body string, err error) {
	const timeout = 8 * time.Second // for the connection, and for the answer
	begin := time.Now()
	if c.c == nil {
		if c.c, err = testnet.Dial(k.ns, "", testnet.Endpoint, timeout); err != nil {
			c.c, c.local = nil, nil
			return "", err
		}
		c.br, c.local, c.opened, c.dialed = bufio.NewReader(c.c), c.c.LocalAddr(),
			time.Now(), time.Since(begin)
	}
	if err := c.c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	header := "Connection: close\r\n"
	if keepAlive {
		header = ""
	}
	if _, err := fmt.Fprintf(c.c, "GET /v2/metadata HTTP/1.1\r\nHost: 169.254.170.2\r\n%s\r\n",
		header); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(c.br, nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.Close || !keepAlive {
		c.close()
	}
	return string(b), err
}

// putAgentBehind has a stand-in agent answer where requests go without metad, by the agent's own
// rule.
func putAgentBehind(t *testing.T, h *testdocker.Host) {
	t.Helper()
	startAgent(t, h, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, agentAnswer) }))
	h.ECSNetwork(t) // the bridge must be there for its sysctl
	for _, c := range [][]string{
		{"sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1"},
		{"iptables", "-w", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", "169.254.170.2", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:51679"},
	} {
		if out, err := h.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c, err, out)
		}
	}
}

// One metad after the other takes over under load, and no request fails.
func TestRootTakeover(t *testing.T) {
	const takeovers, requests = 20, 100_000
	h := testdocker.Start(t)
	putAgentBehind(t, h) // its answer would mean that packets went past metad
	d := startMetad(t, h)
	l := startLoad(t, h, 4, 64)
	for i := range takeovers {
		waitFor(t, "requests", func() bool { return l.requests() >= requests*(i+1)/(takeovers+1) })
		old, oldOut := d.done, d.out
		d.start()
		select {
		case <-old:
		case <-d.done:
			t.Fatalf("takeover %d: the new metad ended:\n%s", i, d.out)
		case <-time.After(30 * time.Second):
			t.Fatalf("takeover %d: the old metad is still there:\n%s\nthe new one:\n%s",
				i, oldOut, d.out)
		}
		d.waitReady()
	}
	waitFor(t, "requests", func() bool { return l.requests() >= requests })
	l.end()
	t.Logf("%d takeovers: %d requests, %d right, %d wrong, %d by the agent, %d failed, %d "+
		"slower than a second", takeovers,
		l.requests(), l.right, len(l.wrong), l.agent, len(l.failed), len(l.slow))
	if l.right != l.requests() {
		t.Errorf("first of the wrong: %v, of the failed: %v", first(l.wrong),
			first(l.failed))
	}
}

func first[T any](s []T) []T { return s[:min(3, len(s))] }

// Killed 100 times under load, metad or the agent answers, and nothing is left behind.
func TestRootKill(t *testing.T) {
	const kills = 100
	h := testdocker.Start(t)
	putAgentBehind(t, h)
	d := startMetad(t, h)
	l := startLoad(t, h, 4, 64)
	// A task of the last second may be in no snapshot yet: metad would take packets without
	// knowing it.
	waitFor(t, "every task to be in the snapshot", func() bool {
		return saved(d.runDir(), l.tasks)
	})
	var killed, over []time.Duration // a kill, and the next metad ready
	kill := func() {
		killed = append(killed, time.Since(loadStart))
		d.kill()
	}
	for range kills {
		n := l.requests()
		waitFor(t, "requests", func() bool { return l.requests() > n+200 })
		kill()
		n = l.requests()
		waitFor(t, "requests", func() bool { return l.requests() > n+100 })
		d.start()
		d.waitReady()
		over = append(over, time.Since(loadStart))
	}
	kill()
	over = append(over, math.MaxInt64) // never: the agent has it from here on
	n := l.requests()
	waitFor(t, "requests", func() bool { return l.requests() > n+100 })
	l.end()

	// A connection or a request is cut off by the kill that comes while it lasts, and by
	// nothing else.
	var unasked []failure
	var latest time.Duration
	for _, f := range l.failed {
		i, _ := slices.BinarySearch(killed, f.at+f.took)
		if i == 0 || f.at > over[i-1] {
			unasked = append(unasked, f)
			continue
		}
		latest = max(latest, f.at+f.took-killed[i-1])
	}
	hung := l.hung()
	t.Logf("%d kills: %d requests, %d right, %d by the agent, %d wrong, %d refused or reset "+
		"(the latest %v after its kill), %d of them without a kill, %d slower than a "+
		"second, %d hung",
		len(killed), l.requests(), l.right, l.agent, len(l.wrong), len(l.failed),
		latest.Round(time.Millisecond), len(unasked), len(l.slow), len(hung))
	if len(l.wrong) > 0 || len(unasked) > 0 || len(hung) > 0 || l.agent == 0 || l.right == 0 {
		t.Errorf("wrong: %v, without a kill: %v, hung: %v", first(l.wrong), first(unasked),
			first(hung))
	}
	waitFor(t, "metad0 to go", func() bool {
		return h.Command("ip", "link", "show", "metad0").Run() != nil
	})
	var e *exec.ExitError
	if out, err := h.Command("ip", "-o", "link", "show", "type",
		"veth").CombinedOutput(); err != nil && !errors.As(err, &e) {
		t.Errorf("links: %v %s", err, out)
	} else if n := strings.Count(string(out), "\n"); n != len(l.tasks) {
		t.Errorf("got %d veths, want the %d tasks':\n%s", n, len(l.tasks), out)
	}
}
