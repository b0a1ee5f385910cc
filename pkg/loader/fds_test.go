package loader

import (
	"os"
	"testing"
)

func newTestFDs(t *testing.T) *lowFDs {
	t.Helper()
	f, err := reserveLowFDs()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.close)
	return f
}

// place gives a stand-in for a link one of the reserved numbers.
func place(t *testing.T, f *lowFDs, w where) *fdLink {
	t.Helper()
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	k, err := f.placeFD(int(file.Fd()), w)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Links get reserved numbers, from the end that was asked for, and give them back.
func TestFDsPlace(t *testing.T) {
	f := newTestFDs(t)
	all := len(f.free)
	low, high := place(t, f, lowest), place(t, f, highest)
	if !f.held[low.fd] || !f.held[high.fd] || low.fd >= high.fd {
		t.Errorf("got %d and %d, want two reserved numbers in order", low.fd, high.fd)
	}
	if n := f.links(); n != 2 {
		t.Errorf("got %d links, want 2", n)
	}
	if err := low.Close(); err != nil {
		t.Fatal(err)
	}
	if again := place(t, f, lowest); again.fd != low.fd {
		t.Errorf("got %d, want %d again", again.fd, low.fd)
	}
	if err := high.Close(); err != nil {
		t.Fatal(err)
	}
	if len(f.free) != all-1 {
		t.Errorf("got %d free numbers, want %d", len(f.free), all-1)
	}
}

// After fill whatever is opened has a higher number than every link, also where lower ones were
// free.
func TestFDsFill(t *testing.T) {
	before, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	f := newTestFDs(t)
	before.Close() // its number is below the reserved ones
	if err := f.fill(); err != nil {
		t.Fatal(err)
	}
	after, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	if int(after.Fd()) < f.top {
		t.Errorf("got number %d, want one above %d", after.Fd(), f.top)
	}
}

// More links than reserved numbers get what is free, and closing them closes the number.
func TestFDsExhausted(t *testing.T) {
	f := newTestFDs(t)
	f.free = nil
	k := place(t, f, lowest)
	if f.held[k.fd] {
		t.Errorf("%d is a reserved number", k.fd)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if err := k.Close(); err == nil {
		t.Error("the number is still open")
	}
}
