package dockerproxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// archivePath matches the requests whose body or answer is an archive: docker cp, export, save and
// load. They are tunnelled, because moving the bytes is all the work there is, and net/http, which
// parses the pieces and writes them anew, takes twice as long for it.
var archivePath = regexp.MustCompile(
	`^(/v[0-9.]+)?/(containers/[^/]+/(archive|export)|images/(get|load|.+/get))$`)

// tunnelBuffer is about as much as a Unix socket holds.
const tunnelBuffer = 256 << 10

// tunnel passes r and its answer on byte by byte, on a connection to the Engine that serves nothing
// else. The client's connection ends with it, as the answer says.
func (p *Proxy) tunnel(w http.ResponseWriter, r *http.Request) {
	engine, err := p.engine.dial(r.Context())
	if err != nil {
		p.fail(w, r, err)
		return
	}
	defer engine.Close()
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		p.fail(w, r, err)
		return
	}
	defer client.Close()

	var head strings.Builder
	fmt.Fprintf(&head, "%s %s HTTP/1.1\r\nHost: %s\r\n", r.Method, r.RequestURI, r.Host)
	header := r.Header.Clone()
	header.Set("Connection", "close")
	_ = header.Write(&head) // to memory
	switch {
	case len(r.TransferEncoding) > 0:
		head.WriteString("Transfer-Encoding: chunked\r\n") // the one that net/http knows
	case r.ContentLength > 0 || r.Method != http.MethodGet:
		fmt.Fprintf(&head, "Content-Length: %d\r\n", r.ContentLength)
	}
	head.WriteString("\r\n")
	if _, err := io.WriteString(engine, head.String()); err != nil {
		return
	}

	sent := make(chan struct{})
	go func() {
		defer close(sent)
		// First the bytes that the server has read already, then the rest, until the client
		// leaves or the answer is complete. When the client leaves, the Engine must not
		// work on.
		_, err := io.CopyN(engine, buffered, int64(buffered.Reader.Buffered()))
		if err == nil {
			_ = pump(engine, client)
		}
		engine.Close()
	}()
	_ = pump(client, engine)
	client.Close()
	<-sent
}

// pump moves bytes until the end. Between two sockets of the kernel the bytes go through a pipe by
// splice(2) and never reach this process, which halves the time of a copy between two Unix sockets.
func pump(to, from net.Conn) error {
	in, err := rawConn(from)
	if err != nil {
		return pumpBytes(to, from)
	}
	out, err := rawConn(to)
	if err != nil {
		return pumpBytes(to, from)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pumpBytes(to, from)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	// A larger pipe means fewer turns. A user whose allowance is used up keeps the kernel's 64
	// KB.
	_, _ = unix.FcntlInt(uintptr(pipe[1]), unix.F_SETPIPE_SZ, tunnelBuffer)
	for {
		// The pipe is empty, so the call can only wait for the socket.
		n, err := splice(in.Read, func(socket int) (int64, error) {
			return unix.Splice(socket, nil, pipe[1], nil, tunnelBuffer,
				unix.SPLICE_F_NONBLOCK)
		})
		if n == 0 || err != nil {
			return err
		}
		few := n < tunnelBuffer/4
		for n > 0 {
			m, err := splice(out.Write, func(socket int) (int64, error) {
				return unix.Splice(pipe[0], nil, socket, nil, int(n),
					unix.SPLICE_F_NONBLOCK)
			})
			if err != nil {
				return err
			}
			n -= m
		}
		if few {
			gather()
		}
	}
}

func rawConn(c net.Conn) (syscall.RawConn, error) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return s.SyscallConn()
}

// splice calls move until the socket, on which wait waits, is ready for it.
func splice(wait func(func(uintptr) bool) error, move func(socket int) (int64, error)) (n int64,
	err error) {
	waitErr := wait(func(socket uintptr) bool {
		for {
			if n, err = move(int(socket)); !errors.Is(err, unix.EINTR) {
				return !errors.Is(err, unix.EAGAIN)
			}
		}
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return n, err
}

// gather gives the sender time to send more. Both ends of docker cp send each 32 KB in three
// writes, and moving each write by itself costs more than the bytes do.
func gather() {
	_ = unix.Nanosleep(&unix.Timespec{Nsec: 50_000}, nil)
}

// pumpBytes is pump for connections of any kind. The interfaces are narrowed because io.Copy would
// otherwise use methods of theirs that copy in smaller pieces.
func pumpBytes(to, from net.Conn) error {
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from},
		make([]byte, tunnelBuffer))
	return err
}
