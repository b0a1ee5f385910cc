package dockerproxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
)

// archivePath matches the requests whose body or answer is an archive: docker cp, export, save and
// load. They are tunnelled: the time of a copy is that of moving its bytes, and net/http, which takes
// the pieces apart and puts them together again, takes twice as long for it.
var archivePath = regexp.MustCompile(`^(/v[0-9.]+)?/(containers/[^/]+/(archive|export)|images/(get|load|.+/get))$`)

// tunnelBuffer is as much as a unix socket holds, about.
const tunnelBuffer = 256 << 10

// tunnel hands r and its answer on byte by byte, on a connection to the Engine that serves nothing
// else. The client's ends with it, as the answer says.
func (p *Proxy) tunnel(w http.ResponseWriter, r *http.Request) {
	engine, err := p.engine.DialContext(r.Context(), "", "")
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
		// What the server has read already, then the rest, until the client leaves or the answer is
		// there. A client that leaves must not let the Engine work on.
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

// pump copies until the end. The interfaces are narrowed because what io.Copy would use instead
// copies in smaller pieces.
func pump(to, from net.Conn) error {
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, tunnelBuffer))
	return err
}
