//go:build root

package loader

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"metad/bpf"
	"metad/internal/testnet"
)

// childEnv is set in a process that the tests started to be killed.
const childEnv = "METAD_TEST_CHILD"

// childConfig is what such a process does: serve, on the host whose namespace is its file 3.
type childConfig struct {
	PinDir string
	Attach AttachMode
	OnExit OnExit
	Tasks  []childTask
}

type childTask struct {
	Addr    netip.Addr
	Ifindex int
	MAC     [6]byte
	Tag     uint32
}

func TestMain(m *testing.M) {
	if cfg := os.Getenv(childEnv); cfg != "" {
		run := func() error { return child(cfg) }
		if cfg == squatChild {
			run = squat
		}
		if err := run(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child serves until its standard input ends, and then exits cleanly.
func child(config string) error {
	var c childConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	l, err := Open(Config{PinDir: c.PinDir, Attach: c.Attach, OnExit: c.OnExit,
		Netns: netns.NsHandle(3)})
	if err != nil {
		return err
	}
	for _, k := range c.Tasks {
		v := &bpf.TaskValue{Tag: k.Tag, Ifindex: uint32(k.Ifindex), Mac: k.MAC}
		if err := l.Put(k.Addr, v); err != nil {
			return err
		}
	}
	ln, err := l.Listen()
	if err != nil {
		return err
	}
	go answerAll(ln)
	if err := l.Arm(); err != nil {
		return err
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return errors.Join(l.Disarm(), ln.Close(), l.Close())
}

// answerAll is a server that needs no testing.T.
func answerAll(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			r := bufio.NewReader(c)
			for {
				for {
					line, err := r.ReadString('\n')
					if err != nil {
						return
					}
					if line == "\r\n" {
						break
					}
				}
				body := answerMark(c, nil)
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s",
					len(body), body)
			}
		}()
	}
}

type childProcess struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// start starts a child on h and waits until it serves.
func start(t testing.TB, h *testnet.Host, c childConfig) *childProcess {
	t.Helper()
	config, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+string(config))
	dup, err := unix.Dup(int(h.NS))
	if err != nil {
		t.Fatal(err)
	}
	ns := os.NewFile(uintptr(dup), "netns")
	defer ns.Close()
	cmd.ExtraFiles = []*os.File{ns}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &childProcess{cmd, stdin}
	t.Cleanup(p.kill)
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line != "ready\n" {
		t.Fatalf("child: %q, %v", line, err)
	}
	return p
}

func (p *childProcess) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func childTasks(tasks ...*testnet.Task) (cs []childTask) {
	for i, k := range tasks {
		cs = append(cs, childTask{k.Addr, k.Ifindex, k.MAC, uint32(i + 1)})
	}
	return cs
}

// A killed process leaves no namespace and no veth, what its clients ask goes to the agent at once,
// and nobody hangs. Most of the ports came after the start: with TCX their links are the newest
// files.
func TestRootKill(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h, b := hostWithAgent(t)
		k := b.AddTask("")
		wantAnswer(t, k, "agent")
		p := start(t, h, childConfig{PinDir: testnet.PinDir(t), Attach: mode,
			Tasks: childTasks(k)})
		wantAnswer(t, k, "metad 0x1")
		var late []*testnet.Task
		for range 40 {
			late = append(late, b.AddTask(""))
		}
		last := late[len(late)-1]
		testnet.Until(t, "the last port is hooked", func() bool {
			_, body, err := last.Get("/", timeout)
			return err == nil && body == fmt.Sprintf("metad %#x",
				bpf.TagPort|uint32(last.Ifindex))
		})
		var idle []net.Conn
		for range 20 {
			for _, from := range []*testnet.Task{k, late[0], last} {
				c, err := from.Dial(timeout)
				if err == nil {
					_, _, err = testnet.GetOn(c, "/", timeout)
				}
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				idle = append(idle, c)
			}
		}

		clients := []*testnet.Task{k, late[0], late[20], last}
		synRetrans := 0
		for _, c := range clients {
			synRetrans -= c.Netstat("TCPSynRetrans")
		}
		var stop atomic.Bool
		var wg sync.WaitGroup
		var mu sync.Mutex
		seen := map[string]int{}
		var killed, lastBad atomic.Int64
		var slowest time.Duration
		for _, from := range clients {
			wg.Go(func() {
				for !stop.Load() {
					began := time.Now()
					_, body, err := from.Get("/", timeout)
					took := time.Since(began)
					what := strings.Fields(body + " ?")[0]
					if err != nil {
						what = errorKind(err)
					}
					mu.Lock()
					seen[what]++
					if what != "agent" && what != "metad" {
						lastBad.Store(time.Now().UnixNano())
					}
					if killed.Load() != 0 {
						slowest = max(slowest, took)
					}
					mu.Unlock()
				}
			})
		}
		time.Sleep(100 * time.Millisecond) // of load
		killed.Store(time.Now().UnixNano())
		p.kill()
		reaped := time.Now()
		for i, c := range idle {
			if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); errors.Is(err,
				os.ErrDeadlineExceeded) {
				t.Errorf("idle connection %d hangs", i)
			}
		}
		for _, from := range append(late, k) {
			// a refusal or two may be seen
			testnet.Until(t, from.String()+" is answered by the agent", func() bool {
				_, body, err := from.Get("/", timeout)
				return err == nil && body == "agent"
			})
		}
		stop.Store(true)
		wg.Wait()
		t.Logf("%v; dead after %v, last failed request %v after the kill, slowest since %v",
			seen,
			reaped.Sub(time.Unix(0, killed.Load())),
			time.Duration(max(0, lastBad.Load()-killed.Load())), slowest)
		// A SYN that went to a server that was no more would be sent again after a second.
		for _, c := range clients {
			synRetrans += c.Netstat("TCPSynRetrans")
		}
		if synRetrans != 0 {
			t.Errorf("%d SYNs had to be sent again", synRetrans)
		}
		for what := range seen {
			switch what {
			case "metad", "agent", "refused", "reset":
			default:
				t.Errorf("a client saw: %s", what)
			}
		}
		testnet.Until(t, "metad0 is gone", func() bool {
			for _, n := range h.LinkNames() {
				if n == hostVeth {
					return false
				}
			}
			return true
		})
	})
}

// What the agent has accepted while metad was away stays the agent's; all else is metad's, also
// from a port that the agent has not forgotten yet.
func TestRootAgentsConnections(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h, b := hostWithAgent(t)
		k, unknown := b.AddTask(""), b.AddTask("")
		l := open(t, h, Config{Attach: mode, AgentAddr: Endpoint})
		put(t, l, k, 1)
		want := func(c net.Conn, want string) {
			t.Helper()
			_, body, err := testnet.GetOn(c, "/", timeout)
			if err != nil || body != want {
				t.Errorf("got %q, %v, want %q", body, err, want)
			}
		}
		dial := func(k *testnet.Task, local string) net.Conn {
			t.Helper()
			c, err := testnet.Dial(k.NS, local, testnet.Endpoint, timeout)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c
		}
		theirs := map[*testnet.Task]net.Conn{k: dial(k, ""), unknown: dial(unknown, "")}
		for _, c := range theirs {
			want(c, "agent")
		}
		// The agent closes first: its end lingers for a minute.
		port := netip.AddrPortFrom(k.Addr, 45000).String()
		lingers := dial(k, port)
		fmt.Fprint(lingers, "GET / HTTP/1.0\r\n\r\n")
		if b, err := io.ReadAll(lingers); err != nil || !strings.HasSuffix(string(b),
			"agent") {
			t.Fatalf("got %q, %v", b, err)
		}
		lingers.Close()

		serve(t, l)
		for _, c := range theirs {
			want(c, "agent")
		}
		want(dial(k, port), "metad 0x1")
		want(dial(k, ""), "metad 0x1")
		want(dial(unknown, ""), portTag(unknown))
		if verdictsOf(t, l)["port_agent"] == 0 {
			t.Error("port_agent did not move")
		}
	})
}

func errorKind(err error) string {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused"
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, io.EOF),
		errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.EPIPE):
		return "reset"
	default:
		return err.Error()
	}
}

// While metad stops, it answers on the connections that it has, and new ones are the agent's. A
// packet that poses as one of such a connection is left alone.
func TestRootStoppingConnections(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h, b := hostWithAgent(t)
		k, unknown := b.AddTask(""), b.AddTask("")
		l := open(t, h, Config{Attach: mode, AgentAddr: Endpoint})
		put(t, l, k, 1)
		serve(t, l)
		want := map[*testnet.Task]string{k: "metad 0x1", unknown: portTag(unknown)}
		open := map[*testnet.Task]net.Conn{}
		for k := range want {
			c, err := k.Dial(timeout)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			open[k] = c
		}
		// as after a second, or many other connections
		for i := range l.progs.Handshakes.MaxEntries() {
			if err := l.progs.Handshakes.Put(i, bpf.Handshake{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Disarm(); err != nil {
			t.Fatal(err)
		}
		for k, c := range open {
			_, body, err := testnet.GetOn(c, "/", timeout)
			if err != nil || body != want[k] {
				t.Errorf("open connection of %s: got %q, %v, want %q", k, body,
					err, want[k])
			}
			wantAnswer(t, k, "agent")
		}

		frame := testnet.Frame{SrcMAC: k.MAC, DstMAC: b.MAC, Src: k.Addr,
			Flags:   testnet.ACK,
			SrcPort: netip.MustParseAddrPort(open[k].LocalAddr().String()).Port()}
		posed := frame
		posed.SrcMAC = unknown.MAC
		for _, c := range []struct {
			name    string
			frame   testnet.Frame
			ifindex int
			ret     uint32
		}{
			{"its own", frame, k.Ifindex, actRedirect},
			{"of another port", frame, unknown.Ifindex, actUnspec},
			{"of another MAC", posed, k.Ifindex, actUnspec},
		} {
			ret, _, _ := run(t, h, l.progs.MetadPort, c.frame.Bytes(), c.ifindex, 0)
			if ret != c.ret {
				t.Errorf("%s: got %#x, want %#x", c.name, ret, c.ret)
			}
		}
	})
}
