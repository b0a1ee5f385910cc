package dockerproxy

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Listen returns a listener on the Unix socket path, and makes its directory. A user who may use
// the Engine's socket may use this one: it has the group of engine and its mode, at most 0660, also
// when they change. Before there is an engine it is its owner's alone.
//
// A socket that exists is replaced in one step; the connections that the old socket has accepted go
// on. Anything else at path is an error. Closing the listener removes the socket, unless it was
// replaced, or another process goes on with it: Adopt.
func Listen(path, engine string) (*Socket, error) {
	l, err := listen(path, engine)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", path, err)
	}
	return l, nil
}

func listen(path, engine string) (*Socket, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, errors.New("the path exists and is not a socket")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	_ = os.Remove(tmp) // of a process that died here
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	s := &Socket{UnixListener: l, path: path, closed: make(chan struct{})}
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		err = allow(tmp, engine)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // no Engine yet
	}
	if err == nil {
		s.info, err = os.Lstat(tmp)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return nil, errors.Join(err, l.Close())
	}
	go s.follow(engine)
	return s, nil
}

// allow gives the socket at path the mode and group of the Engine's socket.
func allow(path, engine string) error {
	info, err := os.Stat(engine)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		err = os.Chown(path, -1, int(st.Gid)) // first: the mode is the new group's
	}
	return errors.Join(err, os.Chmod(path, info.Mode().Perm()&0o660))
}

// followEvery is how often the socket's mode and group are made those of the Engine's.
const followEvery = 500 * time.Millisecond

// follow keeps the socket's mode and group equal to those of the Engine's: an Engine makes its
// socket first, and gives it mode and group then. It ends when the listener is closed or replaced.
// While the Engine is away, all stays as it was.
func (s *Socket) follow(engine string) {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.closed:
			return
		case <-tick.C:
		}
		if !s.current() {
			return
		}
		_ = allow(s.path, engine) // again at the next tick
	}
}

// Adopt returns a listener on the socket at path that another process listens on, of which file is
// the listener, by File. It is as Listen's from then on. file stays the caller's.
func Adopt(file *os.File, path, engine string) (*Socket, error) {
	l, err := adopt(file, path)
	if err != nil {
		return nil, fmt.Errorf("go on listening on %q: %w", path, err)
	}
	go l.follow(engine)
	return l, nil
}

func adopt(file *os.File, path string) (*Socket, error) {
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("not a unix socket but %s", l.Addr().Network()),
			l.Close())
	}
	u.SetUnlinkOnClose(false)
	s := &Socket{UnixListener: u, path: path, closed: make(chan struct{})}
	if s.info, err = os.Lstat(path); err != nil {
		return nil, errors.Join(err, u.Close())
	}
	return s, nil
}

// Socket is a listener on a socket that another process may replace, or share.
type Socket struct {
	*net.UnixListener
	path   string
	info   fs.FileInfo
	once   sync.Once
	closed chan struct{} // when the listener is
	shared atomic.Bool   // another process has it now
}

// File returns the listener for another process to Adopt, and its path; an error if another socket
// is in its place. The caller closes the file.
func (s *Socket) File() (file *os.File, path string, err error) {
	if !s.current() {
		return nil, "", fmt.Errorf("%s is another socket now", s.path)
	}
	file, err = s.UnixListener.File()
	return file, s.path, err
}

// lingerTime is how long a socket that another process has still serves the connections that were
// accepted here. The docker command sends a second request on its connection, and would otherwise
// lose it in between.
const lingerTime = time.Second

// Succeed leaves the socket to the process that has it by File: no connection is accepted here any
// more, and the clients of those that were have had time to send their requests when it returns.
func (s *Socket) Succeed() {
	s.shared.Store(true)
	_ = s.SetDeadline(time.Unix(1, 0)) // a Close would end the serving of what was accepted
	time.Sleep(lingerTime)
}

// current reports whether a client that connects to the path reaches this socket.
func (s *Socket) current() bool {
	info, err := os.Lstat(s.path)
	return err == nil && os.SameFile(info, s.info)
}

// Close closes the listener, and removes the socket if it is still this one and no other process
// has it.
func (s *Socket) Close() error {
	s.once.Do(func() { close(s.closed) })
	err := s.UnixListener.Close()
	if !s.shared.Load() && s.current() {
		err = errors.Join(err, os.Remove(s.path))
	}
	return err
}
