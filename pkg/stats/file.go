package stats

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errGone means that what the directory stood for, a process or a cgroup, is no more. It is the
// normal end of a container.
var errGone = errors.New("gone")

// maxFileBytes bounds a file that is read. The largest in the field, io.stat of a host with
// hundreds of disks, is a tenth of it.
const maxFileBytes = 256 << 10

// listBytes is what a piece of a list has at least if another one follows: less than a page (4096, or
// more) by one line, and a line of net/dev is less than 300 bytes.
const listBytes = 3796

// openDir opens a directory as a handle for others' openat: it pins neither a network namespace nor
// the cgroup, and once the thing is removed it never leads to another one, whatever number or name is
// used again.
func openDir(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return -1, fmt.Errorf("open %q: %w", path, errGone)
	}
	if err != nil {
		return -1, fmt.Errorf("open %q: %w", path, err)
	}
	return fd, nil
}

// readFile reads the file called name, which must end in a NUL, in the directory dir into buf and
// returns the part of buf it fills. It does not allocate unless it fails. A file that does not fit is
// errDamaged. whole: see readAll.
func readFile(dir int, name string, buf []byte, whole bool) ([]byte, error) {
	fd, err := openat(dir, name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return readAll(fd, buf, whole)
}

// readAll reads an open file from its start, which has the kernel make its text anew. whole tells that
// the kernel hands the text out in one piece: the files of cgroupfs are so, those that list objects come in
// pieces of as many whole lines as fit into a page (fs/seq_file.c).
func readAll(fd int, buf []byte, whole bool) ([]byte, error) {
	n := 0
	for {
		m, err := unix.Pread(fd, buf[n:], int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		n += m
		if n == len(buf) {
			return nil, fmt.Errorf("%w: more than %d bytes", errDamaged, len(buf))
		}
		if m == 0 || whole || n < listBytes {
			return buf[:n], nil
		}
	}
}

// openat opens the file called name, which must end in a NUL, for reading. Unlike unix.Openat it
// makes no copy of the name; the kernel reads it during the call only.
func openat(dir int, name string) (int, error) {
	if name[len(name)-1] != 0 {
		return -1, unix.EINVAL
	}
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(unsafe.StringData(name))),
		unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}
