package loader

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func touch(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	wantLog(t, "files", got, want...)
}

// A map's pins of other layouts are removed with a log line each; other files stay.
func TestRemoveOtherLayouts(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	dir := t.TempDir()
	touch(t, dir, "counters_v1", "ip_task_v1", "ip_task_v2", "ip_task_v3", "mine")
	if err := removeOtherLayouts(dir, "ip_task", "ip_task_v2", zap.New(core)); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, "counters_v1", "ip_task_v2", "mine")
	if logs.Len() != 2 {
		t.Errorf("got %d log lines, want 2", logs.Len())
	}
}

// Detach removes metad's pins of every layout, and the directory only if nothing else is in it.
func TestRemovePins(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pins")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	touch(t, dir, "counters_v1", "ip_task_v7", "mine")
	if err := removePins(dir); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, "mine")
	if err := os.Remove(filepath.Join(dir, "mine")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time there is no directory
		if err := removePins(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// The pin directory must belong to metad's user, and no other may enter it.
func TestCheckOwner(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pins")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	link := dir + "-link"
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	f := func(path string, mode os.FileMode, uid int, want string) {
		t.Helper()
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		err := checkOwner(path, uid)
		if want == "" && err != nil || want != "" && (!errors.Is(err, ErrPinDir) ||
			!strings.Contains(err.Error(), want)) {
			t.Errorf("%s, %o, uid %d: got %v, want %q", path, mode, uid, err, want)
		}
	}
	own := os.Getuid()
	f(dir, 0o700, own, "")
	f(dir, 0o700, own+1, "belongs to uid")
	f(dir, 0o750, own, "mode 0750")
	f(dir, 0o702, own, "mode 0702")
	f(link, 0o700, own, "not a directory")
}

// Addresses and TCP ports are in the kernel's byte order there, and come back as they were.
func TestByteOrder(t *testing.T) {
	a := netip.MustParseAddr("169.254.170.2")
	if got := addr4(be32(a)); got != a {
		t.Errorf("got %v, want %v", got, a)
	}
	if be32(netip.MustParseAddr("::1")) != 0 || be32(netip.Addr{}) != 0 {
		t.Error("an address that is not IPv4 is not 0")
	}
	if got := be16(be16(51679)); got != 51679 {
		t.Errorf("got %d, want 51679", got)
	}
}
