package top

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"metad/internal/expect"
)

// terminal is a pseudo-terminal, with all that was written to it.
type terminal struct {
	*os.File // the side of the person
	program  *os.File

	mu   sync.Mutex // guards seen
	seen bytes.Buffer
}

func openTerminal(t *testing.T, width, height int) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	tt := &terminal{File: master}
	t.Cleanup(func() { _ = master.Close() })
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		tt.program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n),
			os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tt.program.Close() })
	tt.resize(t, width, height)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			tt.mu.Lock()
			tt.seen.Write(buf[:n])
			tt.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return tt
}

func (tt *terminal) resize(t *testing.T, width, height int) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(tt.Fd()), unix.TIOCSWINSZ, &unix.Winsize{
		Col: uint16(width), Row: uint16(height)}); err != nil {
		t.Fatal(err)
	}
}

// take returns what was written since the last take.
func (tt *terminal) take() string {
	tt.mu.Lock()
	defer tt.mu.Unlock()
	s := tt.seen.String()
	tt.seen.Reset()
	return s
}

// In a real terminal the screen is drawn, keys and a new size arrive, NO_COLOR is kept to, and the
// terminal is given back as it was.
func TestTerminal(t *testing.T) {
	for _, noColor := range []string{"", "1"} {
		t.Run("NO_COLOR="+noColor, func(t *testing.T) { inTerminal(t, noColor) })
	}
}

func inTerminal(t *testing.T, noColor string) {
	t.Setenv("NO_COLOR", noColor)
	t.Setenv("TERM", "xterm-256color")
	tt := openTerminal(t, 100, 20)
	before, err := unix.IoctlGetTermios(int(tt.program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		s := &source{snapshots: []*Snapshot{snapshot(0, three(0)...)}}
		done <- Run(t.Context(), Config{Source: s, Every: 20e6, Printable: clean},
			tt.program, tt.program)
	}()
	var all strings.Builder
	var rest string // not looked for yet
	see := func(what string) {
		t.Helper()
		expect.Until(t, what+" on the terminal", func() bool {
			news := tt.take()
			all.WriteString(news)
			rest += news
			_, after, found := strings.Cut(rest, what)
			if found {
				rest = after
			}
			return found
		}, func() any { return fmt.Sprintf("%q of %q", rest, all.String()) })
	}
	see("\x1b[?1049h")
	see("gamma")
	if _, err := io.WriteString(tt, "t"); err != nil {
		t.Fatal(err)
	}
	see("TASK")
	tt.resize(t, 60, 10) // it is not the test's terminal: the signal comes from here
	if err := syscall.Kill(os.Getpid(), syscall.SIGWINCH); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tt, "/zz"); err != nil {
		t.Fatal(err)
	}
	see("no container")
	if _, err := io.WriteString(tt, "\x03"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want nil", err)
	}
	see("\x1b[?1049l")
	after, err := unix.IoctlGetTermios(int(tt.program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if *after != *before {
		t.Errorf("the terminal is left as %+v, was %+v", after, before)
	}
	if colour := strings.Contains(all.String(), "\x1b[36m"); colour == (noColor != "") {
		t.Errorf("colour on the screen: %v in %q", colour, all.String())
	}
}
