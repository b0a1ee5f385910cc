package agentproxy

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
)

// FuzzAnswerHead: whatever an agent answers, the client gets one header that ends where it should,
// and a body that does.
func FuzzAnswerHead(f *testing.F) {
	for _, s := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 204\r\nX:\r\n\r\n", "HTTP/1.1 200 OK\nConnection: x\nA: b\r\r\n\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", "HTTP/1.1 101 Switching\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nok\r\n0\r\nA: b\r\n\r\nmore", "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"} {
		f.Add([]byte(s), false)
	}
	f.Fuzz(func(t *testing.T, raw []byte, bodiless bool) {
		r := bufio.NewReader(bytes.NewReader(raw))
		head, length, err := answerHead(r, bodiless)
		if err != nil {
			return
		}
		if bodiless && length != 0 {
			t.Errorf("length %d of no body", length)
		}
		if !bytes.HasSuffix(head, []byte("\r\nConnection: close\r\n\r\n")) ||
			bytes.Count(head, []byte("\r\n\r\n")) != 1 ||
			bytes.Count(head, []byte("\n")) != bytes.Count(head, []byte("\r\n")) ||
			bytes.Count(head, []byte("\r")) != bytes.Count(head, []byte("\n")) {
			t.Errorf("got %q", head)
		}
		if n := bytes.Count(bytes.ToLower(head), []byte("\r\nconnection:")); n != 1 {
			t.Errorf("%d Connection lines in %q", n, head)
		}
		body, whole, err := hold(r, length)
		if err != nil {
			return
		}
		if !bytes.Contains(raw, body) || whole && length >= 0 &&
			int64(len(body)) != length {
			t.Errorf("length %d: got %q of %q", length, body, raw)
		}
		if whole && length == inChunks {
			resp, err := http.ReadResponse(
				bufio.NewReader(
					strings.NewReader(
						"HTTP/1.1 200 OK\r\nTransfer-Encoding: "+
							"chunked\r\n\r\n"+string(body))), nil)
			if err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
			}
			if err != nil && !strings.Contains(err.Error(), "trailer") &&
				!strings.Contains(err.Error(), "malformed MIME") {
				t.Errorf("%v in %q", err, body)
			}
		}
	})
}
