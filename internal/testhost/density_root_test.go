//go:build root

package testhost

import (
	"strings"
	"testing"
	"time"
)

// crowd is a made-up host with metad on it, which answers.
type crowd struct {
	*Host
	*Metad
	t     *testing.T
	tasks []*Task
}

func newCrowd(t *testing.T, tasks, containers, limit int) *crowd {
	t.Helper()
	binary := Build(t)
	start := time.Now()
	c := &crowd{Host: New(t), t: t}
	for range tasks {
		c.tasks = append(c.tasks, c.AddTask(containers, nil))
	}
	t.Logf("%d tasks of %d containers made in %v; an inspect has %d bytes", tasks, containers,
		time.Since(start).Round(time.Millisecond),
		c.Engine.InspectBytes(c.tasks[0].Containers[0]))
	c.Metad = c.Start(binary, limit)
	t.Logf("ready after %v", c.WaitReady())
	return c
}

// right fails the test unless every task gets its own answer.
func (c *crowd) right(when, path string, ok func(*Task, string) bool) {
	c.t.Helper()
	a := Ask(c.tasks, path, ok)
	for i, wrong := range a.Wrong {
		if i < 3 {
			c.t.Errorf("%s: %s: %s", when, path, wrong)
		}
	}
	rss, _ := c.RSS()
	c.t.Logf("%s: %s: %d asked, %d wrong, p50 %v, p99 %v; %d MB, %d descriptors", when, path,
		a.Asked, len(a.Wrong),
		a.Quantile(0.5).Round(time.Microsecond), a.Quantile(0.99).Round(time.Microsecond),
		rss>>20, c.Descriptors())
}

// quiet fails the test if metad logged that descriptors ran out, or took a running container for
// ended.
func (c *crowd) quiet() {
	c.t.Helper()
	for _, text := range []string{"too many open files", "EMFILE", "no file descriptor free"} {
		if strings.Contains(c.Out.String(), text) {
			c.t.Errorf("metad said %q", text)
		}
	}
	for _, outcome := range []string{"gone", "damaged", "no_descriptor", "failed"} {
		if n := c.Metric(`metad_samples_total{outcome="` + outcome + `"}`); n != 0 {
			c.t.Errorf("%v samples %s, want none", n, outcome)
		}
	}
	for path, n := range c.Engine.Unknown() {
		c.t.Errorf("the Engine was asked %d times for %s, which it does not know", n, path)
	}
}

// A hundred tasks of three containers: every answer is right, cold and hot, before and after tasks
// were replaced.
func TestRootDensity(t *testing.T) {
	c := newCrowd(t, 100, 3, 0)
	c.right("cold", "/v2/metadata", Metadata)
	c.Hot(c.tasks)
	c.right("hot", "/v2/stats", Statistics)
	c.quiet()
	for i := range 20 {
		c.tasks[i].Stop()
		c.tasks[i].Destroy()
		c.tasks[i] = c.AddTask(3, func(task *Task) {
			// It asks with its first instruction.
			if a := Ask([]*Task{task}, "/v2/metadata", Own); len(a.Wrong) > 0 {
				t.Errorf("just started: %s", a.Wrong[0])
			}
		})
	}
	c.right("replaced", "/v2/metadata", Metadata)
	c.Hot(c.tasks)
	c.right("replaced, hot", "/v2/stats", Statistics)
	t.Logf("stopped after %v", c.Stop())
}

// With a thousand hot containers and 1,024 descriptors every answer is right, and no log line says
// that descriptors ran out.
func TestRootFewDescriptors(t *testing.T) {
	const limit = 1024
	c := newCrowd(t, 334, 3, limit)
	c.WaitHooked(len(c.tasks))
	c.Hot(c.tasks)
	for range 3 {
		c.right("hot", "/v2/metadata", Metadata)
		c.right("hot", "/v2/stats", Statistics)
	}
	t.Logf("%v descriptors kept of %v", c.Metric("metad_descriptors_kept"),
		c.Metric("metad_descriptors_room"))
	if n := c.Descriptors(); n > limit*7/8 {
		t.Errorf("%d descriptors are open, which leaves less than an eighth of %d", n,
			limit)
	}
	c.quiet()
}
