package docker

import (
	"context"
	"fmt"
	"sync/atomic"

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
	next, err := client.NewClientWithOpts(client.WithHost(c.host),
		client.WithAPIVersionNegotiation())
	if err != nil {
		return fmt.Errorf("client of %q: %w", c.host, err)
	}
	if old := c.current.Swap(next); old != nil {
		return old.Close()
	}
	return nil
}

// Close closes idle connections.
func (c *Client) Close() error { return c.current.Load().Close() }

// ContainerList implements Engine.
func (c *Client) ContainerList(ctx context.Context, o container.ListOptions) ([]container.Summary,
	error) {
	return c.current.Load().ContainerList(ctx, o)
}

// ContainerInspect implements Engine.
func (c *Client) ContainerInspect(ctx context.Context, id string) (container.InspectResponse,
	error) {
	return c.current.Load().ContainerInspect(ctx, id)
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
