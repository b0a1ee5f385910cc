package netdump

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A list that the kernel breaks off is asked for again, until it is whole or does not become so.
// Any other error ends it at once.
func TestWhole(t *testing.T) {
	broken := fmt.Errorf("list links: %w", netlink.ErrDumpInterrupted)
	f := func(name string, interrupted int, interrupt, then error, wantCalls int, want error) {
		t.Helper()
		calls := 0
		all, err := Whole(func() ([]string, error) {
			if calls++; calls <= interrupted {
				return []string{"a"}, interrupt
			}
			return []string{"a", "b"}, then
		})
		if calls != wantCalls || !errors.Is(err, want) {
			t.Errorf("%s: got %v after %d calls, want %v after %d", name, err, calls,
				want, wantCalls)
		}
		if want == nil && !slices.Equal(all, []string{"a", "b"}) {
			t.Errorf("%s: got %q, want the whole list", name, all)
		}
	}
	f("undisturbed", 0, nil, nil, 1, nil)
	f("broken off", 3, broken, nil, 4, nil)
	f("a signal", 3, unix.EINTR, nil, 4, nil)
	f("broken off for ever", 1000, broken, nil, tries, netlink.ErrDumpInterrupted)
	f("gone", 0, nil, fs.ErrNotExist, 1, fs.ErrNotExist)
	f("broken off, then gone", 2, broken, fs.ErrNotExist, 3, fs.ErrNotExist)
}
