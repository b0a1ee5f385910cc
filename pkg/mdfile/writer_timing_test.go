package mdfile

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"metad/pkg/task"
)

// BenchmarkApply has one of 1,000 containers change, against writing a file of that length and
// renaming it and no more, in turns.
func BenchmarkApply(b *testing.B) {
	const n = 1000
	w, err := NewWriter(Config{DataDir: b.TempDir()}, zap.NewNop())
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	tasks := make([]*task.Task, n)
	for i := range tasks {
		c := runningContainer()
		c.ID = fmt.Sprintf("%064x", i)
		tasks[i] = testTask(c)
		tasks[i].ARN += fmt.Sprint(i)
		e, err := w.Reserve(tasks[i], c, FormProposal, newToken())
		if err != nil {
			b.Fatal(err)
		}
		if err := e.Created(c.ID); err != nil {
			b.Fatal(err)
		}
	}
	w.Apply(tasks)
	text, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "metadata",
		w.byID[tasks[0].Containers[0].ID].dir, FileName))
	if err != nil {
		b.Fatal(err)
	}
	floor := filepath.Join(b.TempDir(), "file")
	var applying, writing time.Duration
	for i := 0; b.Loop(); i++ {
		old := tasks[i%n]
		t, c := *old, *old.Containers[0]
		c.DockerName = fmt.Sprintf("renamed-%d", i)
		t.Containers = []*task.Container{&c}
		tasks[i%n] = &t

		start := time.Now()
		w.Apply(tasks)
		applying += time.Since(start)

		start = time.Now()
		if err := os.WriteFile(floor+".tmp", text, 0o644); err != nil {
			b.Fatal(err)
		}
		if err := os.Rename(floor+".tmp", floor); err != nil {
			b.Fatal(err)
		}
		writing += time.Since(start)
	}
	b.ReportMetric(0, "ns/op") // the sum of both says nothing
	b.ReportMetric(float64(applying.Microseconds())/float64(b.N), "apply-µs")
	b.ReportMetric(float64(writing.Microseconds())/float64(b.N), "write-µs")
	b.ReportMetric(applying.Seconds()/writing.Seconds(), "times")
}
