//go:build root

package loader

import (
	"fmt"
	"net"
	"net/http"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"metad/bpf"
	"metad/internal/testnet"
)

const timeout = 5 * time.Second

// bothModes runs f with TCX, if the kernel must have it, and with clsact.
func bothModes(t *testing.T, f func(*testing.T, AttachMode)) {
	t.Run("clsact", func(t *testing.T) { f(t, AttachClsact) })
	t.Run("tcx", func(t *testing.T) { testnet.SkipBefore(t, "6.6"); f(t, AttachTCX) })
}

// hostWithAgent returns a host with a bridge on which the stand-in agent has the endpoint's
// address, as if its rule had led there.
func hostWithAgent(t testing.TB) (*testnet.Host, *testnet.Bridge) {
	t.Helper()
	b := newBridge(t)
	b.Host.AddAddr(b.Name, "169.254.170.2/32")
	b.Host.StandInAgent(testnet.Endpoint)
	return b.Host, b
}

// newBridge returns a bridge that metad watches, on a host of its own.
func newBridge(t testing.TB) *testnet.Bridge {
	t.Helper()
	return testnet.NewHost(t).AddBridge("ecs-bridge", "169.254.172.1/22")
}

// serving returns a loader that serves on b's host. It knows the tasks, by the tags 1, 2, ….
func serving(t testing.TB, b *testnet.Bridge, cfg Config, tasks ...*testnet.Task) *Loader {
	t.Helper()
	l := open(t, b.Host, cfg)
	for i, k := range tasks {
		put(t, l, k, uint32(i+1))
	}
	serve(t, l)
	return l
}

// open opens a loader on the host, to be closed at the test's end.
func open(t testing.TB, h *testnet.Host, cfg Config) *Loader {
	t.Helper()
	cfg.Netns = h.NS
	if cfg.PinDir == "" {
		cfg.PinDir = testnet.PinDir(t)
	}
	if cfg.Log == nil {
		cfg.Log = zaptest.NewLogger(t)
	}
	l, err := Open(cfg)
	if err != nil {
		t.Fatalf("open: %+v", err)
	}
	t.Log("attach mode:", l.tc.mode) // for the table of scripts/results
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return l
}

// serve listens, answers "metad <mark in hex>", and arms.
func serve(t testing.TB, l *Loader) {
	t.Helper()
	testnet.ServeOn(t, listen(t, l), answerMark)
}

// listen returns the listener of an armed loader. The test's end closes it.
func listen(t testing.TB, l *Loader) net.Listener {
	t.Helper()
	ln, err := l.Listen()
	if err == nil {
		t.Cleanup(func() { ln.Close() })
		err = l.Arm()
	}
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func answerMark(c net.Conn, _ *http.Request) string {
	mark, err := testnet.Mark(c)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("metad %#x", mark)
}

func put(t testing.TB, l *Loader, k *testnet.Task, tag uint32) {
	t.Helper()
	v := &bpf.TaskValue{Tag: tag, Ifindex: uint32(k.Ifindex), Mac: k.MAC}
	if err := l.Put(k.Addr, v); err != nil {
		t.Fatal(err)
	}
}

func wantAnswer(t testing.TB, k *testnet.Task, want string) {
	t.Helper()
	_, body, err := k.Get("/", timeout)
	if err != nil || body != want {
		t.Errorf("task %s: got %q, %v, want %q", k, body, err, want)
	}
}

func TestRootServe(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		b := newBridge(t)
		one, two, unknown := b.AddTask(""), b.AddTask(""), b.AddTask("")
		b.Host.NoLeak()
		serving(t, b, Config{Attach: mode}, one, two)
		wantAnswer(t, one, "metad 0x1")
		wantAnswer(t, two, "metad 0x2")
		wantAnswer(t, unknown, fmt.Sprintf("metad %#x", bpf.TagPort|uint32(unknown.Ifindex)))
	})
}

// layout returns the version of the pinned maps.
func layout(t testing.TB) uint32 {
	t.Helper()
	v, err := LayoutVersion()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// unhook takes the program off a port, which is then seen at its bridge only.
func unhook(t testing.TB, l *Loader, ifindex int) {
	t.Helper()
	h := l.ports.remove(ifindex)
	if h == nil {
		t.Fatalf("ifindex %d has no hook", ifindex)
	}
	if err := h.on.Close(); err != nil {
		t.Fatal(err)
	}
}
