//go:build !race

package stats

import (
	"bytes"
	"context"
	"os"
	"runtime/debug"
	"strconv"
	"testing"
	"time"

	"metad/pkg/task"

	"golang.org/x/sys/unix"
)

// BenchmarkSample is one container's sample: reading, rendering and publishing.
func BenchmarkSample(b *testing.B) {
	for _, v2 := range []bool{false, true} {
		b.Run(map[bool]string{false: "v1", true: "v2"}[v2], func(b *testing.B) {
			tr := newTree(b, v2)
			c := tr.add(0)
			s := New(Config{}, treeSource(b, tr.dir))
			s.Apply([]*task.Task{aTask(c)})
			defer s.stop()
			b.ReportAllocs()
			for b.Loop() {
				if err := s.sample(s.entries[c.ID]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkThousandContainers runs the sampler with 1,000 containers that are all asked for, for
// b.N seconds (-benchtime 20x), and reports the share of one core it takes, and by how much each
// container makes the process larger: what a sampler of one container takes is not counted.
func BenchmarkThousandContainers(b *testing.B) {
	for _, v2 := range []bool{false, true} {
		b.Run(map[bool]string{false: "v1", true: "v2"}[v2], func(b *testing.B) {
			defer debug.SetGCPercent(debug.SetGCPercent(50)) // as metad has it
			const count = 1000
			one := newHotHost(b, v2, 1)
			time.Sleep(4 * time.Second)
			base := one.stop()
			h := newHotHost(b, v2, count)
			time.Sleep(4 * time.Second) // opening, and finding out about the interfaces
			cpu, samples, start := cpuTime(b), h.Metrics().Samples.Load(), time.Now()
			for b.Loop() {
				time.Sleep(time.Second)
			}
			wall := time.Since(start)
			b.ReportMetric(100*float64(cpuTime(b)-cpu)/float64(wall), "%core")
			b.ReportMetric(float64(h.Metrics().Samples.Load()-samples)/wall.Seconds(),
				"samples/s")
			size := len(h.containers[0].Stats.Load().JSON)
			b.ReportMetric(float64(size), "B/sample")
			b.ReportMetric(float64(h.stop()-base)/count-2*float64(size),
				"RSS-B/container-beyond-2-samples")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// hotHost is a sampler at work on containers that are asked for all the time.
type hotHost struct {
	*Sampler
	containers []*task.Container
	stop       func() (growth int) // resident bytes since before it was made
}

func newHotHost(b *testing.B, v2 bool, count int) *hotHost {
	tr := newTree(b, v2)
	h := &hotHost{}
	for i := range count {
		c := tr.add(i)
		c.Stats.Ask(time.Now().Add(time.Minute).UnixNano())
		h.containers = append(h.containers, c)
	}
	tk := aTask(h.containers...)
	debug.FreeOSMemory()
	before := residentBytes(b)
	h.Sampler = New(Config{}, treeSource(b, tr.dir))
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.Run(ctx) }()
	h.Apply([]*task.Task{tk})
	h.stop = func() int {
		after := residentBytes(b)
		cancel()
		<-done
		return after - before
	}
	return h
}

func residentBytes(b *testing.B) int {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.Atoi(string(bytes.Fields(statm)[1]))
	if err != nil {
		b.Fatal(err)
	}
	return pages * os.Getpagesize()
}

func cpuTime(b testing.TB) time.Duration {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}
