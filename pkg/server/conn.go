package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"metad/bpf"
	"metad/pkg/lookup"
)

// SocketMark returns the SO_MARK that the accepted connection inherited from its SYN: the tag that
// the kernel gave it where it entered the host. One system call.
func SocketMark(c net.Conn) (uint32, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("mark of a %T: not a socket", c)
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var mark int
	var errOpt error
	if err := rc.Control(func(fd uintptr) {
		mark, errOpt = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
	}); err != nil {
		return 0, err
	}
	return uint32(mark), errOpt
}

// source is whom a connection is charged to: the task, or the port as long as only that is known,
// or without any tag the address.
type source struct {
	tag  uint32
	addr netip.Addr
}

// peer is what one source uses of the server.
type peer struct {
	conns  int // guarded by conns.mu
	bucket bucket

	ahead   bucket       // requests that it sends before it has its answers
	delayed atomic.Int64 // of those, how many wait
}

// conn is an accepted connection that knows who is at its other end.
type conn struct {
	net.Conn
	tag        uint32
	remote     netip.AddrPort
	remoteText []byte // "address:port"
	peer       *peer
	src        source

	// Only the handler, which runs once at a time for a connection, touches these.
	arn      string // the client's task when it was last answered as that
	maker    string // Docker id of the container that made the socket, once it was known
	searched bool   // for the maker, by the socket itself
	passedOn bool   // the request in hand is the agent's; the last one of the connection
	question        // the one in hand

	// what was sent before the last answer may not be all read; by who reads, or the handler
	ahead bool
	sent  int64 // bytes since the last request; by who writes, or the handler

	all *conns

	mu     sync.Mutex // guards what follows
	closed bool
	undo   func()
}

// question is what a client asks for, and what that was found to be.
type question struct {
	target target
	view   *lookup.View
	// of view; nil if the request is not about one, or nothing tells which
	container *lookup.ContainerView
}

// Read notes whether there may be more than p has room for: a client that waits for its answers
// never has that much to say.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.ahead = n == len(p)
	c.all.received.Add(uint64(n))
	return n, err
}

// Write counts the bytes.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.sent += int64(n)
	c.all.sent.Add(uint64(n))
	return n, err
}

// Close closes the connection and whatever it was given with onClose. Safe to call more than once.
func (c *conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	undo := c.undo
	c.mu.Unlock()
	if undo != nil {
		undo()
	}
	err := c.Conn.Close()
	c.all.remove(c)
	return err
}

// CloseWrite tells the client that no more bytes come, if the socket can.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// onClose makes Close call f, at once if the connection is closed already.
func (c *conn) onClose(f func()) {
	c.mu.Lock()
	closed := c.closed
	c.undo = f
	c.mu.Unlock()
	if closed {
		f()
	}
}

// conns are the open connections. Safe for concurrent use.
type conns struct {
	max, maxPerPeer int
	rate            RateLimit

	refused        atomic.Uint64
	received, sent atomic.Uint64 // bytes

	mu   sync.Mutex // guards what follows
	open map[*conn]struct{}
	// unproved is how many of them have no tag. Their senders can make up addresses, so all of
	// them together have half of the connections at most.
	unproved int
	peers    map[source]*peer
	sweep    int           // number of peers at which those without use are next looked for
	empty    chan struct{} // closed when the last one leaves; nil unless somebody waits
}

func newConns(cfg *Config) *conns {
	return &conns{
		max: cfg.MaxConns, maxPerPeer: cfg.MaxConnsPerTask, rate: cfg.Rate,
		open: map[*conn]struct{}{}, peers: map[source]*peer{}, sweep: minSweep,
	}
}

// minSweep is the number of peers below which none is worth looking for.
const minSweep = 64

// Results of conns.add.
var (
	errFull       = errors.New("server: too many connections")
	errBusySource = errors.New("server: too many connections of one source")
)

// add charges c to its source, or returns one of the errors above. now is in nanoseconds, on the
// clock that the buckets go by.
func (cs *conns) add(c *conn, now int64) error {
	c.src = source{tag: c.tag}
	if c.tag&bpf.TagPort == 0 {
		c.src.tag = c.tag & bpf.TagTask // whichever container of it
	}
	if c.tag == bpf.TagNone {
		c.src.addr = c.remote.Addr()
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	p := cs.peers[c.src]
	switch {
	case p != nil && p.conns >= cs.maxPerPeer:
		cs.refused.Add(1)
		return errBusySource
	case len(cs.open) >= cs.max, c.tag == bpf.TagNone && cs.unproved >= max(1, cs.max/2):
		cs.refused.Add(1)
		return errFull
	}
	if p == nil {
		// A peer outlives its connections until its bucket is full again, or a new
		// connection for each request would be a way around the limit.
		if len(cs.peers) >= cs.sweep {
			for src, p := range cs.peers {
				if p.conns == 0 && p.bucket.full(now) && p.ahead.full(now) {
					delete(cs.peers, src)
				}
			}
			cs.sweep = max(minSweep, 2*len(cs.peers))
		}
		p = &peer{}
		cs.peers[c.src] = p
	}
	p.conns++
	if c.tag == bpf.TagNone {
		cs.unproved++
	}
	c.peer, c.all = p, cs
	cs.open[c] = struct{}{}
	return nil
}

func (cs *conns) remove(c *conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	delete(cs.open, c)
	if c.tag == bpf.TagNone {
		cs.unproved--
	}
	c.peer.conns--
	if c.peer.conns == 0 && cs.rate == (RateLimit{}) && c.peer.ahead.fullAt.Load() == 0 {
		delete(cs.peers, c.src)
	}
	cs.leave()
}

// drained returns a channel that is closed once no connection is open.
func (cs *conns) drained() <-chan struct{} {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.empty == nil {
		cs.empty = make(chan struct{})
	}
	ch := cs.empty
	cs.leave()
	return ch
}

// leave tells who waits for it that no connection is open, if that is so.
func (cs *conns) leave() {
	if len(cs.open) == 0 && cs.empty != nil {
		close(cs.empty)
		cs.empty = nil
	}
}

// closeAll closes every connection.
func (cs *conns) closeAll() {
	cs.mu.Lock()
	open := make([]*conn, 0, len(cs.open))
	for c := range cs.open {
		open = append(open, c)
	}
	cs.mu.Unlock()
	for _, c := range open {
		_ = c.Close() // whoever serves it sees the error
	}
}

// usage returns how many connections are open, and how many the source has that has most.
func (cs *conns) usage() (open, most int) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, p := range cs.peers {
		most = max(most, p.conns)
	}
	return len(cs.open), most
}

func (cs *conns) count() int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return len(cs.open)
}

// listener hands fasthttp connections that know their source.
type listener struct {
	net.Listener
	s   *Server
	err error // why Accept gave up; read after Serve returned
}

// Accept returns io.EOF when no more connections are to come. One that was accepted before it
// learned that the server is stopping is served: nobody else can.
func (l *listener) Accept() (net.Conn, error) {
	for {
		nc, err := l.Listener.Accept()
		switch {
		case err == nil:
			if c, err := l.admit(nc); err == nil {
				return c, nil
			}
		case l.s.stopping.Load():
			return nil, io.EOF
		case outOfResources(err):
			time.Sleep(acceptPause)
		default:
			l.err = err
			return nil, io.EOF
		}
	}
}

// acceptPause is how long to wait for descriptors or memory to come free.
const acceptPause = 10 * time.Millisecond

func outOfResources(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}

// admit gives nc its tag and charges it to its source, or closes it and returns an error.
func (l *listener) admit(nc net.Conn) (*conn, error) {
	tag, err := l.s.cfg.Tag(nc)
	if err != nil {
		_ = nc.Close()
		return nil, err
	}
	c := &conn{Conn: nc, tag: tag}
	if a, ok := nc.RemoteAddr().(interface{ AddrPort() netip.AddrPort }); ok {
		ap := a.AddrPort()
		c.remote = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	c.remoteText = c.remote.AppendTo(nil)
	if err := l.s.conns.add(c, l.s.clock(time.Now())); err != nil {
		if errors.Is(err, errBusySource) && c.tag != bpf.TagNone && l.s.cfg.Busy != nil {
			l.s.cfg.Busy(c.src.tag)
		}
		_ = nc.SetWriteDeadline(time.Now().Add(acceptPause))
		_, _ = nc.Write(errBusy.raw())
		_ = nc.Close()
		return nil, err
	}
	return c, nil
}
