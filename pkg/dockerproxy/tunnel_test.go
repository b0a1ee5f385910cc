package dockerproxy

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// connected returns both ends of a connection: of the kernel's sockets, or of none.
func connected(t *testing.T, network string) (near, far net.Conn) {
	t.Helper()
	if network == "pipe" {
		near, far = net.Pipe()
	} else {
		addr := "127.0.0.1:0"
		if network == "unix" {
			addr = filepath.Join(t.TempDir(), "s")
		}
		ln, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		if near, err = net.Dial(network, ln.Addr().String()); err != nil {
			t.Fatal(err)
		}
		if far, err = ln.Accept(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// Every byte arrives once and in order, whatever kinds of connections there are, when the receiver
// is slow, and in any sizes.
func TestPump(t *testing.T) {
	data := make([]byte, 3<<20)
	random := rand.NewChaCha8([32]byte{})
	_, _ = random.Read(data)
	for _, kinds := range [][2]string{{"unix", "unix"}, {"unix", "tcp"}, {"tcp", "unix"},
		{"pipe", "unix"}, {"unix", "pipe"}} {
		t.Run(kinds[0]+" to "+kinds[1], func(t *testing.T) {
			source, from := connected(t, kinds[0])
			to, sink := connected(t, kinds[1])
			go func() {
				defer source.Close()
				for rest := data; len(rest) > 0; {
					n := min(len(rest), 1+rand.IntN(100_000))
					if _, err := source.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
				}
			}()
			done := make(chan error, 1)
			go func() {
				done <- pump(to, from)
				to.Close()
			}()
			time.Sleep(20 * time.Millisecond) // all buffers are full
			got, err := io.ReadAll(sink)
			if err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Errorf("pump: %v", err)
			}
			if !bytes.Equal(got, data) {
				t.Errorf("got %d bytes, want the %d that were sent", len(got),
					len(data))
			}
		})
	}
}

// Who receives leaves: the pump ends, and leaves no pipe behind.
func TestPumpReceiverLeaves(t *testing.T) {
	before := openFiles(t)
	t.Run("", func(t *testing.T) {
		source, from := connected(t, "unix")
		to, sink := connected(t, "unix")
		go func() {
			b := make([]byte, 64<<10)
			for {
				if _, err := source.Write(b); err != nil {
					return
				}
			}
		}()
		done := make(chan error, 1)
		go func() { done <- pump(to, from) }()
		if _, err := io.CopyN(io.Discard, sink, 1<<20); err != nil {
			t.Fatal(err)
		}
		sink.Close()
		if err := <-done; !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("got %v, want a broken pipe", err)
		}
	})
	if after := openFiles(t); after > before {
		t.Errorf("got %d open files, want the %d of before", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}
