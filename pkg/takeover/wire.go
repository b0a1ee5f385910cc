package takeover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// message is one packet: {"Type": "hello", "Protocol": 1, "Layout": 3, "Build": "v1.2"},
// {"Type": "state", "Meta": base64, "Files": how many come with the packet, "Last": true}, …
type message struct {
	Type     string
	Protocol uint32 `json:",omitempty"`
	Layout   uint32 `json:",omitempty"`
	Build    string `json:",omitempty"`
	Reason   string `json:",omitempty"`
	Meta     []byte `json:",omitempty"`
	Files    int    `json:",omitempty"`
	Last     bool   `json:",omitempty"`
}

const (
	typeHello    = "hello"
	typeRefuse   = "refuse"
	typeState    = "state"
	typeServing  = "serving"
	typeAccepted = "accepted"
	typeAbort    = "abort"
)

const (
	maxPacket = 64 << 10 // well below net.core.wmem_default
	partMeta  = 32 << 10
	partFiles = 253 // SCM_MAX_FD, include/net/scm.h

	// Bounds of a state. The samples and documents of 1,000 tasks with 10 containers each take
	// 60 MB and more. The files are mostly links, one for each port.
	maxMeta  = 256 << 20
	maxFiles = 16 << 10
)

// conn is a connection of packets. One goroutine sends, one receives.
type conn struct{ c *net.UnixConn }

func (k *conn) deadline(t time.Time) { _ = k.c.SetDeadline(t) } // fails only when closed

func (k *conn) close() error { return k.c.Close() }

// checkPeer returns an error if the peer is neither root nor uid.
func (k *conn) checkPeer(uid int) error {
	raw, err := k.c.SyscallConn()
	if err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	var cred *unix.Ucred
	var serr error
	if err := raw.Control(func(fd uintptr) {
		cred, serr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	if serr != nil {
		return fmt.Errorf("peer: %w", serr)
	}
	if cred.Uid != 0 && cred.Uid != uint32(uid) {
		return fmt.Errorf("peer (process %d) has uid %d: want root", cred.Pid, cred.Uid)
	}
	return nil
}

func (k *conn) send(m message, files ...*os.File) error {
	m.Files = len(files)
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			if fds[i], err = number(f); err != nil {
				return err
			}
		}
		oob = unix.UnixRights(fds...)
		defer runtime.KeepAlive(files)
	}
	_, _, err = k.c.WriteMsgUnix(b, oob, nil)
	return err
}

// number returns f's descriptor. f.Fd would make the file blocking, also for the process that
// shares it.
func number(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	var n int
	err = raw.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

// receive returns the next packet with its files. It returns io.EOF if the peer is gone.
func (k *conn) receive() (message, []*os.File, error) {
	b, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(partFiles*4))
	n, oobn, flags, _, err := k.c.ReadMsgUnix(b, oob)
	if errors.Is(err, unix.ECONNRESET) {
		// The peer closed without having read all that we sent; what it sent is still
		// there.
		n, oobn, flags, _, err = k.c.ReadMsgUnix(b, oob)
	}
	if err != nil {
		if errors.Is(err, unix.ECONNRESET) {
			err = io.EOF
		}
		return message{}, nil, err
	}
	m, fds, err := parsePacket(b[:n], oob[:oobn], flags)
	files := make([]*os.File, len(fds))
	for i, fd := range fds {
		files[i] = os.NewFile(uintptr(fd), "takeover")
	}
	if err != nil {
		closeAll(files)
		return message{}, nil, err
	}
	return m, files, nil
}

// parsePacket returns the descriptors also when it fails.
func parsePacket(b, oob []byte, flags int) (m message, fds []int, err error) {
	controls, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return m, nil, fmt.Errorf("control message: %w", err)
	}
	for _, c := range controls {
		if c.Header.Level != unix.SOL_SOCKET || c.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, err := unix.ParseUnixRights(&c)
		if err != nil {
			return m, fds, fmt.Errorf("control message: %w", err)
		}
		fds = append(fds, got...)
	}
	if len(b) == 0 {
		return m, fds, io.EOF
	}
	// Too many open files cut the control message short.
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return m, fds, errors.New("packet cut short: check the limit on open files")
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fds, fmt.Errorf("packet: %w", err)
	}
	if m.Files != len(fds) {
		return m, fds, fmt.Errorf("packet with %d files: got %d", m.Files, len(fds))
	}
	return m, fds, nil
}

// sendState sends s in as many packets as it takes; between calls each after the first.
func (k *conn) sendState(s State, between func()) error {
	meta, files := s.Meta, s.Files
	for first := true; ; first = false {
		if !first {
			between()
		}
		m := message{Type: typeState, Meta: meta[:min(len(meta), partMeta)]}
		part := files[:min(len(files), partFiles)]
		meta, files = meta[len(m.Meta):], files[len(part):]
		m.Last = len(meta) == 0 && len(files) == 0
		if err := k.send(m, part...); err != nil {
			return err
		}
		if m.Last {
			return nil
		}
	}
}

// receiveState returns what sendState sent. After an error no file stays open. Errors: ErrRefused,
// ErrAborted, io.EOF if the peer died.
func (k *conn) receiveState() (s State, err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for {
		m, files, err := k.receive()
		if err != nil {
			return s, err
		}
		s.Files = append(s.Files, files...)
		s.Meta = append(s.Meta, m.Meta...)
		switch {
		case m.Type == typeRefuse:
			return s, fmt.Errorf("%w: %s", ErrRefused, m.Reason)
		case m.Type == typeAbort:
			return s, fmt.Errorf("%w: %s", ErrAborted, m.Reason)
		case m.Type != typeState:
			return s, fmt.Errorf("want %s, got %s", typeState, m.Type)
		case len(s.Meta) > maxMeta || len(s.Files) > maxFiles:
			return s, fmt.Errorf("state of more than %d bytes or %d files", maxMeta,
				maxFiles)
		case m.Last:
			return s, nil
		}
	}
}

// untilEOF returns when the peer is gone, or the connection is closed here.
func (k *conn) untilEOF() {
	for {
		_, files, err := k.receive()
		closeAll(files)
		if err != nil {
			return
		}
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
