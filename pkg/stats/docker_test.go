package stats

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"metad/pkg/fdbudget"
	"metad/pkg/task"
)

// fakeEngine answers like the Engine: one object at once, or one a second.
type fakeEngine struct {
	broken           atomic.Bool
	silent           atomic.Bool // a stream says nothing after its first object
	streams, singles atomic.Int32
	open             atomic.Int32 // streams that are open now
	n                atomic.Int32
}

func (e *fakeEngine) object(id string) string {
	return fmt.Sprintf(
		`{"read":%q,"preread":"0001-01-01T00:00:00Z","pids_stats":{"current":2},"blkio_stats":{"io_service_bytes_recursive":
		[{"major":8,"minor":0,"op":"Read","value":5}],"io_serviced_recursive":[],"sectors_recursive":null},"num_procs":0,"storage_stats":{},
		"cpu_stats":{"cpu_usage":{"total_usage":%d,"percpu_usage":[1,2],"usage_in_kernelmode":3,"usage_in_usermode":4},"system_cpu_usage":5,
		"online_cpus":2,"throttling_data":{"periods":1,"throttled_periods":2,"throttled_time":3}},"precpu_stats":{},"memory_stats":
		{"usage":7,"max_usage":8,"stats":{"b":2,"a":1},"failcnt":9,"limit":10,"new_field":11},"name":"/x","id":%q,"networks":{
		"eth1":{"rx_bytes":1},"eth0":{"rx_bytes":1,"rx_packets":2,"rx_errors":3,"rx_dropped":4,"tx_bytes":5,"tx_packets":6,"tx_errors":7,"tx_dropped":8}}}
	`, time.Now().UTC().Format(time.RFC3339Nano), e.n.Add(1), id)
}

func (e *fakeEngine) ask(ctx context.Context, id string, stream bool) (io.ReadCloser, error) {
	if e.broken.Load() {
		return nil, errors.New("no engine")
	}
	if !stream {
		e.singles.Add(1)
		return io.NopCloser(strings.NewReader(e.object(id))), nil
	}
	e.streams.Add(1)
	e.open.Add(1)
	r, w := io.Pipe()
	go func() {
		defer e.open.Add(-1)
		for {
			if _, err := io.WriteString(w, e.object(id)); err != nil {
				return
			}
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
				w.CloseWithError(ctx.Err())
				return
			}
			if e.silent.Load() {
				<-ctx.Done()
				return
			}
		}
	}()
	return r, nil
}

func newDockerSource(t *testing.T, e *fakeEngine) *DockerSource {
	src := NewDockerSource(e.ask, CgroupConfig{ProcRoot: t.TempDir()})
	t.Cleanup(src.Close)
	return src
}

// The Engine's numbers come out as the Engine would print them, with metad's own previous sample.
func TestDockerSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &fakeEngine{}
		s := running(t, Config{}, newDockerSource(t, e))
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(2 * time.Second)
		// Two that make a sample with a past, and one because the second's answer was not
		// there yet.
		if e.streams.Load() != 0 || e.singles.Load() != 3 {
			t.Errorf("unasked: got %d streams and %d single questions, want 0 and 3",
				e.streams.Load(), e.singles.Load())
		}
		sample := c.Stats.Load()
		doc := string(sample.JSON[:sample.V2]) + "}"
		_, doc, _ = strings.Cut(doc, `,"pids_stats"`)
		const want = `:{"current":2},"blkio_stats":{"io_service_bytes_recursive":[{"major":8,"minor":0,"op":"Read","value":5}],` +
			`"io_serviced_recursive":[],"io_queue_recursive":null,"io_service_time_recursive":null,"io_wait_time_recursive":null,` +
			`"io_merged_recursive":null,"io_time_recursive":null,"sectors_recursive":null},"num_procs":0,"storage_stats":{},` +
			`"cpu_stats":{"cpu_usage":{"total_usage":3,"percpu_usage":[1,2],"usage_in_kernelmode":3,"usage_in_usermode":4},` +
			`"system_cpu_usage":5,"online_cpus":2,"throttling_data":{"periods":1,"throttled_periods":2,"throttled_time":3}},` +
			`"precpu_stats":{"cpu_usage":{"total_usage":2,"percpu_usage":[1,2],"usage_in_kernelmode":3,"usage_in_usermode":4},` +
			`"system_cpu_usage":5,"online_cpus":2,"throttling_data":{"periods":1,"throttled_periods":2,"throttled_time":3}},` +
			`"memory_stats":{"usage":7,"max_usage":8,"stats":{"a":1,"b":2},"failcnt":9,"limit":10},"name":"/name-a","id":"a","networks":{` +
			`"eth0":{"rx_bytes":1,"rx_packets":2,"rx_errors":3,"rx_dropped":4,"tx_bytes":5,"tx_packets":6,"tx_errors":7,"tx_dropped":8},` +
			`"eth1":{"rx_bytes":1,"rx_packets":0,"rx_errors":0,"rx_dropped":0,"tx_bytes":0,"tx_packets":0,"tx_errors":0,"tx_dropped":0}}}`
		if doc != want {
			t.Errorf("got\n%s\nwant\n%s", doc, want)
		}
	})
}

// A stream runs while somebody asks, one for each container, and is dropped afterwards.
func TestDockerStreamOnDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &fakeEngine{}
		s := running(t, Config{}, newDockerSource(t, e))
		a, b := aContainer("a"), aContainer("b")
		s.Apply([]*task.Task{aTask(a, b)})
		for range 30 {
			sleep(time.Second)
			a.Stats.Ask(time.Now().UnixNano())
		}
		if age := time.Since(a.Stats.Load().Read); e.open.Load() != 1 ||
			e.streams.Load() != 1 || age > time.Second {
			t.Errorf("asked for a: %d streams opened, %d open, sample %v old; want "+
				"1, 1 and fresh", e.streams.Load(), e.open.Load(), age)
		}
		sleep(2 * time.Minute)
		if e.open.Load() != 0 {
			t.Errorf("2 minutes later: %d streams, want 0", e.open.Load())
		}
		a.Stats.Ask(time.Now().UnixNano())
		sleep(3 * time.Second)
		s.Apply(nil)
		synctest.Wait()
		if e.open.Load() != 0 || a.Stats.Load() != nil {
			t.Errorf("stopped: %d streams, sample %v; want none", e.open.Load(),
				a.Stats.Load())
		}
	})
}

// Without a descriptor for a stream a hot container is asked about each second.
func TestDockerWithoutDescriptors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &fakeEngine{}
		others := 900
		budget := fdbudget.New(1024, func() (int, error) { return others, nil })
		src := NewDockerSource(e.ask, CgroupConfig{ProcRoot: t.TempDir(), Budget: budget})
		t.Cleanup(src.Close)
		s := running(t, Config{Budget: budget}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		check := func(when string, open int32) {
			t.Helper()
			for range 20 {
				sleep(time.Second)
				c.Stats.Ask(time.Now().UnixNano())
			}
			if age := time.Since(c.Stats.Load().Read); e.open.Load() != open ||
				age > time.Second {
				t.Errorf("%s: %d streams, sample %v old; want %d and fresh", when,
					e.open.Load(), age, open)
			}
			if kept := budget.Usage().Kept; kept != int(open) {
				t.Errorf("%s: %d descriptors kept, want %d", when, kept, open)
			}
		}
		check("none free", 0)
		others = 100
		check("enough", 1)
		others = 900
		check("others need them", 0)
	})
}

func TestDockerFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &fakeEngine{}
		e.broken.Store(true)
		s := running(t, Config{}, newDockerSource(t, e))
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(5 * time.Second)
		if c.Stats.Load() != nil || s.Metrics().Failed.Load() == 0 {
			t.Errorf("no engine: got sample %v, %d failures", c.Stats.Load(),
				s.Metrics().Failed.Load())
		}
		e.broken.Store(false)
		c.Stats.Ask(time.Now().UnixNano())
		sleep(5 * time.Second)
		decode(t, c.Stats.Load())

		// A silent stream is closed, and its old numbers are removed.
		e.silent.Store(true)
		sleep(silence + 2*time.Second)
		if failed := s.Metrics().Failed.Load(); failed < 2 {
			t.Errorf("silent stream: got %d failures", failed)
		}
		if e.streams.Load() < 2 {
			t.Error("the stream was not opened again")
		}
		e.silent.Store(false)
		sleep(30 * time.Second)
		if age := time.Since(c.Stats.Load().Read); age > time.Second {
			t.Errorf("it speaks again: sample is %v old", age)
		}
	})
}

// The Engine answers with an empty object for a container that does not run.
func TestDockerEmptyObject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ask := func(context.Context, string, bool) (io.ReadCloser, error) {
			return io.NopCloser(
					strings.NewReader(
						`{"read":"0001-01-01T00:00:00Z","name":"/x","id":"a"}`)),
				nil
		}
		src := NewDockerSource(ask, CgroupConfig{ProcRoot: t.TempDir()})
		t.Cleanup(src.Close)
		s := running(t, Config{}, src)
		c := aContainer("a")
		s.Apply([]*task.Task{aTask(c)})
		sleep(10 * time.Second)
		if c.Stats.Load() != nil || s.Metrics().Gone.Load() == 0 {
			t.Errorf("got sample %v, %d gone; want none and some", c.Stats.Load(),
				s.Metrics().Gone.Load())
		}
	})
}
