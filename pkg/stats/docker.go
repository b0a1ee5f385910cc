package stats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"metad/pkg/fdbudget"
	"metad/pkg/task"
)

// Engine asks the Docker Engine for a container's statistics (GET /containers/{id}/stats): a stream
// of objects, about one a second, or one single object (one-shot). The caller closes the body.
type Engine func(ctx context.Context, id string, stream bool) (io.ReadCloser, error)

const (
	// silence is the longest time without data before a stream is closed, as in the ECS agent.
	silence = 18 * time.Second
	// maxOneShots is the largest number of one-shot requests at a time.
	maxOneShots = 4
)

// DockerSource gets the numbers from the Engine. A hot container has a stream, which ends when the
// container is no longer hot. A one-shot request serves a cold container that is due, and a hot
// one if the budget has no descriptor for a stream.
type DockerSource struct {
	engine   Engine
	net      netSource
	budget   *fdbudget.Budget
	oneShots chan struct{}

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu  sync.Mutex // guards buf; taken after a feed's
	buf []byte
}

// NewDockerSource returns a source of the Engine's numbers. The Engine does not know the
// interfaces of an awsvpc task: the source reads them from the files that cfg names, if it can.
// Close it after the sampler's Run has returned.
func NewDockerSource(engine Engine, cfg CgroupConfig) *DockerSource {
	cfg.setDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	return &DockerSource{
		engine: engine, net: newNetSource(cfg.ProcRoot, cfg.Links), budget: cfg.Budget,
		oneShots: make(chan struct{}, maxOneShots),
		ctx:      ctx, cancel: cancel,
		buf: make([]byte, maxFileBytes),
	}
}

// Close ends all streams and waits for them.
func (s *DockerSource) Close() {
	s.cancel()
	s.wg.Wait()
}

// dockerFeed is the stream of one container while it is hot, otherwise its one-shot requests.
type dockerFeed struct {
	src     *DockerSource
	id      string
	deliver func(*Counters)

	mu     sync.Mutex
	net    netFeed
	cancel context.CancelFunc // of what is under way, nil: nothing
	stream bool               // what is under way is the stream
	held   bool               // a descriptor of the budget
	err    error              // how the last one ended
	closed bool
}

// Open never fails: the first request shows whether the Engine knows the container.
func (s *DockerSource) Open(t *task.Task, c *task.Container, deliver func(*Counters)) (Feed,
	error) {
	f := &dockerFeed{src: s, id: c.ID, deliver: deliver}
	if pause, eni := netProcess(t, c); eni {
		if n, err := s.net.open(pause, eni, false); err == nil {
			f.net = n
		}
	}
	return f, nil
}

// Sample starts the stream if the container is hot, and otherwise ends it.
func (f *dockerFeed) Sample(hot bool) (*Counters, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.err; err != nil {
		f.err = nil
		return nil, err
	}
	stream := hot && f.hold()
	if !stream {
		f.release()
	}
	if f.cancel != nil {
		if f.stream == stream {
			return nil, nil
		}
		f.cancel()
	}
	ctx, cancel := context.WithCancel(f.src.ctx)
	f.cancel, f.stream = cancel, stream
	f.src.wg.Go(func() {
		err := f.run(ctx, stream)
		f.mu.Lock()
		defer f.mu.Unlock()
		if ctx.Err() == nil { // else f.cancel is a successor's, or nobody's
			cancel()
			f.cancel, f.err = nil, err
		}
	})
	return nil, nil
}

// hold reports whether the budget has a descriptor for a stream. It is called with mu held, as
// release is.
func (f *dockerFeed) hold() bool {
	if f.held && f.src.budget.Over() {
		f.release()
		return false
	}
	f.held = f.held || f.src.budget.Keep(1)
	return f.held
}

func (f *dockerFeed) release() {
	if f.held {
		f.held = false
		f.src.budget.Drop(1)
	}
}

// Close ends the stream or request, without waiting for its end.
func (f *dockerFeed) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	if f.cancel != nil {
		f.cancel()
	}
	f.release()
}

func (f *dockerFeed) run(ctx context.Context, stream bool) error {
	if !stream {
		select {
		case f.src.oneShots <- struct{}{}:
			defer func() { <-f.src.oneShots }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(silence, func() { cancel(errors.New("the Engine fell silent")) })
	defer watchdog.Stop()
	body, err := f.src.engine(ctx, f.id, stream)
	if err != nil {
		return fmt.Errorf("ask the Engine: %w", cause(ctx, err))
	}
	defer body.Close()
	stop := context.AfterFunc(ctx, func() { body.Close() })
	defer stop()
	dec := json.NewDecoder(body)
	for {
		var e engineStats
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return errGone // the Engine ends the stream with the container
		} else if err != nil {
			return fmt.Errorf("the Engine's answer: %w", cause(ctx, err))
		}
		watchdog.Reset(silence)
		if e.Read.IsZero() {
			return errGone // so says the Engine of a container that does not run
		}
		c := e.counters()
		if err := f.readNetworks(c); errors.Is(err, errNotYet) && stream {
			continue // with the next object
		} else if err != nil {
			return err
		}
		f.deliver(c)
		if !stream {
			return nil
		}
	}
}

func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil {
		return c
	}
	return err
}

// readNetworks sets the awsvpc task's interfaces, because the Engine shows none.
func (f *dockerFeed) readNetworks(c *Counters) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.net.pid == 0 {
		return nil
	}
	f.src.mu.Lock()
	defer f.src.mu.Unlock()
	err := f.net.reach(-1, 0, f.src.buf)
	if err == nil {
		c.Networks, err = f.net.read(nil, f.src.buf, false)
	}
	return err
}

// engineStats is the part of the Engine's stats object that metad uses.
type engineStats struct {
	Read time.Time `json:"read"`
	Pids struct {
		Current, Limit uint64
	} `json:"pids_stats"`
	Blkio struct {
		ServiceBytes []BlkioEntry `json:"io_service_bytes_recursive"`
		Serviced     []BlkioEntry `json:"io_serviced_recursive"`
		Queue        []BlkioEntry `json:"io_queue_recursive"`
		ServiceTime  []BlkioEntry `json:"io_service_time_recursive"`
		WaitTime     []BlkioEntry `json:"io_wait_time_recursive"`
		Merged       []BlkioEntry `json:"io_merged_recursive"`
		Time         []BlkioEntry `json:"io_time_recursive"`
		Sectors      []BlkioEntry `json:"sectors_recursive"`
	} `json:"blkio_stats"`
	CPU struct {
		Usage struct {
			Total  uint64   `json:"total_usage"`
			PerCPU []uint64 `json:"percpu_usage"`
			Kernel uint64   `json:"usage_in_kernelmode"`
			User   uint64   `json:"usage_in_usermode"`
		} `json:"cpu_usage"`
		System     uint64 `json:"system_cpu_usage"`
		Online     uint32 `json:"online_cpus"`
		Throttling struct {
			Periods   uint64 `json:"periods"`
			Throttled uint64 `json:"throttled_periods"`
			Time      uint64 `json:"throttled_time"`
		} `json:"throttling_data"`
	} `json:"cpu_stats"`
	Memory struct {
		Usage    uint64            `json:"usage"`
		MaxUsage uint64            `json:"max_usage"`
		Stats    map[string]uint64 `json:"stats"`
		Failcnt  uint64            `json:"failcnt"`
		Limit    uint64            `json:"limit"`
	} `json:"memory_stats"`
	Networks map[string]struct {
		RxBytes   uint64 `json:"rx_bytes"`
		RxPackets uint64 `json:"rx_packets"`
		RxErrors  uint64 `json:"rx_errors"`
		RxDropped uint64 `json:"rx_dropped"`
		TxBytes   uint64 `json:"tx_bytes"`
		TxPackets uint64 `json:"tx_packets"`
		TxErrors  uint64 `json:"tx_errors"`
		TxDropped uint64 `json:"tx_dropped"`
	} `json:"networks"`
}

func (e *engineStats) counters() *Counters {
	c := &Counters{
		Read: e.Read,
		CPU: CPU{
			Total: e.CPU.Usage.Total, Kernel: e.CPU.Usage.Kernel,
			User: e.CPU.Usage.User, PerCPU: e.CPU.Usage.PerCPU,
			System: e.CPU.System, Online: e.CPU.Online,
			Periods:          e.CPU.Throttling.Periods,
			ThrottledPeriods: e.CPU.Throttling.Throttled,
			ThrottledTime:    e.CPU.Throttling.Time,
		},
		Memory: Memory{Usage: e.Memory.Usage, MaxUsage: e.Memory.MaxUsage,
			Failcnt: e.Memory.Failcnt, Limit: e.Memory.Limit},
		Pids:  Pids(e.Pids),
		Blkio: Blkio(e.Blkio),
	}
	for k, v := range e.Memory.Stats {
		c.Memory.Stats = append(c.Memory.Stats, Stat{Key: k, Value: v})
	}
	slices.SortFunc(c.Memory.Stats, func(a, b Stat) int {
		return strings.Compare(a.Key, b.Key)
	})
	for name, n := range e.Networks {
		c.Networks = append(c.Networks, Network{
			Name:    name,
			RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors,
			RxDropped: n.RxDropped,
			TxBytes:   n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors,
			TxDropped: n.TxDropped,
		})
	}
	slices.SortFunc(c.Networks, func(a, b Network) int {
		return strings.Compare(a.Name, b.Name)
	})
	return c
}
