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

// manner is how the kernel makes a file's text.
type manner uint8

const (
	// inPieces: of as many whole lines as fit into a page, as files do that list objects (fs/seq_file.c).
	inPieces manner = iota
	// whole: in one piece, as all files of cgroupfs.
	whole
	// atOnce: whole, and of numbers that are there already: no lock that others hold for long, nothing to add up.
	atOnce
)

// readFile reads the file called name, which must end in a NUL, in the directory dir into buf and
// returns the part of buf it fills. It does not allocate unless it fails. A file that does not fit is
// errDamaged.
func readFile(dir int, name string, buf []byte, how manner) ([]byte, error) {
	var once keptFile
	return once.read(dir, name, buf, how, false, nil)
}

// readAll reads an open file from its start, which has the kernel make its text anew.
func readAll(fd int, buf []byte, how manner) ([]byte, error) {
	n := 0
	for {
		m, err := pread(fd, buf[n:], n, how)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		n += m
		if n == len(buf) {
			return nil, fmt.Errorf("%w: more than %d bytes", errDamaged, len(buf))
		}
		if m == 0 || how != inPieces || n < listBytes {
			return buf[:n], nil
		}
	}
}

// pread tells the Go runtime of the call only where it may take a while. The runtime's watch over a thread that
// may be waiting costs a tenth of a sample, which is a dozen of calls of a microsecond each.
func pread(fd int, buf []byte, at int, how manner) (int, error) {
	if how != atOnce {
		return unix.Pread(fd, buf, int64(at))
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), uintptr(at), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
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

// budget counts the files that a source keeps open between two readings.
type budget struct{ open, max int }

// keptFile is a file that may stay open between two readings, each of which begins anew: that takes a fifth of
// the time, and costs the kernel a page of memory. The zero value is one that is not open.
type keptFile struct{ fd int32 } // the descriptor and 1

// read returns what readFile does. keep leaves the file open for the next reading, if the budget allows.
func (k *keptFile) read(dir int, name string, buf []byte, how manner, keep bool, b *budget) ([]byte, error) {
	if k.fd > 0 {
		return readAll(int(k.fd-1), buf, how)
	}
	fd, err := openat(dir, name)
	if err != nil {
		return nil, err
	}
	text, err := readAll(fd, buf, how)
	if err != nil || !keep || b.open >= b.max {
		unix.Close(fd)
		return text, err
	}
	k.fd = int32(fd) + 1
	b.open++
	return text, nil
}

// close closes the file, if it is open.
func (k *keptFile) close(b *budget) {
	if k.fd > 0 {
		unix.Close(int(k.fd - 1))
		k.fd = 0
		b.open--
	}
}
