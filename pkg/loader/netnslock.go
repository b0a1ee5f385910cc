package loader

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrBusy means that another metad serves the network namespace, even if its directories have
// other names. A second one would take metad0 from it.
var ErrBusy = errors.New("another metad serves this network namespace")

// lockWait is how long a killed metad may take to end.
const lockWait = 2 * time.Second

// netnsLock is the lock of a network namespace: an abstract unix socket. Each network namespace
// has its own such names, and a name ends with its last descriptor.
type netnsLock struct{ fd int }

// Close unlocks, unless a process that has taken over has the lock too.
func (l *netnsLock) Close() error { return unix.Close(l.fd) }

// Busy returns ErrBusy if a metad serves the network namespace of cfg. Detach would take its
// devices away.
func Busy(cfg Config) error {
	ns, err := hostNS(cfg.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	lock, err := lockNetns(ns, 0)
	if err != nil {
		return err
	}
	return lock.Close()
}

// netnsNames is how many names are tried, because any process of the namespace may take one. If
// that process could not make metad's devices, the next name is the lock.
const netnsNames = 8

// lockNetns makes the caller the only metad in ns. Errors: ErrBusy.
func lockNetns(ns netns.NsHandle, within time.Duration) (*netnsLock, error) {
	for end := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		var fd int
		err := inNS(ns, func() (err error) {
			for i := range netnsNames {
				if fd, err = bindName("metad-" + strconv.Itoa(i)); !errors.Is(err,
					errSquatter) {
					return err
				}
			}
			return err
		})
		if err == nil {
			return &netnsLock{fd}, nil
		}
		if !errors.Is(err, ErrBusy) || time.Now().After(end) {
			return nil, fmt.Errorf("lock the network namespace: %w", err)
		}
	}
}

var errSquatter = errors.New("held by a process that is no metad")

// bindName takes the name in the thread's network namespace. Errors: ErrBusy, errSquatter.
func bindName(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK,
		0)
	if err != nil {
		return -1, err
	}
	addr := &unix.SockaddrUnix{Name: "@" + name}
	if err = unix.Bind(fd, addr); err == nil {
		// never accepted from: others read who listens
		if err = unix.Listen(fd, 4096); err == nil {
			return fd, nil
		}
	}
	if errors.Is(err, unix.EADDRINUSE) {
		err = holder(fd, addr)
	}
	unix.Close(fd)
	return -1, err
}

// holder returns an error that names the process that listens at addr.
func holder(fd int, addr unix.Sockaddr) error {
	if err := unix.Connect(fd, addr); err != nil {
		// gone by now, or thousands have asked
		return fmt.Errorf("%w: connect: %w", ErrBusy, err)
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || cred.Pid == 0 { // of another process namespace
		return ErrBusy
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cred.Pid))
	if err == nil && !mayNetAdmin(string(status)) {
		return fmt.Errorf("%w: process %d", errSquatter, cred.Pid)
	}
	return fmt.Errorf("%w: process %d", ErrBusy, cred.Pid)
}

// mayNetAdmin reports whether the process of a /proc/PID/status could have made metad's devices.
func mayNetAdmin(status string) bool {
	_, rest, _ := strings.Cut(status, "\nCapEff:\t")
	line, _, _ := strings.Cut(rest, "\n")
	effective, err := strconv.ParseUint(line, 16, 64)
	return err != nil || effective&(1<<unix.CAP_NET_ADMIN) != 0
}
