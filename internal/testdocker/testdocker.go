// Package testdocker makes test hosts: a private network namespace with a Docker Engine of its own
// in it. Real containers can be run there without touching the machine's network, its Docker or
// another test's.
//
// A host needs root, dockerd, containerd, runc, iptables and a static busybox (Debian: docker.io,
// iptables, busybox-static). Everything of it is gone after the test, also if the test panics or is
// killed.
package testdocker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/swarm"
	"github.com/docker/docker/client"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host is a network namespace with a Docker Engine in it. Its methods may be called from any
// goroutine that may call FailNow on the test they are given.
//
// The Engine runs with live-restore, on a containerd of its own: containers survive StopDocker and
// KillDocker. Its mount namespace is the machine's, so that every path it reports (a container's
// SandboxKey, a volume) is one the test can open.
type Host struct {
	NS     netns.NsHandle // the network namespace
	Socket string         // the Engine's unix socket
	Dir    string         // everything the host has on disk
	Client *client.Client // to the Engine, API version negotiated

	dir        hostDir
	supervisor *exec.Cmd
	commands   *os.File
	replies    *bufio.Scanner

	mu         sync.Mutex // guards what follows, and the command in flight
	closed     bool
	ecsNetwork bool // ECSNetwork has made it
	lastTask   int  // number of the last address ConnectAWSVPC gave out
}

// Start returns a running host that lives until the test ends.
func Start(t testing.TB) *Host {
	t.Helper()
	return startWith(t, true)
}

// StartMortal is Start with an Engine without live-restore: its containers end with it, and those
// with a restart policy come back with it.
func StartMortal(t testing.TB) *Host {
	t.Helper()
	return startWith(t, false)
}

// StartSwarm is Start with an Engine that is a swarm of one node. Its containers end with it: a
// swarm and live-restore exclude each other.
func StartSwarm(t testing.TB) *Host {
	t.Helper()
	h := startWith(t, false)
	if _, err := h.Client.SwarmInit(context.Background(),
		swarm.InitRequest{ListenAddr: "127.0.0.1:2377",
			AdvertiseAddr: "127.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	return h
}

func startWith(t testing.TB, liveRestore bool) *Host {
	t.Helper()
	h, err := start(liveRestore)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of dockerd's log:\n%s", h.dir.logTail("dockerd"))
		}
		if err := h.close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

var shared struct {
	once sync.Once
	host *Host
	err  error
}

// Shared returns one host for all tests of the package, started at first use: a start costs
// about a second. Containers made by Run and its like still end with their test. The package's
// TestMain must be
//
//	func TestMain(m *testing.M) { os.Exit(testdocker.Main(m)) }
func Shared(t testing.TB) *Host {
	t.Helper()
	shared.once.Do(func() { shared.host, shared.err = start(true) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.host
}

// Main runs the tests and then ends the shared host, if there is one.
func Main(m *testing.M) (code int) {
	code = m.Run()
	if shared.host != nil {
		if err := shared.host.close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	return code
}

func start(liveRestore bool) (h *Host, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a test host needs root")
	}
	dir, err := os.MkdirTemp("", "metad-testdocker-")
	if err != nil {
		return nil, err
	}
	h = &Host{Dir: dir, dir: hostDir(dir), Socket: hostDir(dir).socket(), NS: netns.None()}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start test host: %w", err), h.close())
		}
	}()
	if err := h.writeConfig(liveRestore); err != nil {
		return h, err
	}
	if err := h.startSupervisor(); err != nil {
		return h, err
	}
	// The supervisor was born in the new namespace and has answered, so this is no race.
	if h.NS, err = netns.GetFromPid(h.supervisor.Process.Pid); err != nil {
		return h, fmt.Errorf("open the host's namespace: %w", err)
	}
	h.Client, err = client.NewClientWithOpts(client.WithHost("unix://"+h.Socket),
		client.WithAPIVersionNegotiation())
	if err != nil {
		return h, err
	}
	if err := h.command("start"); err != nil {
		return h, err
	}
	if err := h.waitDocker(); err != nil {
		return h, err
	}
	return h, h.importBusybox()
}

// writeConfig gives dockerd its configuration: NRI where it has it, which is from 29.2 on.
func (h *Host) writeConfig(liveRestore bool) error {
	config := map[string]any{"live-restore": liveRestore}
	dockerd, err := lookDaemon("dockerd")
	if err != nil {
		return err
	}
	help, err := exec.Command(dockerd, "--help").Output()
	if err != nil {
		return fmt.Errorf("dockerd --help: %w", err)
	}
	if bytes.Contains(help, []byte("--nri-opts")) {
		config["nri-opts"] = map[string]any{"enable": true, "socket-path": h.NRISocket()}
	}
	b, err := json.Marshal(config)
	if err != nil {
		return err
	}
	return os.WriteFile(h.dir.dockerdConfig(), b, 0o600)
}

// NRISocket is where the Engine listens for NRI plugins, if it has NRI.
func (h *Host) NRISocket() string { return h.dir.path("nri.sock") }

func (h *Host) startSupervisor() error {
	commandsR, commandsW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer commandsR.Close()
	h.commands = commandsW
	repliesR, repliesW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer repliesW.Close()
	h.replies = bufio.NewScanner(repliesR)
	log, err := os.Create(h.dir.log("supervisor"))
	if err != nil {
		return err
	}
	defer log.Close()
	// Its output must not be the test's: go test waits until nobody holds that any more.
	h.supervisor = &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{supervisorArg0, h.Dir},
		Stdin:      commandsR,
		Stdout:     log,
		Stderr:     log,
		ExtraFiles: []*os.File{repliesW},
		// A session of its own: Ctrl-C ends the test, and the supervisor then cleans up
		// after it.
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Setsid: true},
	}
	if err := h.supervisor.Start(); err != nil {
		h.supervisor = nil
		return fmt.Errorf("start supervisor: %w", err)
	}
	return h.reply()
}

func (h *Host) command(line string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, err := fmt.Fprintln(h.commands, line); err != nil {
		return fmt.Errorf("tell the supervisor to %s: %w", line, err)
	}
	return h.reply()
}

func (h *Host) reply() error {
	if !h.replies.Scan() {
		return fmt.Errorf("the supervisor is gone: %s", h.dir.logTail("supervisor"))
	}
	if text := h.replies.Text(); text != "ok" {
		return errors.New(text)
	}
	return nil
}

func (h *Host) waitDocker() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	for {
		if _, err := h.Client.Ping(ctx); err == nil {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("dockerd does not answer; end of its log:\n%s",
				h.dir.logTail("dockerd"))
		}
	}
}

// close ends the host. What it waits for is the supervisor's end, and that cleans up first.
func (h *Host) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	if h.Client != nil {
		h.Client.Close()
	}
	if h.commands != nil {
		h.commands.Close()
	}
	if h.NS.IsOpen() {
		h.NS.Close()
	}
	if h.supervisor == nil {
		return os.RemoveAll(h.Dir)
	}
	if err := h.supervisor.Wait(); err != nil {
		return fmt.Errorf("end test host: %w: %s", err, h.dir.logTail("supervisor"))
	}
	return nil
}

// StopDocker ends dockerd as an administrator does. Containers go on.
func (h *Host) StopDocker(t testing.TB) {
	t.Helper()
	if err := h.command("stop"); err != nil {
		t.Fatal(err)
	}
}

// KillDocker ends dockerd by SIGKILL. Containers go on.
func (h *Host) KillDocker(t testing.TB) {
	t.Helper()
	if err := h.command("kill"); err != nil {
		t.Fatal(err)
	}
}

// StartDocker starts dockerd again and waits until it answers.
func (h *Host) StartDocker(t testing.TB) {
	t.Helper()
	if err := h.command("start"); err != nil {
		t.Fatal(err)
	}
	if err := h.waitDocker(); err != nil {
		t.Fatal(err)
	}
}

// Command returns a command that will run in the host's network namespace, with the process id that
// Process.Pid says. The caller must wait for it before the test ends.
func (h *Host) Command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + h.NSPath(), "--", name},
		args...)...)
}

// NSPath is a path at which any process can open the host's network namespace while the host lives.
func (h *Host) NSPath() string {
	return fmt.Sprintf("/proc/%d/ns/net", h.supervisor.Process.Pid)
}

// Do runs f on a thread that is in the host's network namespace. f must not start goroutines that
// rely on that, and must not call FailNow.
func (h *Host) Do(f func() error) error { return inNamespace(h.NS, f) }

func inNamespace(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := netns.Set(ns); err != nil {
			done <- fmt.Errorf("enter namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// BundleDir is where containerd keeps the bundles of the host's containers; it exists once one was
// started.
func (h *Host) BundleDir() string {
	return filepath.Join(h.dir.containerdState(), "io.containerd.runtime.v2.task", "moby")
}

// SkipBefore skips the test on an Engine older than release, "25.0".
func (h *Host) SkipBefore(t testing.TB, release string) {
	t.Helper()
	v, err := h.Client.ServerVersion(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var have, want [2]int
	fmt.Sscanf(v.Version, "%d.%d", &have[0], &have[1])
	fmt.Sscanf(release, "%d.%d", &want[0], &want[1])
	if slices.Compare(have[:], want[:]) < 0 {
		t.Skipf("needs Docker Engine %s", release)
	}
}

// Build returns the static program made of the package "metad/…". In METAD_TEST_BIN it is built
// already.
func Build(t testing.TB, pkg string) (file string) {
	t.Helper()
	if dir := os.Getenv("METAD_TEST_BIN"); dir != "" {
		return filepath.Join(dir, path.Base(pkg))
	}
	file = filepath.Join(t.TempDir(), path.Base(pkg))
	build := exec.Command("go", "build", "-o", file, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", pkg, err, out)
	}
	return file
}

// Compose runs Compose in dir against the Engine at a socket and returns its output, standard error
// included. An exit code other than 0 fails the test.
func (h *Host) Compose(t testing.TB, dir, socket string, args ...string) string {
	t.Helper()
	// of Debian: version 1 in bookworm, later 2
	cmd := h.Command("/usr/bin/docker-compose", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+socket,
		"DOCKER_CONFIG="+filepath.Join(h.Dir, "cli"), "DOCKER_CONTEXT=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("docker-compose %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// CLICommand returns the docker command line client, set up to talk to the host's Engine.
func (h *Host) CLICommand(args ...string) *exec.Cmd {
	docker := "/usr/bin/docker" // the distribution's, the one that fits dockerd
	if _, err := os.Stat(docker); err != nil {
		docker = "docker"
	}
	cmd := h.Command(docker, args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+h.Socket,
		"DOCKER_CONFIG="+filepath.Join(h.Dir, "cli"), "DOCKER_CONTEXT=")
	return cmd
}

// CLI runs the docker command line client and returns its output, standard error included. An exit
// code other than 0 fails the test.
func (h *Host) CLI(t testing.TB, args ...string) string {
	t.Helper()
	out, err := h.CLICommand(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("docker %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (d hostDir) logTail(daemon string) string {
	b, err := os.ReadFile(d.log(daemon))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-4000):])
}

// lookDaemon finds a daemon also where an ordinary PATH does not lead.
func lookDaemon(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"} {
		file := filepath.Join(dir, name)
		if fi, err := os.Stat(file); err == nil && fi.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", name)
}

// BlockDevice returns the device that the file system holding path is on.
func BlockDevice(t testing.TB, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev),
		unix.Minor(st.Dev)))
	if err != nil {
		t.Fatalf("Docker's data is on no block device: %v", err)
	}
	return "/dev/" + filepath.Base(link)
}
