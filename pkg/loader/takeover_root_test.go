//go:build root

package loader

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/zap/zaptest"

	"metad/internal/testnet"
)

// One process after another takes over; no request fails, new ports are hooked, and the last one's
// Close leaves nothing.
func TestRootTakeover(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h := testnet.NewHost(t)
		b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
		one, two := b.AddTask(""), b.AddTask("")
		dir := testnet.PinDir(t)
		l, err := Open(Config{Netns: h.NS, Attach: mode, PinDir: dir,
			Log: zaptest.NewLogger(t)})
		if err != nil {
			t.Fatalf("%+v", err)
		}
		put(t, l, one, 1)
		ln, err := l.Listen()
		if err != nil {
			t.Fatal(err)
		}
		go answerAll(ln)
		if err := l.Arm(); err != nil {
			t.Fatal(err)
		}

		var stop atomic.Bool
		var wg sync.WaitGroup
		var served, failed atomic.Int64
		for range 4 {
			wg.Go(func() { // a new connection each
				for !stop.Load() {
					if _, body, err := one.Get("/", timeout); err != nil ||
						body != "metad 0x1" {
						t.Errorf("new connection: got %q, %v", body, err)
						failed.Add(1)
					}
					served.Add(1)
				}
			})
			wg.Go(func() { // keep-alive
				c, err := two.Dial(timeout)
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				for !stop.Load() {
					if _, body, err := testnet.GetOn(c, "/",
						timeout); err != nil ||
						!strings.HasPrefix(body, "metad ") {
						t.Errorf("keep-alive: got %q, %v", body, err)
						failed.Add(1)
						return
					}
					served.Add(1)
				}
			})
		}
		for range 10 {
			files, meta, err := l.OfferTakeover()
			if err != nil {
				t.Fatal(err)
			}
			next, nextLn, err := TakeOver(Config{Netns: h.NS, Attach: mode, PinDir: dir,
				Log: zaptest.NewLogger(t)}, files, meta)
			if err != nil {
				t.Fatalf("%+v", err)
			}
			go answerAll(nextLn)
			if err := errors.Join(ln.Close(), l.FinishTakeover()); err != nil {
				t.Fatal(err)
			}
			l, ln = next, nextLn
		}
		stop.Store(true)
		wg.Wait()
		t.Logf("%d requests over 10 takeovers, %d failed", served.Load(), failed.Load())

		late := b.AddTask("")
		untilAnswer(t, late, portTag(late))
		put(t, l, late, 3)
		wantAnswer(t, late, "metad 0x3")
		if entries, err := l.Entries(); err != nil || len(entries) != 2 {
			t.Errorf("entries: got %v, %v", entries, err)
		}
		if err := errors.Join(l.Disarm(), ln.Close(), l.Close()); err != nil {
			t.Error(err)
		}
		for _, ifindex := range []int{one.Ifindex, late.Ifindex, b.Ifindex} {
			if attached(t, h, ifindex) {
				t.Errorf("ifindex %d still has our program", ifindex)
			}
		}
		for _, n := range h.LinkNames() {
			if n == hostVeth {
				t.Error("metad0 is left")
			}
		}
	})
}

// A handover that comes to nothing leaves both sides sound.
func TestRootTakeoverRefused(t *testing.T) {
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	k := b.AddTask("")
	l := open(t, h, Config{})
	put(t, l, k, 1)
	serve(t, l)
	for name, spoil := range map[string]func([]*os.File, []byte) ([]*os.File, []byte){
		"not JSON":      func(f []*os.File, _ []byte) ([]*os.File, []byte) { return f, []byte("?") },
		"files missing": func(f []*os.File, m []byte) ([]*os.File, []byte) { f[len(f)-1].Close(); return f[:len(f)-1], m },
		"another layout": func(f []*os.File, m []byte) ([]*os.File, []byte) {
			return f, []byte(strings.Replace(string(m),
				fmt.Sprintf(`"Layout":%d`, l.progs.layout), `"Layout":99`, 1))
		},
		"maps mixed up": func(f []*os.File, m []byte) ([]*os.File, []byte) { f[4], f[7] = f[7], f[4]; return f, m },
	} {
		files, meta, err := l.OfferTakeover()
		if err != nil {
			t.Fatal(err)
		}
		files, meta = spoil(files, meta)
		if _, _, err := TakeOver(Config{Netns: h.NS, PinDir: l.cfg.PinDir}, files,
			meta); !errors.Is(err, ErrLayout) {
			t.Errorf("%s: got %v, want ErrLayout", name, err)
		}
		if err := l.CancelTakeover(); err != nil {
			t.Fatal(err)
		}
		wantAnswer(t, k, "metad 0x1")
	}
	late := b.AddTask("")
	untilAnswer(t, late, portTag(late))
}

// What the process opens after a takeover has a higher descriptor number than every link: when the
// process is killed, the kernel closes connections before the links that bring their resets out.
func TestRootTakeoverNumbers(t *testing.T) {
	h := testnet.NewHost(t)
	h.AddBridge("ecs-bridge", "169.254.172.1/22").AddTask("")
	l := open(t, h, Config{})
	serve(t, l)
	files, meta, err := l.OfferTakeover()
	if err != nil {
		t.Fatal(err)
	}
	next, ln, err := TakeOver(Config{Netns: h.NS, PinDir: l.cfg.PinDir}, files, meta)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer func() {
		if err := errors.Join(ln.Close(), next.FinishTakeover(),
			l.CancelTakeover()); err != nil {
			t.Error(err)
		}
	}()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if int(f.Fd()) < next.fds.top {
		t.Errorf("got number %d, want one above %d", f.Fd(), next.fds.top)
	}
}
