package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another metad runs with the same pin directory.
var ErrLocked = errors.New(
	"another metad runs with it: stop it first, or take over by giving its run-dir")

// LockPinDir makes the caller the only metad with the pins in dir. It waits for the lock for
// within at most, because a killed metad takes a moment to end. It makes the directory if it is
// missing. A fault of the directory is no error here; Open reports it. Closing the result unlocks.
// Errors: ErrLocked.
func LockPinDir(ctx context.Context, dir string, within time.Duration) (io.Closer, error) {
	_ = os.Mkdir(dir, 0o700)
	f, err := os.Open(dir)
	if err != nil {
		return io.NopCloser(nil), nil
	}
	const every = 20 * time.Millisecond
	for end := time.Now().Add(within); ; {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			break
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("pin-dir %q: %w", dir, ctx.Err())
		case <-time.After(every):
		}
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	return nil, fmt.Errorf("pin-dir %q: %w", dir, err)
}
