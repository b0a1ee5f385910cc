package agentproxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"

	"github.com/valyala/fasthttp"
)

// maxAnswerHead bounds the status line and header of an answer of the agent.
const maxAnswerHead = 64 << 10

var errAnswer = errors.New("malformed answer")

// Lengths of a body whose header names none.
const (
	toEnd    = -1 // up to the end of the connection
	inChunks = -2
)

// answerHead reads an answer of the agent up to its body and returns it as the client is to get it,
// with the number of bytes that follow, toEnd or inChunks.
func answerHead(r *bufio.Reader, bodiless bool) (head []byte, length int64, err error) {
	for {
		raw, err := readHead(r)
		if err != nil {
			return nil, 0, err
		}
		line, rest, _ := bytes.Cut(raw, []byte("\r\n"))
		// HTTP/1.1 200 OK
		if len(line) < len("HTTP/1.1 200") || !bytes.HasPrefix(line, []byte("HTTP/1.")) ||
			line[8] != ' ' || bytes.ContainsAny(line, "\r\x00") {
			return nil, 0, errAnswer
		}
		status := string(line[9:12])
		switch {
		case status == "101":
			return nil, 0, errAnswer // no client's upgrade is passed on
		case status[0] == '1':
			continue // fasthttp has said 100 Continue already
		case status == "204" || status == "304":
			bodiless = true
		}
		head = append(append(head, line...), "\r\n"...)
		lines, length, ok := answerLines(rest)
		if !ok {
			return nil, 0, errAnswer
		}
		if bodiless {
			length = 0
		}
		return append(append(head, lines...), "Connection: close\r\n\r\n"...), length, nil
	}
}

// answerLines returns the header lines that the client is to get and the length that they give the
// body. It returns false if the body's end cannot be told for sure.
func answerLines(raw []byte) (lines []byte, length int64, ok bool) {
	length = toEnd
	framings := 0
	ok = eachLine(raw, func(line, name, value []byte) {
		switch {
		case isName(name, "Connection"), isName(name, "Keep-Alive"),
			isName(name, "Proxy-Connection"):
			return
		case isName(name, "Transfer-Encoding"):
			framings++
			length = inChunks
			if !isName(value, "chunked") {
				framings++
			}
		case isName(name, "Content-Length"):
			framings++
			if n, err := fasthttp.ParseUint(value); err == nil {
				length = int64(n)
			} else {
				framings++
			}
		}
		lines = append(lines, line...)
	})
	return lines, length, ok && framings <= 1
}

// readHead reads up to and including the first empty line, and ends every line with "\r\n".
func readHead(r *bufio.Reader) ([]byte, error) {
	var head []byte
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return nil, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if head = append(append(head, line...), "\r\n"...); len(head) > maxAnswerHead {
			return nil, fmt.Errorf("%w: header over %d bytes", errAnswer, maxAnswerHead)
		}
		if len(line) == 0 && len(head) > 2 {
			return head, nil
		}
	}
}
