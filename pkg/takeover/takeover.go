// Package takeover passes a running metad's open files (namespace, maps, programs, links, listener)
// to the process that replaces it, so that no request fails during an upgrade.
//
// The metad that serves listens on a socket (SOCK_SEQPACKET) in the run directory. A successor
// connects to it; the one that serves is its predecessor from then on:
//
//	successor                        predecessor
//	hello {protocol, layout} ──────▶ checks uid and versions
//	                         ◀────── refuse {reason}            the predecessor goes on
//	                         ◀────── state {meta, files} …      the predecessor still serves
//	opens the files, serves too
//	serving                  ──────▶
//	                         ◀────── accepted                   the predecessor drains, ends
//	                         ◀────── abort {reason}             the successor ends
//
// Only the predecessor decides. If the successor dies, the predecessor goes on serving, also when
// it is draining already. If the predecessor dies without an abort, the successor goes on serving.
package takeover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// protocol is the version of the messages.
const protocol = 1

const (
	socketName = "takeover.sock"
	lockName   = "takeover.lock"

	// helloWithin bounds how long a client that connects and says nothing keeps others waiting.
	helloWithin   = 2 * time.Second
	defaultWithin = 10 * time.Second
	// defaultPatience has room for two other successors that come first and hang.
	defaultPatience = 3 * defaultWithin
)

// Errors that a caller may want to tell apart.
var (
	// ErrNobody: no metad serves, or it died before it sent its state.
	ErrNobody = errors.New("nobody to take over from")
	// ErrInUse: another metad serves already.
	ErrInUse = errors.New("in use by another process")
	// ErrRefused: the predecessor refuses a takeover by this process, and goes on. The text
	// says why.
	ErrRefused = errors.New("refused by the running metad")
	// ErrHung: a process has the socket and says nothing, as one that is stopped. It is left
	// alone: it still has all that is in the kernel.
	ErrHung = errors.New("the running metad does not answer")
	// ErrAborted: the predecessor ended the takeover, and goes on. The successor stops serving
	// and leaves the kernel's state alone.
	ErrAborted = errors.New("taken back by the running metad")
)

// Config is the same for both sides.
type Config struct {
	Dir    string        // where the socket is; made if missing
	Layout uint32        // version of what State means; a predecessor with another one refuses
	Build  string        // of this process, for messages
	Within time.Duration // how long a successor may take from hello to serving; zero: 10s
	// Patience is how long Take waits for a predecessor's state, and Serving for its answer;
	// zero: 30s. Others that start at the same time may be served first.
	Patience time.Duration
	Log      *zap.Logger // nil: none

	uid int               // may take part beside root; a test's own
	at  func(step string) // called at every step; a test dies there
}

func (c Config) withDefaults() Config {
	if c.Within == 0 {
		c.Within = defaultWithin
	}
	if c.Patience == 0 {
		c.Patience = defaultPatience
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.at == nil {
		c.at = func(string) {}
	}
	return c
}

func (c *Config) path() string { return filepath.Join(c.Dir, socketName) }

// State is what the successor gets. Its meaning is the caller's, and so is its version,
// Config.Layout.
type State struct {
	Meta []byte
	// Wait closes the files that it sends. The files that Take returns are the caller's to
	// close.
	Files []*os.File
}

func (s *State) close() {
	closeAll(s.Files)
	s.Files = nil
}

// Start takes over from the metad that serves with cfg.Dir. If there is none, it returns no
// Predecessor, and the caller is the one that serves. Of several that start at once one is the
// first, and each other one takes over from one before it. Start waits until ctx ends, but for a
// predecessor that does not answer only for Config.Patience.
//
// Errors: ErrRefused, and the predecessor goes on; ErrHung.
func Start(ctx context.Context, cfg Config) (*Socket, *Predecessor, error) {
	for {
		p, err := Take(ctx, cfg)
		if err == nil {
			return p.Socket, p, nil
		}
		if !errors.Is(err, ErrNobody) {
			return nil, nil, err
		}
		s, err := Listen(cfg)
		if err == nil {
			return s, nil, nil
		}
		if !errors.Is(err, ErrInUse) {
			return nil, nil, err
		}
	}
}

// Socket is where successors connect: its owner is the metad that serves. Its methods are not for
// concurrent use.
type Socket struct {
	cfg Config
	ln  *net.UnixListener
	// another process has it too, and the name in the file system is that one's
	shared atomic.Bool
	// pred is the connection to the predecessor, if there was one. It is open until Close, so
	// that no connection gets its low number.
	pred *conn
}

// Listen makes the caller the metad that serves. It replaces what a killed metad left. Errors:
// ErrInUse.
func Listen(cfg Config) (*Socket, error) {
	cfg = cfg.withDefaults()
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("takeover socket: %w", err)
	}
	// No other process may replace the dead socket between our look at it and our replacing it.
	lock, err := os.OpenFile(filepath.Join(cfg.Dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("takeover lock: %w", err)
	}
	defer lock.Close()
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("takeover lock: %w", err)
	}
	addr := &net.UnixAddr{Name: cfg.path(), Net: "unixpacket"}
	if c, err := net.DialUnix(addr.Net, nil, addr); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", cfg.path(), ErrInUse)
	}
	if err := os.Remove(cfg.path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("takeover socket: %w", err)
	}
	ln, err := net.ListenUnix(addr.Net, addr)
	if err != nil {
		return nil, fmt.Errorf("takeover socket: %w", err)
	}
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(cfg.path(), 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("takeover socket: %w", err), ln.Close())
	}
	return &Socket{cfg: cfg, ln: ln}, nil
}

// Close ends the listening. The name in the file system stays if a successor has the socket.
func (s *Socket) Close() error {
	var err error
	if !s.shared.Load() {
		if err = os.Remove(s.cfg.path()); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	err = errors.Join(err, s.ln.Close())
	if s.pred != nil {
		err = errors.Join(err, s.pred.close())
	}
	return err
}

// Wait deals with one successor after the other until one has taken over, and returns that one. It
// calls offer for the state when a successor has connected; the caller goes on serving meanwhile.
// If offer or the takeover fails after that, Wait calls resume, logs why, and goes on.
//
// With a Successor returned the caller stops accepting connections, waits until those it has are
// done, and exits. It takes nothing out of the kernel: the Successor has it. If the Successor dies
// before the caller has left, the caller accepts connections again and calls Wait again.
//
// Returns ctx's error when it ends; a takeover that is under way is aborted then.
func (s *Socket) Wait(ctx context.Context, offer func() (State, error), resume func()) (*Successor,
	error) {
	s.shared.Store(false)
	if err := s.ln.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("takeover socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { s.ln.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		c, err := s.ln.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, fmt.Errorf("takeover socket: %w", err)
		}
		k := &conn{c: c}
		successor, err := s.serve(ctx, k, offer, resume)
		if err == nil {
			s.shared.Store(true)
			return successor, nil
		}
		k.close()
		if !errors.Is(err, errNothingSaid) {
			s.cfg.Log.Warn("takeover failed: still serving", zap.Error(err))
		}
	}
}

// errNothingSaid: Listen connects and says nothing, to see whether a metad serves.
var errNothingSaid = errors.New("connected and said nothing")

// serve deals with one connection. It returns the Successor once that one has taken over.
func (s *Socket) serve(ctx context.Context, k *conn, offer func() (State, error),
	resume func()) (*Successor, error) {
	refuse := func(reason string) error {
		_ = k.send(message{Type: typeRefuse, Reason: reason}) // it may be gone
		return errors.New(reason)
	}
	if err := k.checkPeer(s.cfg.uid); err != nil {
		return nil, refuse(err.Error())
	}
	k.deadline(time.Now().Add(helloWithin))
	hello, _, err := k.receive()
	switch {
	case errors.Is(err, io.EOF):
		return nil, errNothingSaid
	case err != nil:
		return nil, fmt.Errorf("successor's hello: %w", err)
	case hello.Type != typeHello:
		return nil, refuse(fmt.Sprintf("want %s, got %s", typeHello, hello.Type))
	case hello.Protocol != protocol || hello.Layout != s.cfg.Layout:
		return nil, refuse(
			fmt.Sprintf(
				"the running metad %s has protocol %d and layout %d, metad %s has "+
					"%d and %d: stop the one, then start the other",
				s.cfg.Build, protocol, s.cfg.Layout, hello.Build, hello.Protocol,
				hello.Layout))
	}
	s.cfg.at("hello")
	k.deadline(time.Now().Add(s.cfg.Within))
	stop := context.AfterFunc(ctx, func() { k.deadline(time.Unix(1, 0)) })
	defer stop()
	state, err := offer()
	if err != nil {
		resume()
		return nil, refuse("no takeover now: " + err.Error())
	}
	if err := s.send(k, state); err != nil {
		k.deadline(time.Now().Add(helloWithin))
		// a dead one need not be told
		_ = k.send(message{Type: typeAbort, Reason: err.Error()})
		resume()
		return nil, err
	}
	s.cfg.at("accepted")
	successor := &Successor{k: k, died: make(chan struct{})}
	k.deadline(time.Time{})
	go func() {
		defer close(successor.died)
		k.untilEOF()
	}()
	return successor, nil
}

// send sends the state and returns once the successor serves and has been told that it may.
func (s *Socket) send(k *conn, state State) error {
	socket, err := s.ln.File()
	if err != nil {
		state.close()
		return fmt.Errorf("send the takeover socket: %w", err)
	}
	state.Files = append([]*os.File{socket}, state.Files...)
	err = k.sendState(state, func() { s.cfg.at("part") })
	state.close()
	if err != nil {
		return fmt.Errorf("send the state: %w", err)
	}
	s.cfg.at("given")
	m, _, err := k.receive()
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("the successor died before it served")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the successor did not serve in time")
	case err != nil:
		return fmt.Errorf("successor: %w", err)
	case m.Type != typeServing:
		return fmt.Errorf("successor: want %s, got %s", typeServing, m.Type)
	}
	s.cfg.at("serving")
	if err := k.send(message{Type: typeAccepted}); err != nil {
		return fmt.Errorf("the successor died: %w", err)
	}
	return nil
}

// Successor is the process that has taken over.
type Successor struct {
	k    *conn
	died chan struct{}
}

// Died is closed when the successor is gone although the caller is not.
func (s *Successor) Died() <-chan struct{} { return s.died }

// Close tells the successor that the caller leaves; exiting does too.
func (s *Successor) Close() error {
	err := s.k.close()
	<-s.died
	return err
}

// Predecessor is the process that is being taken over from.
type Predecessor struct {
	State
	Socket *Socket // the predecessor's, and this process's after Serving

	cfg  Config
	k    *conn // nil: it was gone from the beginning, see Inherit
	left chan struct{}
}

// Take asks the metad that serves for its state. That one goes on serving, and does so for good if
// the caller dies, closes the Predecessor, or does not call Serving in time. Should it wake up
// after ErrHung, it finds that the caller is gone, and goes on too.
//
// Errors: ErrNobody, ErrRefused, ErrHung.
func Take(ctx context.Context, cfg Config) (*Predecessor, error) {
	cfg = cfg.withDefaults()
	patient, cancel := context.WithTimeoutCause(ctx, cfg.Patience, ErrHung)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(patient, "unixpacket", cfg.path())
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, ErrNobody
	}
	if err != nil {
		return nil, fmt.Errorf("take over: %w", err)
	}
	k := &conn{c: c.(*net.UnixConn)}
	stop := context.AfterFunc(patient, func() { k.deadline(time.Unix(1, 0)) })
	defer stop()
	p, err := take(k, cfg)
	if err != nil {
		if cause := context.Cause(patient); cause != nil {
			err = fmt.Errorf("take over by %s: %w", cfg.path(), cause)
		}
		k.close()
		return nil, err
	}
	return p, nil
}

func take(k *conn, cfg Config) (*Predecessor, error) {
	if err := k.checkPeer(cfg.uid); err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.path(), err)
	}
	cfg.at("connected")
	err := k.send(message{Type: typeHello, Protocol: protocol, Layout: cfg.Layout,
		Build: cfg.Build})
	// A predecessor that has closed the connection (EPIPE), or never accepted it (ECONNRESET),
	// may have said why: that can still be read.
	if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		return nil, fmt.Errorf("take over: %w", err)
	}
	state, err := k.receiveState()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: the running metad died", ErrNobody)
		}
		return nil, fmt.Errorf("take over: %w", err)
	}
	if len(state.Files) == 0 {
		return nil, errors.New("take over: got no socket")
	}
	ln, err := net.FileListener(state.Files[0])
	state.Files[0].Close()
	state.Files = state.Files[1:]
	if err != nil {
		state.close()
		return nil, fmt.Errorf("take over: socket: %w", err)
	}
	ul, ok := ln.(*net.UnixListener)
	if !ok {
		state.close()
		return nil, errors.Join(fmt.Errorf("take over: socket is a %T", ln), ln.Close())
	}
	ul.SetUnlinkOnClose(false)
	cfg.at("taken")
	s := &Socket{cfg: cfg, ln: ul}
	s.shared.Store(true) // the name is the predecessor's until Serving
	return &Predecessor{State: state, Socket: s, cfg: cfg, k: k, left: make(chan struct{})}, nil
}

// Serving tells the predecessor that this process serves, and waits until it agrees. From then on
// the predecessor accepts no connection. If the predecessor has died meanwhile, everything is the
// caller's. After an error, ErrAborted, ErrHung or ctx's, the caller stops serving, closes the
// Predecessor, and leaves the kernel's state alone. A predecessor that wakes up after ErrHung finds
// the connection closed, and goes on.
func (p *Predecessor) Serving(ctx context.Context) error {
	if p.k == nil {
		return nil
	}
	patient, cancel := context.WithTimeoutCause(ctx, p.cfg.Patience, ErrHung)
	defer cancel()
	stop := context.AfterFunc(patient, func() { p.k.deadline(time.Unix(1, 0)) })
	defer stop()
	// A write that fails means that the predecessor is gone; what it said last can still be
	// read.
	_ = p.k.send(message{Type: typeServing})
	p.cfg.at("serving")
	m, _, err := p.k.receive()
	switch {
	case errors.Is(err, io.EOF):
	case err != nil:
		return fmt.Errorf("predecessor: %w", errors.Join(err, context.Cause(patient)))
	case m.Type == typeAbort:
		return fmt.Errorf("%w: %s", ErrAborted, m.Reason)
	case m.Type != typeAccepted:
		return fmt.Errorf("predecessor: want %s, got %s", typeAccepted, m.Type)
	}
	p.cfg.at("accepted")
	p.Socket.shared.Store(false)
	p.Socket.pred = p.k
	go func() {
		defer close(p.left)
		p.k.untilEOF()
	}()
	return nil
}

// Left is closed when the predecessor has done all it had to do, or is dead. Only after Serving.
func (p *Predecessor) Left() <-chan struct{} { return p.left }

// Close gives up before Serving was called, or after it failed: the predecessor goes on. It closes
// the socket and the connection, not the State's files.
func (p *Predecessor) Close() error {
	if p.k == nil || p.Socket.pred != nil {
		return p.Socket.Close()
	}
	return errors.Join(p.Socket.Close(), p.k.close())
}
