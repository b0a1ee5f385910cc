//go:build root

package dockerproxy

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"

	"metad/internal/testdocker"
)

// Run with
//
//	go test -tags root -run '^$' -bench . -benchtime 100x ./pkg/dockerproxy
//
// Each iteration does the same straight and through the proxy, in turns; the medians are reported.

// compared holds the times of one thing done in two ways.
type compared struct{ straight, proxied []time.Duration }

func (c *compared) time(b *testing.B, i int, straight, proxied func() error) {
	b.Helper()
	both := []struct {
		do    func() error
		times *[]time.Duration
	}{{straight, &c.straight}, {proxied, &c.proxied}}
	if i%2 == 1 {
		slices.Reverse(both)
	}
	for _, way := range both {
		start := time.Now()
		if err := way.do(); err != nil {
			b.Fatal(err)
		}
		*way.times = append(*way.times, time.Since(start))
	}
}

// report gives the medians, and those of the differences and ratios of each pair: what else goes on
// on the machine meets both of a pair.
func (c *compared) report(b *testing.B) {
	var more []time.Duration
	var ratio []float64
	for i, s := range c.straight {
		more = append(more, c.proxied[i]-s)
		ratio = append(ratio, s.Seconds()/c.proxied[i].Seconds())
	}
	b.ReportMetric(0, "ns/op") // the sum of both says nothing
	b.ReportMetric(median(c.straight).Seconds()*1e3, "straight-ms")
	b.ReportMetric(median(c.proxied).Seconds()*1e3, "proxied-ms")
	b.ReportMetric(median(more).Seconds()*1e3, "more-ms")
	b.ReportMetric(median(ratio), "speed-ratio")
}

func median[T cmp.Ordered](all []T) T {
	slices.Sort(all)
	return all[len(all)/2]
}

// BenchmarkCreate creates containers with a metadata file, and without one.
func BenchmarkCreate(b *testing.B) {
	g := newRootGround(b, options{})
	proxied := g.client()
	ctx := context.Background()
	n := 0
	create := func(c *client.Client) func() error {
		return func() error {
			n++
			resp, err := c.ContainerCreate(ctx,
				&container.Config{Image: testdocker.BusyboxImage},
				&container.HostConfig{NetworkMode: "none"}, nil, nil,
				fmt.Sprintf("bench-%d", n))
			if err == nil {
				b.Cleanup(func() {
					_ = g.Client.ContainerRemove(ctx, resp.ID,
						container.RemoveOptions{Force: true})
				})
			}
			return err
		}
	}
	var c compared
	for i := 0; b.Loop(); i++ {
		c.time(b, i, create(g.Client), create(proxied))
	}
	c.report(b)
	if g.warnings() != 0 {
		b.Errorf("created without a file: %v", g.logs.All())
	}
}

// BenchmarkPing is the cost of the way through the proxy alone.
func BenchmarkPing(b *testing.B) {
	g := newRootGround(b, options{})
	proxied := g.client()
	ping := func(c *client.Client) func() error {
		return func() error { _, err := c.Ping(context.Background()); return err }
	}
	var c compared
	for i := 0; b.Loop(); i++ {
		c.time(b, i, ping(g.Client), ping(proxied))
	}
	c.report(b)
}

// BenchmarkCopy is docker cp of 100 MB, into a container and out of it.
func BenchmarkCopy(b *testing.B) {
	g := newRootGround(b, options{})
	id := g.start()
	file := filepath.Join(b.TempDir(), "100MB")
	if err := os.WriteFile(file, make([]byte, 100<<20), 0o644); err != nil {
		b.Fatal(err)
	}
	g.docker("cp", file, id+":/tmp/f")
	for _, way := range []struct{ name, from, to string }{{"in", file, id + ":/tmp/f"},
		{"out", id + ":/tmp/f", file}} {
		b.Run(way.name, func(b *testing.B) {
			var c compared
			for i := 0; b.Loop(); i++ {
				c.time(b, i, func() error {
					return g.CLICommand("cp", way.from, way.to).Run()
				},
					func() error {
						return g.command("cp", way.from, way.to).Run()
					})
			}
			c.report(b)
		})
	}
}
