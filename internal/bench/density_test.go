//go:build bench

package bench

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"metad/internal/testhost"
)

// TestDensity prints what metad costs on made-up hosts of many containers. DENSITY names the hosts,
// "100x3" for a hundred tasks of three containers; METAD is the binary, else it is built;
// DENSITY_SECONDS is how long the cold and the hot process are watched, DENSITY_STARTS how many
// tasks are replaced. Profiles of the hot process and of the time in which tasks are replaced go to
// DENSITY_PROFILES, with those of the memory.
func TestDensity(t *testing.T) {
	binary := os.Getenv("METAD")
	if binary == "" {
		binary = testhost.Build(t)
	}
	var rows []*densityRow
	for _, size := range strings.Fields(cmp.Or(os.Getenv("DENSITY"), "10x3 100x3 1000x3")) {
		t.Run(size, func(t *testing.T) {
			r := &densityRow{size: size}
			if _, err := fmt.Sscanf(size, "%dx%d", &r.tasks,
				&r.containers); err != nil {
				t.Fatalf("DENSITY %q: %v", size, err)
			}
			r.run(t, binary)
			rows = append(rows, r)
		})
	}
	t.Log("\n" + densityTable(rows))
}

// densityEvery is the time between two tasks that are replaced.
const densityEvery = 100 * time.Millisecond

// densityRow is what was measured on one host.
type densityRow struct {
	size              string
	tasks, containers int
	starts            int // tasks that are replaced while metad is watched

	ready, hooked, stop        time.Duration
	rssStart, rssHot, rssChurn memory
	fdsCold, fdsHot            int
	cold, hot                  float64 // share of a core
	metadata, first            *testhost.Answers
	perStart                   time.Duration // CPU for a task replaced
	wrong                      int
	samplesHot                 float64 // a second
}

// memory is what a process has resident, in bytes: all, and pages of files, which are the binary's.
type memory struct{ all, files int }

func (m memory) String() string {
	return fmt.Sprintf("%d MB (%d of the binary)", m.all>>20, m.files>>20)
}

func rssOf(m *testhost.Metad) (rss memory) {
	rss.all, rss.files = m.RSS()
	return rss
}

func (r *densityRow) run(t *testing.T, binary string) {
	h := testhost.New(t)
	tasks := make([]*testhost.Task, r.tasks)
	for i := range tasks {
		tasks[i] = h.AddTask(r.containers, nil)
	}
	var args []string
	if profiles() != "" {
		args = append(args, "--pprof")
	}
	m := h.Start(binary, 0, args...)
	r.ready, r.hooked = m.WaitReady(), m.WaitHooked(r.tasks)
	window := time.Duration(fromEnvInt(t, "DENSITY_SECONDS", 20)) * time.Second
	share := func() float64 {
		cpu, start := m.CPU(), time.Now()
		time.Sleep(window)
		return float64(m.CPU()-cpu) / float64(time.Since(start))
	}
	m.WaitSampled(2 * r.tasks * r.containers)
	time.Sleep(time.Second) // what came with them is done
	r.rssStart = rssOf(m)
	r.cold, r.fdsCold = share(), m.Descriptors()
	r.metadata = testhost.Ask(tasks, "/v2/metadata", testhost.Metadata)

	r.starts = fromEnvInt(t, "DENSITY_STARTS", 60)
	saved := r.profile(t, m, fmt.Sprintf("profile?seconds=%d", r.starts/10), "churn")
	r.churn(h, m, tasks)
	saved()
	r.rssChurn = rssOf(m)
	r.profile(t, m, "heap", "heap")()

	m.Hot(tasks)
	const rendered = `metad_samples_total{outcome="rendered"}`
	samples, start := m.Metric(rendered), time.Now()
	saved = r.profile(t, m, fmt.Sprintf("profile?seconds=%d", window/time.Second), "hot")
	r.hot = share()
	saved()
	r.samplesHot = (m.Metric(rendered) - samples) / time.Since(start).Seconds()
	r.fdsHot, r.rssHot = m.Descriptors(), rssOf(m)
	stats := testhost.Ask(tasks, "/v2/stats", testhost.Statistics)
	for _, a := range []*testhost.Answers{r.metadata, r.first, stats} {
		for i, wrong := range a.Wrong {
			if r.wrong++; i < 3 {
				t.Log("wrong:", wrong)
			}
		}
	}
	r.stop = m.Stop()
}

// churn replaces tasks, ten a second if the machine can, each of which asks as soon as its program
// could.
func (r *densityRow) churn(h *testhost.Host, m *testhost.Metad, tasks []*testhost.Task) {
	r.first = &testhost.Answers{}
	var mu sync.Mutex
	var asking sync.WaitGroup
	cpu, start := m.CPU(), time.Now()
	for n := range r.starts {
		i := n % len(tasks)
		old := tasks[i]
		tasks[i] = h.AddTask(r.containers, func(task *testhost.Task) {
			asking.Go(func() {
				a := testhost.Ask([]*testhost.Task{task}, "/v2/metadata",
					testhost.Own)
				mu.Lock()
				defer mu.Unlock()
				r.first.Asked++
				r.first.Times, r.first.Wrong = append(r.first.Times, a.Times...),
					append(r.first.Wrong, a.Wrong...)
			})
		})
		old.Stop()
		old.Destroy()
		time.Sleep(time.Until(start.Add(time.Duration(n+1) * densityEvery)))
	}
	asking.Wait()
	time.Sleep(2 * time.Second) // their first samples are part of the price
	took := time.Since(start)
	r.perStart = (m.CPU() - cpu - time.Duration(r.cold*float64(took))) /
		time.Duration(r.starts)
}

func profiles() string { return os.Getenv("DENSITY_PROFILES") }

// profile begins to take one of metad's profiles, if they are wanted, and returns what waits for
// its end.
func (r *densityRow) profile(t *testing.T, m *testhost.Metad, path, name string) (wait func()) {
	if profiles() == "" {
		return func() {}
	}
	done := make(chan error)
	go func() {
		body, err := m.Profile(path)
		if err == nil {
			err = os.WriteFile(filepath.Join(profiles(), r.size+"-"+name+".pprof"),
				[]byte(body), 0o644)
		}
		done <- err
	}()
	return func() {
		if err := <-done; err != nil {
			t.Errorf("profile %s: %v", name, err)
		}
	}
}

func fromEnvInt(t *testing.T, name string, otherwise int) int {
	n := otherwise
	if text := os.Getenv(name); text != "" {
		if _, err := fmt.Sscan(text, &n); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return n
}

// densityTable has a column for each host.
func densityTable(rows []*densityRow) string {
	var b strings.Builder
	line := func(what string, f func(*densityRow) string) {
		b.WriteString("| " + what + " |")
		for _, r := range rows {
			b.WriteString(" " + f(r) + " |")
		}
		b.WriteByte('\n')
	}
	starts := 0
	for _, r := range rows {
		starts = r.starts
	}
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }
	line("tasks × containers", func(r *densityRow) string { return fmt.Sprintf("%d × %d", r.tasks, r.containers) })
	line("---", func(*densityRow) string { return "---" })
	line("ready after a start", func(r *densityRow) string { return ms(r.ready) })
	line("all ports hooked after a start", func(r *densityRow) string { return ms(r.hooked) })
	line("memory after the start", func(r *densityRow) string { return r.rssStart.String() })
	line(fmt.Sprintf("memory after %d tasks were replaced", starts), func(r *densityRow) string { return r.rssChurn.String() })
	line("memory, all hot", func(r *densityRow) string { return r.rssHot.String() })
	line("CPU, nobody asks, of a core", func(r *densityRow) string { return fmt.Sprintf("%.2f %%", 100*r.cold) })
	line("CPU, all hot, of a core", func(r *densityRow) string { return fmt.Sprintf("%.2f %%", 100*r.hot) })
	line("… per 1,000 containers", func(r *densityRow) string {
		return fmt.Sprintf("%.2f %%", 100*r.hot*1000/float64(r.tasks*r.containers))
	})
	line("samples a second, all hot", func(r *densityRow) string { return fmt.Sprintf("%.0f", r.samplesHot) })
	line("metadata, p50 and p99", func(r *densityRow) string { return ms(r.metadata.Quantile(0.5)) + ", " + ms(r.metadata.Quantile(0.99)) })
	line("first answer of a new task, p50 and p99", func(r *densityRow) string { return ms(r.first.Quantile(0.5)) + ", " + ms(r.first.Quantile(0.99)) })
	line("CPU for a task replaced", func(r *densityRow) string { return ms(r.perStart) })
	line("… per container", func(r *densityRow) string {
		return ms(r.perStart / time.Duration(r.containers))
	})
	line("stop", func(r *densityRow) string { return ms(r.stop) })
	line("descriptors, cold and hot", func(r *densityRow) string { return fmt.Sprintf("%d, %d", r.fdsCold, r.fdsHot) })
	line("wrong answers", func(r *densityRow) string { return fmt.Sprint(r.wrong) })
	return b.String()
}
