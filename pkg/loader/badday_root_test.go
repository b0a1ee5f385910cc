//go:build root

package loader

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"metad/internal/testnet"
)

// metad's own device, deleted or set down by another program: the agent answers at once, the state
// says what is wrong, and metad answers again once it has rebuilt the device. Nothing is lost over
// and over.
func TestRootOwnDevice(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h, b := hostWithAgent(t)
		k := b.AddTask("")
		core, logs := observer.New(zapcore.InfoLevel)
		l := open(t, h, Config{Attach: mode, HostRoute: true, Log: zap.New(core)})
		if err := l.Ready(); err == nil {
			t.Error("ready before Arm")
		}
		put(t, l, k, 1)
		serve(t, l)
		wantAnswer(t, k, "metad 0x1")
		lost, mended := 0, 0
		f := func(name string, do func() error) {
			t.Helper()
			lost, mended = lost+1, mended+1
			if err := do(); err != nil {
				t.Fatal(err)
			}
			told := func(what string) int { return logs.FilterMessage(what).Len() }
			testnet.Until(t, name+": rebuilt", func() bool {
				return told("metad's network device is rebuilt") == mended &&
					l.Ready() == nil
			})
			if n := told(
				"metad's network device is gone or down: containers are not " +
					"answered until it is rebuilt"); n != lost {
				t.Errorf("%s: told %d times, want %d", name, n, lost)
			}
			untilAnswer(t, k, "metad 0x1")
			if n := len(hostRoutes(t, h, l)); n == 0 {
				t.Errorf("%s: the host's route is gone", name)
			}
		}
		f("deleted", func() error { return h.NL.LinkDel(h.Link(hostVeth)) })
		f("down", func() error { return h.NL.LinkSetDown(h.Link(hostVeth)) })
		f("the other end down", func() error {
			nl, err := netlink.NewHandleAt(l.end.server, unix.NETLINK_ROUTE)
			if err != nil {
				return err
			}
			defer nl.Close()
			metad1, err := nl.LinkByName(serverVeth)
			if err != nil {
				return err
			}
			return nl.LinkSetDown(metad1)
		})
	})
}

// While metad's own device cannot be rebuilt (its name is taken) packets are left alone: the agent
// answers.
func TestRootOwnDeviceTaken(t *testing.T) {
	h, b := hostWithAgent(t)
	k := b.AddTask("")
	l := serving(t, b, Config{}, k)
	wantAnswer(t, k, "metad 0x1")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = hostVeth
	l.gate.mu.Lock() // until the name is taken
	err := errors.Join(h.NL.LinkDel(h.Link(hostVeth)),
		h.NL.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	l.gate.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	testnet.Until(t, "not ready", func() bool { return errors.Is(l.Ready(), ErrEndpoint) })
	wantAnswer(t, k, "agent")
	if err := l.Arm(); err != nil { // changes nothing until then
		t.Fatal(err)
	}
	wantAnswer(t, k, "agent")
	if err := h.NL.LinkDel(h.Link(hostVeth)); err != nil {
		t.Fatal(err)
	}
	testnet.Until(t, "ready", func() bool { return l.Ready() == nil })
	untilAnswer(t, k, "metad 0x1")
}

// A second metad in the network namespace is refused by name, whatever its directories are called,
// and the first one is not touched. A process that could not be a metad keeps no metad away.
func TestRootOnePerNamespace(t *testing.T) {
	b := newBridge(t)
	h, k := b.Host, b.AddTask("")
	l := serving(t, b, Config{}, k)
	_, err := Open(Config{Netns: h.NS, PinDir: testnet.PinDir(t)})
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "process ") {
		t.Errorf("a second one: got %v, want ErrBusy and the process", err)
	}
	if err := Busy(Config{Netns: h.NS}); !errors.Is(err, ErrBusy) {
		t.Errorf("Busy: got %v, want ErrBusy", err)
	}
	wantAnswer(t, k, "metad 0x1")
	files, meta, err := l.OfferTakeover()
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := testnet.NewHost(t)
	if _, _, err := TakeOver(Config{Netns: elsewhere.NS, PinDir: l.cfg.PinDir}, files,
		meta); !errors.Is(err, ErrNetns) {
		t.Errorf("a takeover from another namespace: got %v, want ErrNetns", err)
	}
	if err := l.CancelTakeover(); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, k, "metad 0x1")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Busy(Config{Netns: h.NS}); err != nil {
		t.Errorf("after the end: %v", err)
	}
}

// The lock passes by a process without CAP_NET_ADMIN that has taken its name.
func TestRootLockSquatter(t *testing.T) {
	h := testnet.NewHost(t)
	squatter(t, h)
	lock, err := lockNetns(h.NS, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if _, err := lockNetns(h.NS, 0); !errors.Is(err, ErrBusy) {
		t.Errorf("a second metad: got %v, want ErrBusy", err)
	}
}

// What a port's end between an offer and the takeover leaves behind does not refuse the takeover.
func TestRootTakeoverAfterAPortWent(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		b := newBridge(t)
		one, two := b.AddTask(""), b.AddTask("")
		l := serving(t, b, Config{Attach: mode}, one)
		testnet.Until(t, "two is hooked", func() bool { return hooked(l, two.Ifindex) })
		files, meta, err := l.OfferTakeover()
		if err != nil {
			t.Fatal(err)
		}
		two.Remove()
		next, ln, err := TakeOver(Config{Netns: b.Host.NS, Attach: mode,
			PinDir: l.cfg.PinDir}, files, meta)
		if err != nil {
			t.Fatalf("%+v", err)
		}
		go answerAll(ln)
		wantAnswer(t, one, "metad 0x1")
		if _, ok := portOf(next, two.Ifindex); ok {
			t.Error("the port that went is still hooked")
		}
		if err := errors.Join(l.FinishTakeover(), ln.Close(), next.Close()); err != nil {
			t.Error(err)
		}
	})
}

// After a takeover that fails in its middle the running metad's own programs are back: what the
// other one was told to trust is not trusted.
func TestRootTakeoverFailsLate(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		b := newBridge(t)
		one := b.AddTask("")
		l := serving(t, b, Config{Attach: mode}, one)
		unhook(t, l, one.Ifindex) // seen at the bridge alone: no proof
		wantAnswer(t, one, "metad 0x0")
		files, meta, err := l.OfferTakeover()
		if err != nil {
			t.Fatal(err)
		}
		// The listener comes last: by then the programs are in place.
		notOne, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		files[3].Close()
		files[3] = notOne
		next, _, err := TakeOver(Config{Netns: b.Host.NS, Attach: mode,
			PinDir: l.cfg.PinDir, TrustBridge: true}, files, meta)
		if err == nil {
			t.Fatal("the takeover did not fail", next.Close())
		}
		if _, body, err := one.Get("/", timeout); err != nil || body != "metad 0x1" {
			t.Fatalf("the failed one's programs: got %q, %v; want them in place, or "+
				"this test shows nothing", body, err)
		}
		if err := l.restore(); err != nil {
			t.Fatal(err)
		}
		wantAnswer(t, one, "metad 0x0")
		if err := l.CancelTakeover(); err != nil { // hooks the port again
			t.Fatal(err)
		}
		untilAnswer(t, one, "metad 0x1")
	})
}

// A bridge whose name no pattern matches is watched once it is named, and let go when it no longer
// is.
func TestRootSetBridges(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("mine", "10.9.0.1/16")
	k := b.AddTask("")
	l := open(t, h, Config{})
	serve(t, l)
	l.SetBridges([]string{"mine"})
	untilAnswer(t, k, portTag(k))
	later := b.AddTask("")
	untilAnswer(t, later, portTag(later))
	l.SetBridges(nil)
	testnet.Until(t, "the bridge and its ports are not hooked", func() bool {
		return len(l.Ports()) == 0
	})
	for _, ifindex := range []int{b.Ifindex, k.Ifindex} {
		if attached(t, h, ifindex) {
			t.Errorf("ifindex %d still has our program", ifindex)
		}
	}
}

// A task on a bridge that is not watched is refused at once instead of hanging, counted and told
// of. Where the agent has its rule the agent answers.
func TestRootUnwatched(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h := testnet.NewHost(t)
		k := h.AddBridge("mine", "10.9.0.1/16").AddTask("")
		core, logs := observer.New(zapcore.WarnLevel)
		l := open(t, h, Config{Attach: mode, HostRoute: true, Log: zap.New(core)})
		for range 2 {
			put(t, l, k, 1)
		}
		serve(t, l)
		if _, _, err := k.Get("/", timeout); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("got %v, want it refused", err)
		}
		if n := logs.FilterField(zap.Stringer("addr", k.Addr)).Len(); n != 1 {
			t.Errorf("told %d times, want once", n)
		}
		if u := l.Unwatched(); len(u) != 1 ||
			u[0] != (Unwatched{k.Addr, k.Ifindex, k.Port}) ||
			l.Status().Unwatched != 1 {
			t.Errorf("unwatched: got %+v", u)
		}
		h.StandInAgent("127.0.0.1:51679")
		iptables(t, h, "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", "169.254.170.2", "--dport", "80", "-j", "DNAT", "--to-destination", "127.0.0.1:51679")
		wantAnswer(t, k, "agent")
		l.SetBridges([]string{"mine"})
		untilAnswer(t, k, "metad 0x1")
		if u := l.Unwatched(); len(u) != 0 {
			t.Errorf("unwatched: got %+v, want none", u)
		}
	})
}

// A port that ties two bridges of the host together has no program: behind it the agent answers as
// without metad.
func TestRootTiedBridges(t *testing.T) {
	h, b := hostWithAgent(t)
	h.AddBridge("plain0", "10.9.0.1/16")
	k, direct := b.AddTask(""), b.AddTask("")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "tie0"
	for _, do := range []func() error{
		func() error { return h.NL.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "tie1"}) },
		func() error { return h.NL.LinkSetMaster(h.Link("tie0"), h.Link("plain0")) },
		func() error { return h.NL.LinkSetMaster(h.Link("tie1"), h.Link(b.Name)) },
		func() error { return h.NL.LinkSetUp(h.Link("tie0")) },
		func() error { return h.NL.LinkSetUp(h.Link("tie1")) },
		func() error { return h.NL.LinkSetMaster(h.Link(k.Port), h.Link("plain0")) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	untilAnswer(t, k, "agent")
	l := open(t, h, Config{Bridges: []string{"ecs-bridge"}})
	serve(t, l)
	if hooked(l, h.Link("tie1").Attrs().Index) {
		t.Error("the tie is hooked")
	}
	wantAnswer(t, direct, portTag(direct))
}

// The pin directory must be metad's alone.
func TestRootPinDirOwner(t *testing.T) {
	h := testnet.NewHost(t)
	dir := testnet.PinDir(t)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func() error{
		"another user's": func() error { return os.Chown(dir, 65534, 65534) },
		"open to others": func() error { return errors.Join(os.Chown(dir, 0, 0), os.Chmod(dir, 0o770)) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Netns: h.NS, PinDir: dir}); !errors.Is(err, ErrPinDir) {
			t.Errorf("%s: got %v, want ErrPinDir", name, err)
		}
	}
}

// Clients that acknowledge and read nothing are forgotten by the kernel a few seconds after the
// server has closed them.
func TestRootSlowReaders(t *testing.T) {
	b := newBridge(t)
	k := b.AddTask("")
	l := open(t, b.Host, Config{})
	put(t, l, k, 1)
	ln := listen(t, l)
	// Every probe of a closed window is acknowledged: by default Linux answers one in half a
	// second.
	if err := testnet.In(k.NS, func() error {
		return os.WriteFile("/proc/sys/net/ipv4/tcp_invalid_ratelimit", []byte("0"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	const n = 32
	var filling sync.WaitGroup
	for range n {
		c, err := k.Dial(timeout)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		filling.Go(func() { fillAndClose(t, s) })
	}
	filling.Wait()
	if sockets(t, l) == 0 { // on a slow machine the first may be forgotten by now
		t.Fatal("got no socket with an unread answer")
	}
	began := time.Now()
	for sockets(t, l) > 0 {
		if time.Since(began) > 30*time.Second {
			t.Fatalf("%d sockets are left after %v", sockets(t, l), time.Since(began))
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("forgotten after %v", time.Since(began).Round(100*time.Millisecond))
}

// fillAndClose writes until the client's buffer and the server's are full.
func fillAndClose(t *testing.T, s net.Conn) {
	t.Helper()
	wrote := 0
	for {
		if err := s.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Error(err)
		}
		m, err := s.Write(make([]byte, 64<<10))
		wrote += m
		if err != nil {
			break
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// sockets counts the TCP sockets of the server's namespace but for the listener.
func sockets(t *testing.T, l *Loader) (n int) {
	t.Helper()
	err := testnet.In(l.end.server, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/tcp")
		n = strings.Count(string(b), "\n") - 2 // the heading and the listener
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// squatChild is what the process of squatter has in childEnv.
const squatChild = "squat"

// squatter holds the lock's first name on the host from a process without capabilities.
func squatter(t *testing.T, h *testnet.Host) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+squatChild)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := testnet.In(h.NS, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("squatter: %q, %v", line, err)
	}
}

// The first thread's capabilities are what /proc shows of a process, and init runs in the first
// thread.
func init() {
	if os.Getenv(childEnv) != squatChild {
		return
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		panic(err)
	}
}

// squat is the process of squatter.
func squat() error {
	ln, err := net.Listen("unix", "@metad-0")
	if err != nil {
		return err
	}
	defer ln.Close()
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}
