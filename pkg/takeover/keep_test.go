package takeover

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
)

// A kept state comes back whole and in order, although no process had it meanwhile: more files
// than a packet has, and more bytes than a queue.
func TestKeep(t *testing.T) {
	cfg := Config{Layout: 3, Build: "test"}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	given := State{Meta: bytes.Repeat([]byte("task"), 1<<20), Files: []*os.File{f}}
	for range 2 * partFiles {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		given.Files = append(given.Files, null)
	}
	kept, err := Keep(cfg, given)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	waiting, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatalf("a client while nothing but the kernel has the listener: %v", err)
	}
	defer waiting.Close()
	s, err := Kept(cfg, kept)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(s.Files)
	if !bytes.Equal(s.Meta, given.Meta) || len(s.Files) != 1+2*partFiles {
		t.Errorf("got %d bytes, %d files, want %d, %d", len(s.Meta), len(s.Files),
			len(given.Meta), 1+2*partFiles)
	}
	if ln, err = net.FileListener(s.Files[0]); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// A state that another version has kept is refused, and its files are closed. So are the files of
// one that is closed unread.
func TestKeepInVain(t *testing.T) {
	keep := func() (kept, pipe *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		f, err := Keep(Config{Layout: 3}, State{Files: []*os.File{w}})
		if err != nil {
			t.Fatal(err)
		}
		return f, r
	}
	closed := func(pipe *os.File) {
		t.Helper()
		if _, err := pipe.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("got %v, want EOF", err)
		}
	}
	f, pipe := keep()
	if _, err := Kept(Config{Layout: 4}, f); !errors.Is(err, ErrRefused) {
		t.Errorf("got %v, want ErrRefused", err)
	}
	closed(pipe)
	f, pipe = keep()
	f.Close()
	closed(pipe)

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := Kept(Config{Layout: 3}, r); err == nil {
		t.Error("a pipe holds a state")
	}
}
