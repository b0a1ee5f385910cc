package docker

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/system"
	"github.com/docker/docker/client"
)

// Engine is the part of the Docker Engine's API that a Follower uses. *Client implements it, and
// so does Docker's own client.
//
// If an Engine has a method Renew() error, it is called before each connection, because the Engine
// may have another version after a restart.
type Engine interface {
	ContainerList(context.Context, container.ListOptions) ([]container.Summary, error)
	ContainerInspect(ctx context.Context, id string) (container.InspectResponse, error)
	Events(context.Context, events.ListOptions) (<-chan events.Message, <-chan error)
	ImageInspect(ctx context.Context, id string,
		o ...client.ImageInspectOption) (image.InspectResponse, error)
	NetworkInspect(ctx context.Context, name string, o network.InspectOptions) (network.Inspect,
		error)
	NetworkList(context.Context, network.ListOptions) ([]network.Summary, error)
}

// idleConns is how many connections to the Engine stay open: as many looks as usually go on at
// once.
const idleConns = 8

// Client is a client of the Engine at one address, of any version. Docker's own client negotiates
// a version once, and never a higher one later. An Engine that has been upgraded beyond that
// version refuses all its requests, so Renew replaces it. Safe for concurrent use.
type Client struct {
	host    string
	current atomic.Pointer[client.Client]
}

// NewClient returns a client of the Engine at host, in the form of DOCKER_HOST. It does not connect
// yet.
func NewClient(host string) (*Client, error) {
	c := &Client{host: host}
	return c, c.Renew()
}

// Renew makes the next request negotiate the version again. Running requests continue.
func (c *Client) Renew() error {
	transport := &http.Transport{MaxIdleConns: idleConns, MaxIdleConnsPerHost: idleConns,
		IdleConnTimeout: 30 * time.Second}
	h := &http.Client{Transport: transport, CheckRedirect: client.CheckRedirect}
	next, err := client.NewClientWithOpts(client.WithHTTPClient(h), client.WithHost(c.host),
		client.WithAPIVersionNegotiation())
	if err != nil {
		return fmt.Errorf("client of %q: %w", c.host, err)
	}
	h.Transport = answers{transport} // instead of one that traces each request
	if old := c.current.Swap(next); old != nil {
		return old.Close()
	}
	return nil
}

// Close closes idle connections.
func (c *Client) Close() error { return c.current.Load().Close() }

// ContainerList implements Engine. The list has what is used here: ids, names, states, addresses
// and the sources of mounts.
func (c *Client) ContainerList(ctx context.Context,
	o container.ListOptions) (list []container.Summary, err error) {
	ctx = decodedBy(ctx, func(body io.Reader) (err error) {
		list, err = decodeList(body)
		return err
	})
	_, err = c.current.Load().ContainerList(ctx, o)
	return list, err
}

// ContainerInspect implements Engine. The answer has what is used here; of the environment that is
// the variables that say where the metadata is.
func (c *Client) ContainerInspect(ctx context.Context, id string) (in container.InspectResponse,
	err error) {
	ctx = decodedBy(ctx, func(body io.Reader) (err error) {
		in, err = decodeInspect(body)
		return err
	})
	_, err = c.current.Load().ContainerInspect(ctx, id)
	return in, err
}

// Events implements Engine.
func (c *Client) Events(ctx context.Context, o events.ListOptions) (<-chan events.Message,
	<-chan error) {
	return c.current.Load().Events(ctx, o)
}

// ImageInspect implements Engine.
func (c *Client) ImageInspect(ctx context.Context, id string,
	o ...client.ImageInspectOption) (image.InspectResponse, error) {
	return c.current.Load().ImageInspect(ctx, id, o...)
}

// NetworkInspect implements Engine.
func (c *Client) NetworkInspect(ctx context.Context, name string,
	o network.InspectOptions) (network.Inspect, error) {
	return c.current.Load().NetworkInspect(ctx, name, o)
}

// NetworkList implements Engine.
func (c *Client) NetworkList(ctx context.Context, o network.ListOptions) ([]network.Summary,
	error) {
	return c.current.Load().NetworkList(ctx, o)
}

// ContainerStats returns the stream of a container's samples, or one sample.
func (c *Client) ContainerStats(ctx context.Context, id string,
	stream bool) (container.StatsResponseReader, error) {
	return c.current.Load().ContainerStats(ctx, id, stream)
}

// ContainerStatsOneShot returns one sample without a previous one.
func (c *Client) ContainerStatsOneShot(ctx context.Context,
	id string) (container.StatsResponseReader, error) {
	return c.current.Load().ContainerStatsOneShot(ctx, id)
}

// Info returns the Engine's description of itself.
func (c *Client) Info(ctx context.Context) (system.Info,
	error) {
	return c.current.Load().Info(ctx)
}
