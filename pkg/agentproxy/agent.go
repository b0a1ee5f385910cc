// Package agentproxy passes one request on to the ECS agent and the agent's answer back. It decides
// nothing: its user says which requests go to the agent, how many at a time, and what a client is
// told when an exchange fails.
//
// Every request has a connection to the agent of its own and is the last one of the client's
// connection. Both directions can therefore be copied as they come, including bytes that nothing
// here understands, and nothing that a client writes can become part of another request. Only what
// RFC 9110 calls hop-by-hop stays here.
package agentproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"time"
)

// Errors of an exchange. What the client did wrong while it sent its body is a *BodyError.
var (
	// ErrAmbiguous is a request that two servers could read differently, or a tunnel.
	ErrAmbiguous = errors.New("agentproxy: request can be read in more than one way")
	// ErrBodyTooLong is a request with a body of more than Agent.MaxBodyBytes.
	ErrBodyTooLong = errors.New("agentproxy: request body too long")
	// ErrAbsent means that nothing listens at the agent's address.
	ErrAbsent = errors.New("agentproxy: the agent does not listen")
	// ErrSlow means that the agent did not answer in time.
	ErrSlow = errors.New("agentproxy: the agent did not answer in time")
	// ErrFailed means that the agent closed the connection or sent no valid answer.
	ErrFailed = errors.New("agentproxy: the agent sent no valid answer")
)

// BodyError is a client's body that could not be read to its end.
type BodyError struct{ Err error }

func (e *BodyError) Error() string { return "agentproxy: read the request body: " + e.Err.Error() }

// Unwrap returns what the reader of the body returned.
func (e *BodyError) Unwrap() error { return e.Err }

// Agent is where the ECS agent's task endpoint is, and how an exchange with it is bounded. It keeps
// no connection; its methods are safe for concurrent use.
type Agent struct {
	Addr         string        // host:port
	Timeout      time.Duration // of an exchange, from the connection to the last byte
	MaxBodyBytes int64         // of a request
	// Dial connects to address. from, if it is valid, is the local address that stands for the
	// client.
	Dial func(ctx context.Context, address string, from netip.Addr) (net.Conn, error)
}

// connect returns a connection to the agent that ends at the deadline.
func (a *Agent) connect(ctx context.Context, from netip.Addr, deadline time.Time) (net.Conn,
	error) {
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	up, err := a.Dial(ctx, a.Addr, from)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrAbsent
	}
	if err != nil {
		return nil, agentError(err)
	}
	_ = up.SetDeadline(deadline) // fails only on a closed connection, which shows soon enough
	return up, nil
}

// agentError returns ErrSlow if a deadline passed, else ErrFailed.
func agentError(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return ErrSlow
	}
	return ErrFailed
}

// maxDocument bounds a document that Get reads.
const maxDocument = 1 << 20

// Get asks the agent for target, which must be a clean path, and returns the status and the body of
// its answer. It gives up after the timeout. A body of more than 1 MiB is ErrFailed.
func (a *Agent) Get(ctx context.Context, target string, timeout time.Duration) (int, []byte,
	error) {
	up, err := a.connect(ctx, netip.Addr{}, time.Now().Add(timeout))
	if err != nil {
		return 0, nil, err
	}
	defer up.Close()
	if _, err := fmt.Fprintf(up, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n",
		target, a.Addr); err != nil {
		return 0, nil, agentError(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(up), nil)
	if err != nil {
		return 0, nil, agentError(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err != nil {
		return 0, nil, agentError(err)
	}
	if len(body) > maxDocument {
		return 0, nil, ErrFailed
	}
	return resp.StatusCode, body, nil
}
