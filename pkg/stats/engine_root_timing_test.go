//go:build root

package stats

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"metad/internal/testdocker"
	"metad/pkg/task"
)

// BenchmarkRootStats measures what the statistics of 100 idle real containers cost in CPU time, in
// the Engine's processes (dockerd, containerd, a shim for each container) and in ours, and how old
// a sample is when it is asked for. It prints the table of docs/performance.md. Not for -benchtime:
// run it with -benchtime 1x. STATS_CONTAINERS and STATS_SECONDS make it smaller.
func BenchmarkRootStats(b *testing.B) {
	count, seconds := fromEnv(b, "STATS_CONTAINERS", 100), fromEnv(b, "STATS_SECONDS", 60)
	h := testdocker.Start(b)
	var ids []string
	for i := range count {
		ids = append(ids, h.Run(b, testdocker.Container{Name: fmt.Sprintf("idle-%d", i)}))
	}
	tk := follow(b, h, ids...)
	time.Sleep(10 * time.Second) // let the Engine finish what the starts left it

	type row struct {
		what         string
		engine, ours float64 // CPU-seconds per container-minute
	}
	var rows []row
	measure := func(what string, d time.Duration) {
		engine, ours, start := engineCPU(b, h), cpuTime(b), time.Now()
		time.Sleep(d)
		minutes := time.Since(start).Minutes() * float64(count)
		rows = append(rows, row{what, (engineCPU(b, h) - engine).Seconds() / minutes,
			(cpuTime(b) - ours).Seconds() / minutes})
	}
	window := time.Duration(seconds) * time.Second

	measure("nothing runs beside the Engine", window)

	src, err := NewCgroupSource(CgroupConfig{})
	if err != nil {
		b.Fatal(err)
	}
	s := New(Config{}, src)
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.Run(ctx) })
	s.Apply([]*task.Task{tk})
	time.Sleep(5 * time.Second)
	measure("cgroup source, nobody asks", 2*window)

	// All are asked about at any time, five times a second: more would be the questions' cost.
	var ages []time.Duration
	asking, stopAsking := context.WithCancel(ctx)
	wg.Go(func() {
		for asking.Err() == nil {
			time.Sleep(time.Duration(rand.Int64N(int64(400 * time.Millisecond))))
			now := time.Now()
			for _, c := range tk.Containers {
				c.Stats.Ask(now.UnixNano())
				if sample := c.Stats.Load(); sample != nil {
					ages = append(ages, now.Sub(sample.Read))
				}
			}
		}
	})
	time.Sleep(3 * time.Second)
	warm := len(ages)
	measure("cgroup source, asked each second", window)
	stopAsking()
	cancel()
	wg.Wait()

	// The Engine's stream, thrown away as it comes: decoding it is not counted.
	ctx, cancel = context.WithCancel(b.Context())
	var frames [2]int64
	var mu sync.Mutex
	for _, id := range ids {
		wg.Go(func() {
			body, err := engine(h)(ctx, id, true)
			if err != nil {
				b.Error(err)
				return
			}
			defer body.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := body.Read(buf)
				mu.Lock()
				frames[1] += int64(bytes.Count(buf[:n], []byte{'\n'}))
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	time.Sleep(5 * time.Second)
	mu.Lock()
	frames[0] = frames[1]
	mu.Unlock()
	start := time.Now()
	measure("the Engine's stream, read and thrown away", window)
	mu.Lock()
	interval := time.Since(start).Seconds() * float64(count) / float64(frames[1]-frames[0])
	mu.Unlock()
	cancel()
	wg.Wait()

	// As metad with the docker source: the same, decoded and rendered.
	dsrc := NewDockerSource(engine(h), CgroupConfig{})
	s = New(Config{}, dsrc)
	ctx, cancel = context.WithCancel(b.Context())
	wg.Go(func() { s.Run(ctx) })
	for _, c := range tk.Containers {
		c.Stats.Ask(time.Now().Add(window).UnixNano())
	}
	s.Apply([]*task.Task{tk})
	time.Sleep(10 * time.Second)
	measure("docker source, asked each second", window)
	cancel()
	wg.Wait()
	dsrc.Close()

	// What a row added to the test program's own idle cost, and, where the Engine is asked, to
	// the Engine's. Where it is not asked, the difference between two idle Engines would only
	// be noise: they are all shown.
	idle, stream := rows[0], rows[3]
	added := func(i int) float64 {
		sum := rows[i].ours - idle.ours
		if i >= 3 {
			sum += rows[i].engine - idle.engine
		}
		return sum
	}
	streamed := stream.engine - idle.engine // its reader's cost is not counted
	out := &strings.Builder{}
	fmt.Fprintf(out, "\n%d idle containers, %s each; CPU-seconds per container-minute\n\n",
		count, window)
	fmt.Fprintln(out,
		"| | dockerd, containerd and shims | this program | added | share of the stream |")
	fmt.Fprintln(out, "|---|---|---|---|---|")
	for i, r := range rows {
		what := fmt.Sprintf("%.5f | 1/%.0f", added(i), streamed/added(i))
		switch {
		case i == 0:
			what = "|"
		case i == 3:
			what = fmt.Sprintf("%.5f | 1", streamed)
		// below the noise, and all that the program did certainly includes it
		case added(i) <= 0:
			what = fmt.Sprintf("0 | less than 1/%.0f", streamed/r.ours)
		}
		fmt.Fprintf(out, "| %s | %.5f | %.5f | %s |\n", r.what, r.engine, r.ours, what)
	}
	ages = ages[warm:]
	slices.Sort(ages)
	fmt.Fprintf(out,
		"\nsample age when asked, cgroup source (%d questions): median %v, 99 %% %v, "+
			"max %v\n", len(ages),
		ages[len(ages)/2].Round(time.Millisecond),
		ages[len(ages)*99/100].Round(time.Millisecond),
		ages[len(ages)-1].Round(time.Millisecond))
	fmt.Fprintf(out, "the Engine's stream: one object each %.2f s\n", interval)
	_, _ = io.WriteString(os.Stdout, out.String())
}

func fromEnv(b *testing.B, name string, otherwise int) int {
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		b.Fatalf("%s: got %q, want a number", name, v)
	}
	return n
}

// engineCPU returns the CPU time of all processes of h's Engine: those that were started with its
// directory in their arguments.
func engineCPU(b *testing.B, h *testdocker.Host) (sum time.Duration) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		b.Fatal(err)
	}
	for _, path := range lines {
		cmdline, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(cmdline, []byte(h.Dir)) {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(filepath.Dir(path), "stat"))
		if err != nil {
			continue
		}
		_, rest, _ := bytes.Cut(stat, []byte(") "))
		fields := bytes.Fields(rest)
		for _, f := range fields[11:13] { // utime, stime
			ticks, err := strconv.Atoi(string(f))
			if err != nil {
				b.Fatal(err)
			}
			sum += time.Duration(ticks) * nsPerTick
		}
	}
	return sum
}
