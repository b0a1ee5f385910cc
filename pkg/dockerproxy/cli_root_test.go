//go:build root

package dockerproxy

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"metad/internal/testdocker"
)

// session runs docker commands, through the proxy or straight.
type session struct {
	*rootGround
	t      *testing.T
	socket string
	dir    string // for files, empty at the start
}

// result of a command: everything a user sees of it.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) String() string {
	return fmt.Sprintf("code %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
}

func (s *session) command(args ...string) *exec.Cmd {
	cmd := s.CLICommand(args...)
	cmd.Env = append(cmd.Env, "DOCKER_HOST=unix://"+s.socket, "DOCKER_BUILDKIT=0")
	cmd.Dir = s.dir
	return cmd
}

// run runs cmd with the input.
func (s *session) run(cmd *exec.Cmd, stdin string) result {
	s.t.Helper()
	var r result
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	kill := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer kill.Stop()
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			s.t.Fatal(err)
		}
	}
	// The client says this or not: it asks for the end of a container and leaves, both at once.
	r.stderr = canceled.ReplaceAllString(stderr.String(), "")
	r.stdout, r.code = stdout.String(), cmd.ProcessState.ExitCode()
	return r
}

func (s *session) docker(args ...string) result {
	s.t.Helper()
	return s.run(s.command(args...), "")
}

// must is docker that succeeds.
func (s *session) must(args ...string) string {
	s.t.Helper()
	r := s.docker(args...)
	if r.code != 0 {
		s.t.Fatalf("docker %s: %v", strings.Join(args, " "), r)
	}
	return strings.TrimSpace(r.stdout)
}

// pty runs a docker command on a terminal, which is given the input.
func (s *session) pty(stdin string, args ...string) result {
	s.t.Helper()
	cmd := s.command(args...)
	line := make([]string, len(cmd.Args))
	for i, a := range cmd.Args {
		line[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	script := exec.Command("script", "-qefc", strings.Join(line, " "), os.DevNull)
	script.Env, script.Dir = append(cmd.Env, "TERM=xterm", "SHELL=/bin/sh"), cmd.Dir
	r := s.run(script, stdin)
	// script's end of input, at any place
	r.stdout = strings.NewReplacer("\x00", "", "^@", "").Replace(r.stdout)
	return r
}

var canceled = regexp.MustCompile(
	`time="[^"]*" level=error msg="error waiting for container: context canceled"\n`)

const image = testdocker.BusyboxImage

// TestRootCLI compares what the docker command shows its user through the proxy with what it shows
// without it, for each way in which it talks to the Engine.
func TestRootCLI(t *testing.T) {
	for _, tt := range []struct {
		name string
		// do returns what must be the same. It removes what it makes.
		do func(s *session) string
	}{
		{"run", func(s *session) string {
			return s.docker("run", "--rm", image, "sh", "-c",
				"echo out; echo err >&2; exit 7").String()
		}},
		{"run of nothing", func(s *session) string {
			return s.docker("run", "--rm", image, "no-such-program").String() +
				s.docker("run", "--rm", "--pull", "never", "no-such-image").String()
		}},
		{"run with input to its end", func(s *session) string {
			return s.run(s.command("run", "-i", "--rm", image, "sh", "-c",
				"cat; echo end of input; sleep 0.2; echo later"),
				strings.Repeat("line\n", 20000)).String()
		}},
		{"run on a terminal", func(s *session) string {
			return s.pty("", "run", "-it", "--rm", image, "sh", "-c",
				"tty; stty -a | head -n1; echo hello; exit 3").String()
		}},
		{"run on a terminal with input", func(s *session) string {
			return s.pty("read this\n", "run", "-it", "--rm", image, "sh", "-c",
				"read a; echo got $a").String()
		}},
		{"exec", func(s *session) string {
			id := s.must("run", "-d", "--rm", "--stop-signal", "KILL", image)
			defer s.must("stop", id)
			return s.docker("exec", id, "sh", "-c",
				"echo out; echo err >&2; exit 9").String() +
				s.run(s.command("exec", "-i", id, "wc", "-c"),
					strings.Repeat("x", 1<<20)).String() +
				s.pty("", "exec", "-it", id, "sh", "-c",
					"tty; echo hello; exit 4").String() +
				s.pty("typed\n", "exec", "-it", id, "sh", "-c",
					"read a; echo got $a").String() +
				s.docker("exec", "-d", id, "touch", "/tmp/detached").String()
		}},
		{"logs -f", func(s *session) string {
			id := s.must("run", "-d", image, "sh", "-c",
				"for i in 1 2 3 4 5; do echo line $i; echo err $i >&2; sleep "+
					"0.1; done; exit 2")
			defer s.must("rm", "-f", id)
			return s.docker("logs", "-f", id).String() + s.docker("wait", id).String() +
				s.docker("logs", "--tail", "2", id).String()
		}},
		{"logs -f arrive at once", func(s *session) string {
			id := s.must("run", "-d", "--stop-signal", "KILL", image, "sh", "-c",
				"echo now; sleep 1000")
			defer s.must("rm", "-f", id)
			logs := s.command("logs", "-f", id)
			out, err := logs.StdoutPipe()
			if err == nil {
				err = logs.Start()
			}
			if err != nil {
				s.t.Fatal(err)
			}
			// the container writes no more
			line, _ := bufio.NewReader(out).ReadString('\n')
			_ = logs.Process.Kill()
			_ = logs.Wait()
			return line
		}},
		{"cp", func(s *session) string {
			id := s.must("create", image)
			defer s.must("rm", id)
			big := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
			if err := errors.Join(os.WriteFile(filepath.Join(s.dir, "big"), big, 0o640),
				os.MkdirAll(filepath.Join(s.dir, "d/e"), 0o755),
				os.WriteFile(filepath.Join(s.dir, "d/e/f"), []byte("f"),
					0o600)); err != nil {
				s.t.Fatal(err)
			}
			s.must("cp", "big", id+":/tmp/big")
			s.must("cp", "d", id+":/tmp/")
			s.must("cp", id+":/tmp/big", "back")
			back, err := os.ReadFile(filepath.Join(s.dir, "back"))
			return fmt.Sprint(sha256.Sum256(back) == sha256.Sum256(big), err) +
				tarNames(s.docker("cp", id+":/tmp", "-").stdout) +
				noID(s.docker("cp", id+":/none", "x").String())
		}},
		{"attach", func(s *session) string {
			id := s.must("create", "-i", image, "sh", "-c",
				"while read a; do echo got $a; done; echo bye; exit 5")
			defer s.must("rm", "-f", id)
			r := s.run(s.command("start", "-a", "-i", id), "one\ntwo\n")
			id2 := s.must("run", "-d", image, "sh", "-c",
				"sleep 3; echo attached; exit 6")
			defer s.must("rm", "-f", id2)
			return r.String() + s.docker("attach", "--no-stdin", id2).String()
		}},
		{"build", func(s *session) string {
			if err := errors.Join(os.WriteFile(filepath.Join(s.dir, "data"),
				make([]byte, 5<<20), 0o644),
				os.WriteFile(filepath.Join(s.dir, "Dockerfile"),
					[]byte("FROM scratch\nCOPY data /data\nLABEL a=b\n"),
					0o644)); err != nil {
				s.t.Fatal(err)
			}
			r := s.docker("build", "--no-cache", "-t", "metad-test-build", ".")
			defer s.docker("rmi", "metad-test-build")
			bad := s.run(s.command("build", "--no-cache", "-"),
				"FROM "+image+"\nRUN echo in the build; exit 8\n")
			return noID(r.String()) + s.docker("inspect", "-f",
				"{{.Config.Labels}} {{len .RootFS.Layers}}",
				"metad-test-build").String() + noID(bad.String())
		}},
		{"build with BuildKit", func(s *session) string {
			if err := errors.Join(os.WriteFile(filepath.Join(s.dir, "data"),
				[]byte("data"), 0o644),
				os.WriteFile(filepath.Join(s.dir, "Dockerfile"),
					[]byte("FROM scratch\nCOPY data /data\n"),
					0o644)); err != nil {
				s.t.Fatal(err)
			}
			cmd := s.command("build", "--progress=plain", "--no-cache", "-q", "-t",
				"metad-test-buildkit", ".")
			cmd.Env = append(cmd.Env, "DOCKER_BUILDKIT=1")
			r := s.run(cmd, "")
			defer s.docker("rmi", "metad-test-buildkit")
			return fmt.Sprint(r.code) + s.docker("inspect", "-f",
				"{{len .RootFS.Layers}}", "metad-test-buildkit").String()
		}},
		{"save and load", func(s *session) string {
			saved := s.docker("save", image)
			loaded := s.run(s.command("load"), saved.stdout)
			return tarNames(saved.stdout) + loaded.String()
		}},
		{"export and import", func(s *session) string {
			id := s.must("create", "--name", "exported", image)
			defer s.must("rm", id)
			exported := s.docker("export", id)
			imported := s.run(s.command("import", "-", "metad-test-import"),
				exported.stdout)
			defer s.docker("rmi", "metad-test-import")
			return fmt.Sprint(len(exported.stdout) > 1<<20, imported.code)
		}},
		{"events", func(s *session) string {
			// the stream need not be open in time
			since := fmt.Sprint(time.Now().Unix() - 1)
			name := fmt.Sprintf("eventful-%d", len(s.socket))
			events := s.command("events", "--since", since, "--filter",
				"container="+name, "--format", "{{.Type}} {{.Action}}")
			out, err := events.StdoutPipe()
			if err == nil {
				err = events.Start()
			}
			if err != nil {
				s.t.Fatal(err)
			}
			kill := time.AfterFunc(patience, func() { events.Process.Kill() })
			defer kill.Stop()
			s.must("run", "--rm", "--name", name, image, "true")
			var seen []string
			for lines := bufio.NewScanner(out); lines.Scan(); {
				seen = append(seen, lines.Text())
				if strings.HasPrefix(lines.Text(), "container destroy") {
					break
				}
			}
			_ = events.Process.Kill()
			_ = events.Wait()
			return strings.Join(seen, "\n")
		}},
		{"the rest", func(s *session) string {
			id := s.must("run", "-d", "--name", "rest", "--label", "x=y",
				"--stop-signal", "KILL", image)
			defer s.must("rm", "-f", id)
			return s.docker("ps", "-a", "--filter", "label=x=y", "--format",
				"{{.Names}} {{.Image}} {{.Labels}}").String() +
				s.docker("inspect", "-f",
					"{{.State.Status}} {{.HostConfig.NetworkMode}} "+
						"{{.Config.Cmd}}", id).String() +
				s.docker("top", "rest", "-o", "pid,comm").String()[:20] +
				s.docker("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}",
					"rest").String() +
				s.docker("images", "--format", "{{.Repository}}:{{.Tag}}",
					image).String() +
				s.docker("network", "ls", "--format",
					"{{.Name}} {{.Driver}}").String() +
				s.docker("volume", "ls", "-q", "--filter", "name=none").String() +
				s.docker("kill", "none").String() + s.docker("update",
				"--cpu-shares", "512", "rest").String() +
				s.docker("version", "--format",
					"{{.Server.Version}} {{.Server.APIVersion}}").String() +
				s.docker("info", "--format",
					"{{.Driver}} {{.SecurityOptions}}").String()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newRootGround(t, options{})
			straight := &session{g, t, g.Socket, t.TempDir()}
			through := &session{g, t, g.socket, t.TempDir()}
			want, got := tt.do(straight), tt.do(through)
			if got != want {
				t.Errorf("through the proxy: %.3000s\nwithout it: %.3000s", got,
					want)
			}
			t.Logf("%.1000s", want)
			if len(want) < 4 || strings.Contains(want, "Cannot connect") {
				t.Errorf("this says nothing: %s", want)
			}
			if n := g.warnings(); n != 0 {
				t.Errorf("got %d warnings: %v", n, g.logs.All())
			}
			g.empty()
		})
	}
}

var ids = regexp.MustCompile(`\b(sha256:)?[0-9a-f]{12,64}\b`)

// noID hides what differs from one container to the next.
func noID(s string) string { return ids.ReplaceAllString(s, "<id>") }

// tarNames lists what is in an archive.
func tarNames(archive string) string {
	var b strings.Builder
	r := tar.NewReader(strings.NewReader(archive))
	for {
		hdr, err := r.Next()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprint(&b, err)
			}
			return b.String()
		}
		fmt.Fprintln(&b, hdr.Name, hdr.Size, hdr.Mode)
	}
}
