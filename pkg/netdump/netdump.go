// Package netdump makes the kernel's lists of network devices, addresses, routes and filters whole.
package netdump

import (
	"errors"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tries is how often a list is asked for at most. While containers come and go it is often broken
// off, and seldom many times in a row.
const tries = 20

// Whole returns what list does, which asks the kernel by netlink. A change beside the listing makes
// the kernel break it off (NLM_F_DUMP_INTR), and what it has told until then may lack something, so
// list is called again. After twenty times in a row the error is netlink.ErrDumpInterrupted.
func Whole[T any](list func() (T, error)) (all T, err error) {
	for range tries {
		all, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return all, err
}
