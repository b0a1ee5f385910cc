package testdocker

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// supervisorArg0 is what the test binary is called when it runs again as a host's supervisor.
const supervisorArg0 = "metad-testdocker-supervisor"

// The supervisor is the test binary once more, started in the new network namespace. It is the
// parent of everything the host runs and adopts what they orphan (containerd's shims), so it can
// end all of it; and it learns from the end of its standard input that the test is over, however
// that came about. A test that dies by SIGKILL leaves nothing behind.
func init() {
	if len(os.Args) != 2 || os.Args[0] != supervisorArg0 {
		return
	}
	// Pdeathsig follows the thread that forked: keep to the main one, which lives as long as we
	// do.
	runtime.LockOSThread()
	replies := os.NewFile(3, "replies")
	if err := supervise(hostDir(os.Args[1]), os.Stdin, replies); err != nil {
		fmt.Fprintln(os.Stderr, "supervisor:", err)
		fmt.Fprintln(replies, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// hostDir is a host's directory; what is in it is named by its methods.
type hostDir string

func (d hostDir) path(name string) string  { return filepath.Join(string(d), name) }
func (d hostDir) socket() string           { return d.path("docker.sock") }
func (d hostDir) containerdSocket() string { return d.path("containerd.sock") }
func (d hostDir) execRoot() string         { return d.path("exec") }
func (d hostDir) dataRoot() string         { return d.path("data") }
func (d hostDir) log(daemon string) string { return d.path(daemon + ".log") }
func (d hostDir) containerdConfig() string { return d.path("containerd.toml") }
func (d hostDir) cgroupParent() string     { return "/" + filepath.Base(string(d)) }
func (d hostDir) dockerdPIDFile() string   { return d.path("docker.pid") }
func (d hostDir) dockerdConfig() string    { return d.path("daemon.json") }
func (d hostDir) containerdState() string  { return d.path("containerd-state") }

type supervisor struct {
	dir     hostDir
	dockerd int // pid, 0 when it does not run
}

func supervise(dir hostDir, commands io.Reader, replies io.Writer) (err error) {
	s := &supervisor{dir: dir}
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGINT, unix.SIGTERM)
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper: %w", err)
	}
	defer func() { err = errors.Join(err, s.cleanUp()) }()

	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	// A test that asks such a port again and again until somebody listens may connect to
	// itself, and then nobody can listen.
	const reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports"
	if err := os.WriteFile(reserved, []byte("51678-51683"), 0); err != nil {
		return fmt.Errorf("reserve the ports of the agent and of metad: %w", err)
	}
	if err := s.startContainerd(); err != nil {
		return err
	}

	lines := make(chan string)
	go func() {
		defer close(lines)
		sc := bufio.NewScanner(commands)
		for sc.Scan() {
			lines <- sc.Text()
		}
	}()
	fmt.Fprintln(replies, "ok")
	for {
		select {
		case <-stop:
			return nil
		case <-children:
			s.reap()
		case line, ok := <-lines:
			if !ok {
				return nil
			}
			if err := s.command(line); err != nil {
				fmt.Fprintln(replies, strings.ReplaceAll(err.Error(), "\n", "; "))
			} else {
				fmt.Fprintln(replies, "ok")
			}
		}
	}
}

func (s *supervisor) command(line string) error {
	switch line {
	case "start":
		return s.startDockerd()
	case "stop":
		return s.endDockerd(unix.SIGTERM)
	case "kill":
		return s.endDockerd(unix.SIGKILL)
	}
	return fmt.Errorf("unknown command %q", line)
}

func (s *supervisor) startContainerd() error {
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = %q
[ttrpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
`, s.dir.path("containerd"), s.dir.containerdState(), s.dir.containerdSocket(),
		s.dir.containerdSocket()+".ttrpc", s.dir.path("opt"))
	if err := os.WriteFile(s.dir.containerdConfig(), []byte(config), 0o600); err != nil {
		return err
	}
	_, err := s.spawn("containerd", "--config", s.dir.containerdConfig())
	return err
}

func (s *supervisor) startDockerd() (err error) {
	if s.dockerd != 0 {
		return errors.New("dockerd runs already")
	}
	// A containerd of its own, or dockerd would take the machine's if there is one.
	s.dockerd, err = s.spawn("dockerd",
		"--host", "unix://"+s.dir.socket(),
		"--group", "root",
		"--containerd", s.dir.containerdSocket(),
		"--data-root", s.dir.dataRoot(),
		"--exec-root", s.dir.execRoot(),
		"--pidfile", s.dir.dockerdPIDFile(),
		"--config-file", s.dir.dockerdConfig(),
		"--exec-opt", "native.cgroupdriver=cgroupfs",
		"--cgroup-parent", s.dir.cgroupParent())
	return err
}

func (s *supervisor) endDockerd(sig unix.Signal) error {
	pid := s.dockerd
	if pid == 0 {
		return errors.New("dockerd does not run")
	}
	if err := unix.Kill(pid, sig); err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(
		5 * time.Millisecond) {
		if s.reap(); s.dockerd == 0 {
			return nil
		}
	}
	return fmt.Errorf("dockerd did not end at signal %d", sig)
}

// spawn starts a daemon that dies with the supervisor. Its output is appended to its log.
func (s *supervisor) spawn(name string, args ...string) (pid int, err error) {
	path, err := lookDaemon(name)
	if err != nil {
		return 0, err
	}
	log, err := os.OpenFile(s.dir.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	p, err := os.StartProcess(path, append([]string{name}, args...), &os.ProcAttr{
		Env: append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin:"+
			os.Getenv("PATH")),
		Files: []*os.File{nil, log, log},
		Sys:   &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", name, err)
	}
	defer p.Release() // reap waits, for this one as for the adopted ones
	return p.Pid, nil
}

// reap takes every child that has ended.
func (s *supervisor) reap() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
		if pid == s.dockerd {
			s.dockerd = 0
		}
	}
}

// cleanUp ends every process of the host and removes all it left: mounts, shims' sockets,
// cgroups, files. The network namespace goes with the last process or handle.
func (s *supervisor) cleanUp() error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		pids := descendants(os.Getpid())
		if len(pids) == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not die", pids)
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		s.reap()
	}
	for _, socket := range shimSockets(s.dir) {
		_ = os.Remove(socket)
	}
	return errors.Join(unmountBelow(string(s.dir)), removeCgroups(s.dir.cgroupParent()),
		os.RemoveAll(string(s.dir)))
}

// shimSockets returns the sockets of the shims that were not told to stop: containerd keeps them,
// for all its instances, in /run/containerd/s. The file that names a socket is containerd 1's or
// 2's.
func shimSockets(dir hostDir) (sockets []string) {
	bundles, _ := filepath.Glob(dir.containerdState() + "/io.containerd.runtime.v2.task/moby/*")
	for _, bundle := range bundles {
		var boot struct{ Address string }
		if b, err := os.ReadFile(filepath.Join(bundle, "address")); err == nil {
			boot.Address = strings.TrimSpace(string(b))
		} else if b,
			err := os.ReadFile(filepath.Join(bundle, "bootstrap.json")); err != nil ||
			json.Unmarshal(b, &boot) != nil {
			continue
		}
		sockets = append(sockets, strings.TrimPrefix(boot.Address, "unix://"))
	}
	return sockets
}

// descendants returns all processes below pid, zombies included.
func descendants(pid int) []int {
	children := map[int][]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range stats {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		// proc_pid_stat(5): "pid (comm) state ppid …", and comm may hold anything.
		rest := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(rest) < 2 {
			continue
		}
		child, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		parent, _ := strconv.Atoi(rest[1])
		children[parent] = append(children[parent], child)
	}
	var all []int
	for next := children[pid]; len(next) > 0; {
		child := next[0]
		all = append(all, child)
		next = append(next[1:], children[child]...)
	}
	return all
}

func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	lines := strings.Split(string(b), "\n")
	slices.Reverse(lines) // what was mounted last, first
	for _, line := range lines {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", f[4], err))
			}
		}
	}
	return errors.Join(errs...)
}

// removeCgroups removes the cgroup parent and all below it from every hierarchy.
func removeCgroups(parent string) error {
	roots, _ := filepath.Glob("/sys/fs/cgroup/*" + parent) // v1
	roots = append(roots, "/sys/fs/cgroup"+parent)         // v2
	var errs []error
	for _, root := range roots {
		var dirs []string
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, dir := range dirs {
			// The last process's exit reaches the cgroup a moment after its parent.
			for try := 0; ; try++ {
				err := unix.Rmdir(dir)
				if err == nil || errors.Is(err, unix.ENOENT) {
					break
				}
				if try == 100 {
					errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir,
						err))
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	}
	return errors.Join(errs...)
}
