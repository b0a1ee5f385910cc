package agentproxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http/httputil"
	"net/netip"
	"time"

	"github.com/valyala/fasthttp"
)

// Exchange is one request on its way to the agent, and the answer on its way back. The connections'
// deadlines bound it.
type Exchange struct {
	// Failed returns the whole answer that the client gets for an error of this package. It
	// must be set before Run.
	Failed func(error) []byte
	// Guard, if set, is deferred in the exchange's goroutines: it may recover a panic.
	Guard func()

	client   net.Conn
	agent    net.Conn
	deadline time.Time

	head     []byte
	body     io.Reader // nil: none
	length   int64     // of the body, -1: chunked
	limit    int64     // of the body
	bodiless bool      // the answer has no body whatever its header says

	faults   chan error    // gets what the client did wrong in its body
	uploaded chan struct{} // closed when nothing reads body any more
}

// Prepare makes an exchange of a request whose body has not been read. It keeps body, which may be
// nil, but nothing else of the request. It returns ErrAmbiguous or ErrBodyTooLong.
func (a *Agent) Prepare(req *fasthttp.RequestHeader, body io.Reader) (*Exchange, error) {
	head, ok := requestHead(nil, req)
	if !ok {
		return nil, ErrAmbiguous
	}
	length := int64(req.ContentLength())
	if length > a.MaxBodyBytes {
		return nil, ErrBodyTooLong
	}
	return &Exchange{
		head: head, body: body, length: length, limit: a.MaxBodyBytes,
		bodiless: req.IsHead(),
		faults:   make(chan error, 1), uploaded: make(chan struct{}),
	}, nil
}

// Connect connects x to the agent, from an address that stands for the client, for as long as the
// agent's timeout. It returns ErrAbsent, ErrSlow or ErrFailed, and then x needs no Close.
func (a *Agent) Connect(ctx context.Context, from netip.Addr, x *Exchange) (err error) {
	x.deadline = time.Now().Add(a.Timeout)
	x.agent, err = a.connect(ctx, from, x.deadline)
	return err
}

// Close ends the exchange. Safe to call while Run runs, and more than once.
func (x *Exchange) Close() error { return x.agent.Close() }

// lingering is how long a client may go on sending a body that nothing reads before its connection
// is closed. Closed at once, the reset could destroy the answer on its way.
const lingering = 500 * time.Millisecond

// Run passes everything between client and agent. It leaves closing the client's connection to its
// caller. It returns why the client was sent Failed's answer, nil if it was sent the agent's.
func (x *Exchange) Run(client net.Conn) (failed error) {
	x.client = client
	// after the agent's: there may be a 504 to write
	_ = client.SetDeadline(x.deadline.Add(lingering))
	go x.upload()
	begun, err := x.download()
	_ = x.agent.Close()
	if err != nil && !begun {
		err = agentError(err)
		select {
		case err = <-x.faults: // why the agent did not answer
		default:
		}
		_, _ = client.Write(x.Failed(err))
		failed = err
	}
	select {
	case <-x.uploaded:
		return failed
	default:
	}
	if w, ok := client.(interface{ CloseWrite() error }); ok {
		_ = w.CloseWrite()
	}
	_ = client.SetReadDeadline(time.Now().Add(lingering))
	<-x.uploaded
	return failed
}

// upload sends the request. When the agent stops listening, upload goes on reading, so that the
// client gets to the point of looking for the answer.
func (x *Exchange) upload() {
	defer close(x.uploaded)
	if x.Guard != nil {
		defer x.Guard()
	}
	_, err := x.agent.Write(x.head)
	if x.body == nil {
		return
	}
	var to io.Writer = x.agent
	if x.length == -1 {
		to = httputil.NewChunkedWriter(x.agent)
	}
	buf := make([]byte, 16<<10)
	var total int64
	for {
		n, errRead := x.body.Read(buf)
		total += int64(n)
		if total > x.limit {
			x.fault(ErrBodyTooLong)
			return
		}
		if err == nil && n > 0 {
			_, err = to.Write(buf[:n])
		}
		if errRead == nil {
			continue
		}
		if !errors.Is(errRead, io.EOF) || x.length >= 0 && total != x.length {
			x.fault(&BodyError{errRead})
			return
		}
		if err == nil && x.length == -1 {
			// the client's trailers, if any, end here
			_, _ = io.WriteString(x.agent, "0\r\n\r\n")
		}
		return
	}
}

// fault ends the exchange because of something that the client did.
func (x *Exchange) fault(err error) {
	x.faults <- err
	_ = x.agent.Close()
}

// maxHeld is how many bytes of an answer's body are waited for before any of it is sent. An answer
// of no more than that which breaks off becomes a 502, not half an answer.
const maxHeld = 64 << 10

// download sends the answer and reports whether any of it has been sent.
func (x *Exchange) download() (begun bool, err error) {
	r := bufio.NewReaderSize(x.agent, 16<<10)
	answer, length, err := answerHead(r, x.bodiless)
	if err != nil {
		return false, err
	}
	body, whole, err := hold(r, length)
	if err != nil {
		return false, err
	}
	if _, err := x.client.Write(append(answer, body...)); err != nil || whole {
		return true, err
	}
	if length >= 0 {
		_, err = io.CopyN(x.client, r, length-int64(len(body)))
	} else {
		// chunked as it came, or up to the end of the connection
		_, err = io.Copy(x.client, r)
	}
	return true, err
}

// hold reads the first maxHeld bytes of a body, as they come, or the whole of it if it is no
// longer.
func hold(r *bufio.Reader, length int64) (body []byte, whole bool, err error) {
	if length >= 0 {
		body = make([]byte, min(length, maxHeld))
		_, err = io.ReadFull(r, body)
		return body, length <= maxHeld, err
	}
	var raw bytes.Buffer
	from := io.TeeReader(io.LimitReader(r, maxHeld), &raw)
	if length == toEnd {
		_, err = io.Copy(io.Discard, from)
		return raw.Bytes(), err == nil && raw.Len() < maxHeld, err
	}
	chunks := bufio.NewReader(from)
	_, err = io.Copy(io.Discard, httputil.NewChunkedReader(chunks))
	for err == nil { // trailers, up to an empty line
		var line []byte
		if line, err = chunks.ReadSlice('\n'); len(bytes.TrimRight(line, "\r\n")) == 0 {
			break
		}
	}
	if err != nil && raw.Len() == maxHeld {
		return raw.Bytes(), false, nil
	}
	return raw.Bytes()[:raw.Len()-chunks.Buffered()], true, err
}
