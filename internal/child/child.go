// Package child runs a program as a child process of a test, and keeps its output.
package child

import (
	"bytes"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a child process.
type Process struct {
	Cmd  *exec.Cmd // ProcessState holds the exit code after Done
	Out  *Output   // standard output and standard error
	Done chan struct{}
}

// Start starts cmd on a thread that in chooses, for example one in another network namespace; nil:
// any. The caller kills the process when the test ends.
func Start(t testing.TB, cmd *exec.Cmd, in func(start func() error) error) *Process {
	t.Helper()
	p := &Process{Cmd: cmd, Out: &Output{}, Done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.Out, p.Out
	if in == nil {
		in = func(start func() error) error { return start() }
	}
	if err := in(cmd.Start); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait() // ProcessState holds the exit code
		close(p.Done)
	}()
	return p
}

// Stop ends the process by SIGTERM. The test fails if that takes longer than limit.
func (p *Process) Stop(t testing.TB, limit time.Duration) {
	t.Helper()
	if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done:
	case <-time.After(limit):
		t.Fatalf("the process did not end within %v of SIGTERM:\n%s", limit, p.Out)
	}
}

// Kill ends the process by SIGKILL if it still runs, and waits for its end.
func (p *Process) Kill() {
	_ = p.Cmd.Process.Kill() // it may have ended
	<-p.Done
}

// Output is the output of a process, which a test can read while the process writes.
type Output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// Tail returns the last n bytes at most.
func (o *Output) Tail(n int) string {
	text := o.String()
	return text[max(0, len(text)-n):]
}
