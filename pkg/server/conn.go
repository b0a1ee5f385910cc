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
// the programs gave the SYN where it entered the host. It makes one system call.
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

// source is the account that a connection counts for: its task; its port while only that is known;
// its address if it has no tag.
type source struct {
	tag  uint32
	addr netip.Addr
}

// peer is what one source uses of the server.
type peer struct {
	conns  int // guarded by conns.mu
	bucket bucket

	ahead   bucket       // for requests that it sends before it has its answers
	delayed atomic.Int64 // number of those that wait
}

// conn is an accepted connection and its source.
type conn struct {
	net.Conn
	tag        uint32
	remote     netip.AddrPort
	remoteText []byte // "address:port"
	peer       *peer
	src        source

	// Only the handler, which runs once at a time for a connection, touches these.
	arn      string // the client's task at its last answer as a task
	maker    string // Docker id of the container that made the socket; "" if not known
	searched bool   // findMaker has looked for the maker
	passedOn bool   // the current request goes to the agent, and is the connection's last
	question        // the current one

	// The client may have sent more before the last answer than was read. The reader and the
	// handler use it.
	ahead bool
	sent  int64 // bytes since the last request; the writer and the handler use it

	all *conns

	mu     sync.Mutex // guards what follows
	closed bool
	undo   func()
}

// question is the target of a request, and the objects that it names.
type question struct {
	target target
	view   *lookup.View
	// of view; nil if the request is not about a container, or nothing says about which
	container *lookup.ContainerView
}

// Read stores whether it has filled p. A client that waits for its answers never sends that much.
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

// Close closes the connection and calls the function of onClose. Further calls do nothing.
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

// onClose makes Close call f. If the connection is already closed, onClose calls f at once.
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
	// unproved is the number of connections without a tag. Their senders can make up addresses,
	// so all of them together have half of the connections at most.
	unproved int
	peers    map[source]*peer
	sweep    int           // number of peers at which those without use are next looked for
	empty    chan struct{} // closed when the last one leaves; nil if drained was not called
}

func newConns(cfg *Config) *conns {
	return &conns{
		max: cfg.MaxConns, maxPerPeer: cfg.MaxConnsPerTask, rate: cfg.Rate,
		open: map[*conn]struct{}{}, peers: map[source]*peer{}, sweep: minSweep,
	}
}

// minSweep is the number of peers below which there is no search for unused ones.
const minSweep = 64

// Results of conns.add.
var (
	errFull       = errors.New("server: too many connections")
	errBusySource = errors.New("server: too many connections of one source")
)

// add counts c for its source, or returns one of the errors above. now is in nanoseconds, on the
// clock of the buckets.
func (cs *conns) add(c *conn, now int64) error {
	c.src = source{tag: c.tag}
	if c.tag&bpf.TagPort == 0 {
		c.src.tag = c.tag & bpf.TagTask // without the container
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
		// A peer outlives its connections until its bucket is full again. Otherwise a
		// client could avoid the limit by a new connection for each request.
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

// leave closes the channel of drained if no connection is open.
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
		_ = c.Close() // its handler sees the error
	}
}

// usage returns the number of open connections, and the largest number of one source.
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

// listener gives fasthttp connections with their sources.
type listener struct {
	net.Listener
	s   *Server
	err error // that ended Accept; read after Serve returned
}

// Accept returns io.EOF when no more connections will come. The server serves a connection that was
// accepted before Accept noticed the stop, because no other process can.
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

// acceptPause is how long Accept waits until descriptors or memory become free.
const acceptPause = 10 * time.Millisecond

func outOfResources(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}

// admit reads nc's tag and counts nc for its source, or closes it and returns an error.
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
