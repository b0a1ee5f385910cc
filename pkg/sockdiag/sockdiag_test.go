package sockdiag

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// What the kernel says is read to its end and no further: a cgroup, or why there is none.
func TestParse(t *testing.T) {
	message := func(attrs ...byte) []byte { return append(make([]byte, messageLen), attrs...) }
	cgroup := []byte{12, 0, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	binary.NativeEndian.PutUint64(cgroup[4:], 4711)
	refused := func(e unix.Errno) []byte {
		return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e)))
	}
	f := func(kind uint16, b []byte, want uint64, wantErr error) {
		t.Helper()
		if got, err := parse(kind, b); got != want || !errors.Is(err, wantErr) {
			t.Errorf("got %d, %v, want %d, %v", got, err, want, wantErr)
		}
	}
	f(20, message(cgroup...), 4711, nil)
	f(20, message(append([]byte{5, 0, 15, 0, 9, 0, 0, 0}, cgroup...)...), 4711, nil)
	f(20, message(), 0, ErrUnknown)
	f(20, message(cgroup[:8]...), 0, unix.EINVAL)
	f(20, nil, 0, ErrUnknown)
	f(20, message()[1:], 0, ErrUnknown)
	f(unix.NLMSG_ERROR, refused(unix.ENOENT), 0, ErrUnknown)
	f(unix.NLMSG_ERROR, refused(unix.EPERM), 0, unix.EPERM)
	f(unix.NLMSG_ERROR, nil, 0, ErrUnknown)
}
