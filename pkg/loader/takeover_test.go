package loader

import (
	"encoding/json"
	"errors"
	"os"
	"testing"
)

// someFiles returns n files, any.
func someFiles(t *testing.T, n int) (files []*os.File) {
	t.Helper()
	for range n {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	return files
}

func metaOf(t *testing.T, o takeover) []byte {
	t.Helper()
	var err error
	if o.Layout == 0 {
		if o.Layout, err = LayoutVersion(); err != nil {
			t.Fatal(err)
		}
	}
	meta, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return meta
}

// Every file of an offer goes where the offer says.
func TestUnpack(t *testing.T) {
	files := someFiles(t, 4+2+1+2)
	o, err := unpack(files, metaOf(t, takeover{
		Maps: []string{"a", "b"}, PairLinks: 1,
		Hooks: []takeoverHook{{1, 0, true}, {2, 1, false}, {3, 1, true}},
	}))
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range append([]*os.File{o.host, o.server, o.lock, o.listener},
		append(append(o.maps, o.pair...), o.links...)...) {
		if f != files[i] {
			t.Errorf("file %d is in another place", i)
		}
	}
	if len(o.maps) != 2 || len(o.pair) != 1 || len(o.links) != 2 {
		t.Errorf("got %d maps, %d and %d links, want 2, 1 and 2", len(o.maps), len(o.pair),
			len(o.links))
	}
}

// An offer whose files do not add up is refused with ErrLayout.
func TestUnpackRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		files int
		meta  []byte
	}{
		"not JSON":       {4, []byte("?")},
		"another layout": {4, metaOf(t, takeover{Layout: 99})},
		"too few":        {3, metaOf(t, takeover{})},
		"too many":       {5, metaOf(t, takeover{})},
		"fewer than no":  {3, metaOf(t, takeover{PairLinks: -1})},
	} {
		if _, err := unpack(someFiles(t, c.files), c.meta); !errors.Is(err, ErrLayout) {
			t.Errorf("%s: got %v, want ErrLayout", name, err)
		}
	}
}

// ownNetns returns the network namespace of the test's thread. The process's first thread may be in
// another one: a test in the same process may have used it to enter a namespace, and it cannot end.
func ownNetns(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// A metad in another network namespace is not taken over from, whatever run directory the two
// share.
func TestOfferOfAnotherNamespace(t *testing.T) {
	// another namespace in that it is another inode
	elsewhere, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	if err := (&offer{host: elsewhere}).check(&Config{}); !errors.Is(err, ErrNetns) {
		t.Errorf("got %v, want ErrNetns", err)
	}
}

// Dropping after the end needs clsact: an offer by tcx is refused then, and no other.
func TestOfferCheck(t *testing.T) {
	f := func(o takeover, cfg Config, refused bool) {
		t.Helper()
		if err := (&offer{takeover: o, host: ownNetns(t)}).check(&cfg); errors.Is(err,
			ErrLayout) != refused {
			t.Errorf("%+v: got %v, want refused %v", o, err, refused)
		}
	}
	f(takeover{OnExit: OnExitOpen, Attach: AttachTCX}, Config{OnExit: OnExitOpen}, false)
	f(takeover{OnExit: OnExitOpen, Attach: AttachTCX}, Config{OnExit: OnExitDrop}, true)
	f(takeover{OnExit: OnExitOpen, Attach: AttachClsact}, Config{OnExit: OnExitDrop}, false)
}
