package stats

import (
	"errors"
	"fmt"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errGone means that the directory's process or cgroup has ended. It is the normal end of a
// container.
var errGone = errors.New("gone")

// maxFileBytes is the largest file that is read. The largest known, io.stat of a host with
// hundreds of disks, is a tenth of it.
const maxFileBytes = 256 << 10

// listBytes is the smallest size of a piece of a list that another piece follows. A piece is a
// page (4096 bytes or more) less part of a line, and a line of net/dev has less than 300 bytes.
const listBytes = 3796

// isShort reports whether err means that the process had no file descriptor free, or the kernel no
// memory. Such an error says nothing about the file.
func isShort(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) ||
		errors.Is(err, unix.ENOMEM)
}

// openDir opens a directory as a handle for openat. It pins neither a network namespace nor the
// cgroup. Once the process or cgroup is gone, it never leads to another one, even if the number or
// name is used again. The path must end in a NUL.
func openDir(path []byte) (int, error) {
	cwd := unix.AT_FDCWD
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(cwd),
		uintptr(unsafe.Pointer(unsafe.SliceData(path))),
		unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0, 0, 0)
	if errno == 0 {
		return int(fd), nil
	}
	var err error = errno
	if errno == unix.ENOENT || errno == unix.ESRCH {
		err = errGone
	}
	return -1, fmt.Errorf("open %q: %w", string(path[:len(path)-1]), err)
}

// openProc opens the directory of a process.
func openProc(root string, pid int) (int, error) {
	var space [256]byte // enough that nothing is allocated
	path := append(append(space[:0], root...), '/')
	return openDir(append(strconv.AppendInt(path, int64(pid), 10), 0))
}

// manner is the way in which the kernel makes a file's text.
type manner uint8

const (
	// inPieces: each read returns as many whole lines as fit into a page. Files that list
	// objects do this (fs/seq_file.c).
	inPieces manner = iota
	// whole: in one piece, as all files of cgroupfs.
	whole
	// atOnce: whole, and the kernel has the numbers ready: it adds up nothing, and takes no
	// lock that is held for long.
	atOnce
)

// readFile reads the file called name, which must end in a NUL, in the directory dir into buf and
// returns the part of buf it fills. It does not allocate unless it fails. A file that does not fit
// is errDamaged.
func readFile(dir int, name string, buf []byte, how manner) ([]byte, error) {
	var once keptFile
	return once.read(dir, name, buf, how, false)
}

// readAll reads an open file from its start, for which the kernel makes the text anew.
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

// pread tells the Go runtime of the call only if it may take long. A sample is a dozen calls of a
// microsecond each, and the runtime's bookkeeping for a blocking call costs a tenth of it.
func pread(fd int, buf []byte, at int, how manner) (int, error) {
	if how != atOnce {
		return unix.Pread(fd, buf, int64(at))
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), uintptr(at), 0,
		0)
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
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(dir),
		uintptr(unsafe.Pointer(unsafe.StringData(name))),
		unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// keptFile is a file that may stay open between two readings; each reading starts at its
// beginning. That takes a fifth of the time, and a page of the kernel's memory. The zero value is
// a closed file.
type keptFile struct{ fd int32 } // the descriptor and 1

// open opens the file, which is not open.
func (k *keptFile) open(dir int, name string) error {
	fd, err := openat(dir, name)
	if err == nil {
		k.fd = int32(fd) + 1
	}
	return err
}

// read returns what readFile does. keep leaves the file open for the next reading.
func (k *keptFile) read(dir int, name string, buf []byte, how manner, keep bool) ([]byte, error) {
	if k.fd == 0 {
		if err := k.open(dir, name); err != nil {
			return nil, err
		}
	}
	text, err := readAll(int(k.fd-1), buf, how)
	if err != nil || !keep {
		k.close()
	}
	return text, err
}

// close closes the file, if it is open, and reports whether it was.
func (k *keptFile) close() bool {
	if k.fd == 0 {
		return false
	}
	unix.Close(int(k.fd - 1))
	k.fd = 0
	return true
}
