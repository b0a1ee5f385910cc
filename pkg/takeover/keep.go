package takeover

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A state can also wait for a successor that does not run yet, with no process that has it: Keep
// sends hello and state into a pair of sockets of which the service manager keeps one end. Its
// queue holds the files, and the files hold all that is in the kernel. When that end is closed
// unread, the kernel removes everything, as it does after a kill.

// Keep returns a file that holds s until Kept reads it, and closes the files of s. Whoever has the
// file open has the state.
func Keep(cfg Config, s State) (_ *os.File, err error) {
	defer s.close()
	meta, err := metaFile(s.Meta)
	if err != nil {
		return nil, fmt.Errorf("keep the state: %w", err)
	}
	s.Meta, s.Files = nil, append([]*os.File{meta}, s.Files...)
	pair, err := unix.Socketpair(unix.AF_UNIX,
		unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("keep the state: %w", err)
	}
	kept := os.NewFile(uintptr(pair[0]), "kept")
	k, err := connOf(os.NewFile(uintptr(pair[1]), "keeping"))
	if err == nil {
		defer k.close()
		// The queue has room for thousands of files; a full one must not hold up a stop.
		k.deadline(time.Now().Add(helloWithin))
		err = k.send(message{Type: typeHello, Protocol: protocol, Layout: cfg.Layout,
			Build: cfg.Build})
	}
	if err == nil {
		err = k.sendState(s, func() {})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("keep the state: %w", err), kept.Close())
	}
	return kept, nil
}

// Kept returns the state that f holds, and closes f. Errors: ErrRefused, if a metad with another
// protocol or layout has kept it.
func Kept(cfg Config, f *os.File) (s State, err error) {
	k, err := connOf(f)
	if err != nil {
		return s, fmt.Errorf("kept state: %w", err)
	}
	defer k.close()
	k.deadline(time.Now().Add(helloWithin))
	hello, files, err := k.receive()
	closeAll(files)
	switch {
	case err != nil:
		return s, fmt.Errorf("kept state: %w", err)
	case hello.Type != typeHello || hello.Protocol != protocol ||
		hello.Layout != cfg.Layout:
		return s, fmt.Errorf(
			"%w: metad %s has kept protocol %d and layout %d, this one has %d and %d",
			ErrRefused, hello.Build, hello.Protocol, hello.Layout, protocol, cfg.Layout)
	}
	if s, err = k.receiveState(); err != nil {
		return s, fmt.Errorf("kept state: %w", err)
	}
	if len(s.Files) == 0 {
		return s, errors.New("kept state: no files")
	}
	meta := s.Files[0]
	s.Files = s.Files[1:]
	defer meta.Close()
	// The file's offset is where the writer left it.
	s.Meta, err = io.ReadAll(io.NewSectionReader(meta, 0, maxMeta))
	if err != nil {
		s.close()
		return s, fmt.Errorf("kept state: %w", err)
	}
	return s, nil
}

// Inherit returns the predecessor that has kept st and is gone. The caller is the only one that
// serves, from the beginning.
func (s *Socket) Inherit(st State) *Predecessor {
	left := make(chan struct{})
	close(left)
	return &Predecessor{State: st, Socket: s, left: left}
}

// metaFile returns a file in memory with b: it may be longer than a socket's queue.
func metaFile(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("metad-state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memory for it: %w", err)
	}
	f := os.NewFile(uintptr(fd), "metad-state")
	if _, err := f.Write(b); err != nil {
		return nil, errors.Join(fmt.Errorf("memory for it: %w", err), f.Close())
	}
	return f, nil
}

// connOf takes f over, also when it fails.
func connOf(f *os.File) (*conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("a %T, want a unix socket", c), c.Close())
	}
	return &conn{c: u}, nil
}
