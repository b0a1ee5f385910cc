package dockerproxy

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"metad/internal/expect"
)

// As long as there is no Engine, its group cannot be known, and the socket is root's alone. It is
// the group's as soon as the Engine's socket is.
func TestListenBeforeTheEngine(t *testing.T) {
	dir := t.TempDir()
	engine, path := filepath.Join(dir, "engine.sock"), filepath.Join(dir, "run", "docker.sock")
	l, err := Listen(path, engine)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mode := func() fs.FileMode {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	if got := mode(); got != 0o600 {
		t.Errorf("before the Engine: %v, want 0600", got)
	}
	e, err := net.Listen("unix", engine)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := os.Chmod(engine, 0o660); err != nil {
		t.Fatal(err)
	}
	expect.Until(t, "the socket is the group's", func() bool { return mode() == 0o660 })
}

// The socket lets in whom the Engine's lets in, replaces a dead or living one, and goes with its
// listener.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	engine, path := filepath.Join(dir, "engine.sock"), filepath.Join(dir, "run", "docker.sock")
	e, err := net.Listen("unix", engine)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	mode := func(of string, chmod, want fs.FileMode) {
		t.Helper()
		if chmod != 0 {
			if err := os.Chmod(engine, chmod); err != nil {
				t.Fatal(err)
			}
		}
		l, err := Listen(path, of)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("Engine's %v: got %v, %v", chmod, info.Mode(), err)
		}
		if was, _ := os.Stat(engine); of == engine &&
			was.Sys().(*syscall.Stat_t).Gid != info.Sys().(*syscall.Stat_t).Gid {
			t.Error("another group than the Engine's socket")
		}
	}
	mode(engine, 0o660, 0o660)
	mode(engine, 0o777, 0o660)
	mode(engine, 0o600, 0o600)
	mode("/nonexistent", 0, 0o600)

	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	old, err := Listen(path, engine)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path, engine)
	if err != nil {
		t.Fatal(err)
	}
	old.Succeed() // has been
	if err := old.Close(); err != nil {
		t.Error(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Errorf("after the old listener has closed: %v", err)
	} else {
		conn.Close()
	}
	l.Close()
	if list, _ := os.ReadDir(filepath.Dir(path)); len(list) != 0 {
		t.Errorf("left behind: %v", list)
	}

	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, engine); err == nil {
		t.Error("in the place of a file: no error")
	}
}

func TestValidate(t *testing.T) {
	f := func(c Config, field string) {
		t.Helper()
		expect.Field(t, c.validate(), field)
	}
	f(Config{}, "")
	f(Config{Engine: "/e.sock", SELinux: SELinuxOn, MaxBodyBytes: 1}, "")
	f(Config{Engine: "tcp://x"}, "Engine")
	f(Config{SELinux: "Z"}, "SELinux")
	f(Config{MaxBodyBytes: -1}, "MaxBodyBytes")
	if _, err := New(Config{SELinux: "Z"}, nil, nil, nil); err == nil {
		t.Error("New: no error")
	}
}
