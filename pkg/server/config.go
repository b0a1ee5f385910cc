package server

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// MaxUnknownWait is the longest wait of a request from an unknown source: the shortest time-out
// seen in a real client is 500 ms.
const MaxUnknownWait = 400 * time.Millisecond

// Config configures a server. Start from DefaultConfig; a zero is invalid unless the field gives it
// a meaning.
type Config struct {
	// ReadTimeout bounds a request from its first byte to the end of its header and of the
	// body that metad itself reads; also the time to the first byte of a new connection.
	ReadTimeout time.Duration
	// WriteTimeout bounds the writing of one answer, and of one line of a stream.
	WriteTimeout time.Duration
	// IdleTimeout bounds the time between two requests of a connection.
	IdleTimeout time.Duration

	// MaxHeaderBytes bounds a request's first line and header together. Each open connection
	// has a buffer of that size.
	MaxHeaderBytes int
	// MaxBodyBytes bounds the body of a request that is passed on.
	MaxBodyBytes int64

	// MaxConns bounds all open connections, MaxConnsPerTask those of one task (of one port or
	// address, while the task is unknown). A connection over a bound is answered 503 and
	// closed.
	MaxConns, MaxConnsPerTask int

	// Rate limits each task's requests that metad answers itself. Zero: no limit.
	Rate RateLimit

	// UnknownWait is how long a request from an unknown source waits for its task to appear,
	// at most MaxUnknownWait. Tasks bounds how many requests wait at a time. Zero: none waits.
	UnknownWait time.Duration

	// MakerWait is how long a request waits until its task has the container that sent it, as
	// started. It may be longer than UnknownWait: the Engine may not answer an inspect of a
	// container while it starts it, on a busy host for a second, and without the wait the
	// answer would be wrong. Zero: no request waits.
	MakerWait time.Duration

	// HostAddr is the source address of the host's own processes. No task ever has it, so
	// requests from it do not wait for a task. Zero: there is none.
	HostAddr netip.Addr

	// AgentURL is the ECS agent's task endpoint, "http://host:port". The server passes on
	// requests to it that it does not serve itself. Empty: there is no agent.
	AgentURL string
	// AgentTrusted reports whether the listener there is the agent's. It is called for each
	// connection. Nil: it is the agent's.
	AgentTrusted func() bool
	// AgentTimeout bounds such an exchange from the connection to the last byte.
	AgentTimeout time.Duration
	// AgentPatience bounds the wait for a metadata document of the agent's. After that, the
	// server sends metad's own, and requests do not wait while the agent does not answer.
	AgentPatience time.Duration
	// MaxForwards bounds exchanges with the agent at a time. Each task has a share of them. A
	// request over the bound is answered 503.
	MaxForwards int

	// OwnIDsOnly makes an endpoint id valid only for requests of its own task. Without it, as
	// at the agent, the id is valid for every client that has it.
	OwnIDsOnly bool

	// NoStats says that there is no sampler. A task's statistics then show each container as
	// one without a sample, and there are no statistics of a single container.
	NoStats bool
	// Samples, if set, serves statistics with ?stream=true; without it the query is ignored.
	Samples Samples
	// MaxStreams bounds the streams open at a time. Each task has a share of them. A request
	// over the bound is answered 503.
	MaxStreams int

	// Tag returns the kernel's tag of an accepted connection. It is called once for each.
	Tag func(net.Conn) (uint32, error)

	// Busy, if set, is called with the tag of a task or port that has MaxConnsPerTask
	// connections and opens one more, so that its next SYNs can be dropped for a moment:
	// refusing a connection costs as much as answering a request. It must not block.
	Busy func(tag uint32)

	// SocketCgroup returns the id of the cgroup in which a connection's socket was made. from
	// and to are the connection's addresses in the network namespace of process pid. It is
	// called at most once for a connection, if a client requests itself and nothing else says
	// which container it is. Nil: no cgroup is known.
	SocketCgroup func(pid int, from, to netip.AddrPort) (uint64, error)
	// CgroupContainer returns the Docker id of the container that such a cgroup, or one above
	// it, was made for, or "". It is called if no container of the task has that cgroup. Nil:
	// no container is known.
	CgroupContainer func(cgroup uint64) string

	// Log gets changes of state and panics.
	Log *zap.Logger
}

// Samples hands out containers' samples as they are taken. Safe for concurrent use.
type Samples interface {
	// Subscribe returns a channel that delivers each new sample of the container with the
	// full Docker id and is closed when it stops, and a function that ends the subscription.
	// The sender never waits: a sample that the receiver is not ready for is skipped.
	Subscribe(containerID string) (samples <-chan *task.Sample, cancel func())
}

// RateLimit is a token bucket: PerSecond requests a second in the long run, Burst at once.
// The zero value limits nothing.
type RateLimit struct {
	PerSecond, Burst int
}

// agentRate is the ECS agent's default limit (agent/config/config.go).
var agentRate = RateLimit{PerSecond: 40, Burst: 60}

// ParseRateLimit reads the value of ECS_TASK_METADATA_RPS_LIMIT, "rate,burst". If the value is not
// two positive integers, ok is false and the result is the agent's default of 40,60, as at the
// agent. Unlike at the agent, the empty text means no limit.
func ParseRateLimit(text string) (limit RateLimit, ok bool) {
	if text == "" {
		return RateLimit{}, true
	}
	rate, burst, _ := strings.Cut(text, ",")
	r, err1 := strconv.Atoi(strings.TrimSpace(rate))
	b, err2 := strconv.Atoi(strings.TrimSpace(burst))
	if err1 != nil || err2 != nil || r <= 0 || b <= 0 {
		return agentRate, false
	}
	return RateLimit{r, b}, true
}

// DefaultConfig returns a complete Config with the agent's usual address.
func DefaultConfig() Config {
	return Config{
		ReadTimeout:     5 * time.Second, // these three as the agent's
		WriteTimeout:    5 * time.Second,
		IdleTimeout:     5 * time.Second,
		MaxHeaderBytes:  8 << 10,
		MaxBodyBytes:    16 << 20,
		MaxConns:        16384,
		MaxConnsPerTask: 128,
		UnknownWait:     MaxUnknownWait,
		MakerWait:       2 * time.Second,
		AgentURL:        "http://127.0.0.1:51679",
		AgentTimeout:    10 * time.Second, // the agent itself gives up after 5 s
		AgentPatience:   time.Second,
		MaxForwards:     1024,
		MaxStreams:      256,
		Tag:             SocketMark,
		Log:             zap.NewNop(),
	}
}

// validate returns the agent's host:port, empty if there is none, or an error that names the field.
func (c *Config) validate() (agent string, err error) {
	positive := []struct {
		name  string
		value int64
	}{
		{"ReadTimeout", int64(c.ReadTimeout)}, {"WriteTimeout", int64(c.WriteTimeout)},
		{"IdleTimeout", int64(c.IdleTimeout)}, {"MaxHeaderBytes", int64(c.MaxHeaderBytes)},
		{"MaxBodyBytes", c.MaxBodyBytes}, {"MaxConns", int64(c.MaxConns)},
		{"MaxConnsPerTask", int64(c.MaxConnsPerTask)},
		{"AgentTimeout", int64(c.AgentTimeout)}, {"AgentPatience", int64(c.AgentPatience)},
		{"MaxForwards", int64(c.MaxForwards)},
		{"MaxStreams", int64(c.MaxStreams)},
	}
	for _, p := range positive {
		if p.value <= 0 {
			return "", fmt.Errorf("server: %s must be positive", p.name)
		}
	}
	switch {
	case c.MakerWait < 0:
		return "", fmt.Errorf("server: MakerWait must not be negative")
	case c.UnknownWait < 0 || c.UnknownWait > MaxUnknownWait:
		return "", fmt.Errorf("server: UnknownWait must be between 0 and %v",
			MaxUnknownWait)
	case c.Rate != RateLimit{} && (c.Rate.PerSecond <= 0 || c.Rate.Burst <= 0):
		return "", fmt.Errorf("server: Rate must have both members positive, or none")
	case c.Tag == nil:
		return "", fmt.Errorf("server: Tag must be set")
	case c.Log == nil:
		return "", fmt.Errorf("server: Log must be set")
	case c.AgentURL == "":
		return "", nil
	}
	u, err := url.Parse(c.AgentURL)
	if err != nil {
		return "", fmt.Errorf("server: AgentURL: %w", err)
	}
	if u.Scheme != "http" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" ||
		u.RawQuery != "" || u.User != nil {
		return "", fmt.Errorf(
			"server: AgentURL must have the form http://host:port, got %q", c.AgentURL)
	}
	if u.Port() == "" {
		return net.JoinHostPort(u.Hostname(), "80"), nil
	}
	return u.Host, nil
}
