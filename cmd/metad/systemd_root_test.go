//go:build root && systemd

package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"metad/internal/child"
	"metad/internal/expect"
	"metad/internal/testdocker"
)

// bootSystemd makes systemd the first process of namespaces of its own. $1 is its root, $2 a
// directory that it has at /opt/metad: /tmp is another one for metad. Its cgroups are in a
// hierarchy without a controller.
const bootSystemd = `set -e
mount --make-rprivate /
mkdir -p /run/metad-systemd
mount -t tmpfs tmpfs /run/metad-systemd
cd /run/metad-systemd
mkdir upper work root
mount -t overlay overlay -o "lowerdir=$1,upperdir=upper,workdir=work" root
mount -t proc proc root/proc
mount -t sysfs sysfs root/sys
mount --bind /sys/fs/bpf root/sys/fs/bpf
mount -t tmpfs tmpfs root/sys/fs/cgroup
mkdir root/sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup root/sys/fs/cgroup/systemd
mount -t tmpfs tmpfs root/run
mount --rbind /dev root/dev
mkdir -p root/opt/metad root/etc/metad
mount --bind "$2" root/opt/metad
cp "$2/metad.service" root/etc/systemd/system/
ln -s /opt/metad/metad.yaml root/etc/metad/
exec env -i PATH="$PATH" container=other chroot root /lib/systemd/systemd`

// realSystemd is a systemd with metad's unit, and the clients of that metad.
type realSystemd struct {
	t    *testing.T
	host *testdocker.Host
	dir  string // shared
	out  *child.Output
	pid  string // of systemd

	asked, failed atomic.Int64
	last          atomic.Value // of the errors
}

func startSystemd(t *testing.T, h *testdocker.Host) *realSystemd {
	t.Helper()
	s := &realSystemd{t: t, host: h, dir: t.TempDir()}
	pins := newProcess(t, h).pins
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", self, s.program()).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if out, err := exec.Command("ln", h.Socket, filepath.Join(s.dir, "docker.sock")).
		CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	file, err := os.ReadFile(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(file), "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, "ExecStart=") {
			lines[i] = fmt.Sprintf("Environment=%s=1\n"+
				"ExecStart=/opt/metad/metad serve "+
				"--docker-host unix:///opt/metad/docker.sock --pin-dir %s "+
				"--data-dir /opt/metad/data --docker-proxy off", asMetad, pins)
		}
	}
	s.write("metad.service", strings.Join(lines, "\n"))
	s.write("metad.yaml", "cluster: one\n")
	cmd := h.Command("unshare", "--pid", "--mount", "--ipc", "--uts", "--cgroup", "--fork",
		"--kill-child", "sh", "-c", bootSystemd, "sh", os.Getenv("METAD_SYSTEMD_ROOT"),
		s.dir)
	p := child.Start(t, cmd, nil)
	t.Cleanup(p.Kill)
	s.out = p.Out
	expect.Until(t, "systemd's process", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
		s.pid = strings.TrimSpace(string(b))
		return err == nil && s.pid != ""
	}, func() any { return p.Out })
	expect.Until(t, "systemd", func() bool {
		_, err := s.try("systemctl", "list-jobs")
		return err == nil
	}, func() any { return p.Out })
	return s
}

func (s *realSystemd) program() string { return filepath.Join(s.dir, "metad") }

func (s *realSystemd) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// try runs a command beside systemd.
func (s *realSystemd) try(args ...string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"-t", s.pid, "-m", "-p", "-n", "-r",
		"-w", "--"}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (s *realSystemd) run(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		status, _ := s.try("systemctl", "--no-pager", "status", "metad")
		s.t.Fatalf("%v: %v %s\n%s\n%s", args, err, out, status, s.log())
	}
	return out
}

func (s *realSystemd) log() string {
	out, _ := s.try("journalctl", "--no-pager", "-o", "cat", "-u", "metad")
	return out
}

func (s *realSystemd) property(name string) string {
	return s.run("systemctl", "show", "-P", name, "metad")
}

// ask makes a request as a process of the host. metad knows no task of it, but answers.
func (s *realSystemd) ask() error {
	return s.host.Do(func() error {
		c, err := net.DialTimeout("tcp4", "169.254.170.2:80", 8*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(8 * time.Second)); err != nil {
			return err
		}
		fmt.Fprint(c, "GET /v2/metadata HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
}

// load asks without a pause until stop.
func (s *realSystemd) load(clients int) (stop func()) {
	var over atomic.Bool
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			for !over.Load() {
				if err := s.ask(); err != nil {
					s.failed.Add(1)
					s.last.Store(err.Error())
				}
				s.asked.Add(1)
			}
		})
	}
	stop = func() { over.Store(true); all.Wait() }
	s.t.Cleanup(stop)
	return stop
}

func (s *realSystemd) more() {
	s.t.Helper()
	n := s.asked.Load()
	expect.Until(s.t, "requests", func() bool { return s.asked.Load() > n+100 })
}

// gone waits until nothing of metad is left, neither with systemd nor in the kernel.
func (s *realSystemd) gone() {
	s.t.Helper()
	expect.Until(s.t, "the endpoint to go", func() bool {
		return s.property("NFileDescriptorStore") == "0" &&
			s.host.Command("ip", "link", "show", "metad0").Run() != nil
	}, func() any { return s.log() })
}

func (s *realSystemd) answers() {
	s.t.Helper()
	expect.Until(s.t, "an answer", func() bool { return s.ask() == nil },
		func() any { return s.log() })
}

// With a real systemd and the unit as it is, restarts and reloads fail no request. A stop, and a
// restart whose start fails, leave nothing behind.
func TestRootSystemd(t *testing.T) {
	const restarts = 10
	s := startSystemd(t, testdocker.Start(t))
	t.Log(s.run("systemctl", "--version"))
	s.run("systemctl", "start", "metad")
	s.answers()
	stop := s.load(4)
	for i := range restarts {
		s.run("systemctl", "restart", "metad")
		if n := s.property("NFileDescriptorStore"); n != "0" {
			t.Errorf("restart %d: systemd keeps %s files while metad runs", i, n)
		}
		s.more()
	}
	if n := strings.Count(s.log(), "taken over from the metad before"); n != restarts {
		t.Errorf("%d of %d restarts took over:\n%s", n, restarts, s.log())
	}
	pid := s.property("MainPID")
	s.write("metad.yaml", "cluster: two\n")
	s.run("systemctl", "reload", "metad")
	expect.Until(t, "the reload", func() bool {
		return strings.Count(s.log(), "taken over from the metad before") == restarts+1
	}, func() any { return s.log() })
	s.more()
	if now := s.property("MainPID"); now != pid {
		t.Errorf("reload: process %s became %s", pid, now)
	}
	stop()
	t.Logf("%d restarts and a reload: %d requests, %d failed", restarts, s.asked.Load(),
		s.failed.Load())
	if s.failed.Load() > 0 {
		t.Errorf("the last failure: %v", s.last.Load())
	}

	s.run("systemctl", "stop", "metad")
	s.gone()

	s.run("systemctl", "start", "metad")
	s.answers()
	s.write("metad.yaml", "clutser: two\n")
	if out, err := s.try("systemctl", "restart", "metad"); err == nil {
		t.Errorf("a start with a bad file: %s", out)
	}
	s.gone()
	s.write("metad.yaml", "cluster: two\n")
	s.answers()

	if err := os.Rename(s.program(), s.program()+".away"); err != nil {
		t.Fatal(err)
	}
	if out, err := s.try("systemctl", "restart", "metad"); err == nil {
		t.Errorf("a start without a program: %s", out)
	}
	s.gone()
	if err := os.Rename(s.program()+".away", s.program()); err != nil {
		t.Fatal(err)
	}
	s.answers()
	s.run("systemctl", "stop", "metad")
}
