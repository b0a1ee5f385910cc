//go:build root

package takeover

import (
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const nobody = 65534

// asNobody runs f on a thread of its own without root's rights. What the thread opens has its
// credentials; it ends with f.
func asNobody(t *testing.T, f func() error) error {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody,
			nobody); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	return <-done
}

// TestRootPeer: neither side deals with a process of another user, whatever the socket's mode lets
// in.
func TestRootPeer(t *testing.T) {
	ctx, cfg := testContext(t), testConfig(t)
	if err := os.Chmod(cfg.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	const want = "has uid 65534: want root"
	f := func(name string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", name, err, want)
		}
	}

	h := newPredecessor(t, ctx, cfg, emptyState)
	if err := os.Chmod(cfg.path(), 0o666); err != nil {
		t.Fatal(err)
	}
	f("successor", asNobody(t, func() error { _, err := Take(ctx, cfg); return err }))
	if n := h.given.Load(); n != 0 {
		t.Errorf("given %d times, want never", n)
	}
	p, err := Take(ctx, cfg)
	if err == nil {
		err = p.Serving(ctx)
	}
	if err != nil {
		t.Fatal("root after that:", err)
	}
	p.Socket.Close()

	// The other way round: a socket that is not root's.
	os.Remove(cfg.path())
	var s *Socket
	other := cfg
	other.Dir += "/nobody"
	if err := asNobody(t,
		func() (err error) { s, err = Listen(other); return err }); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, err = Take(ctx, other)
	f("predecessor", err)
}
