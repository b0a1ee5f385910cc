//go:build root

package testdocker

import (
	"bufio"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netns"

	"metad/internal/expect"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

func TestRootRun(t *testing.T) {
	h := Shared(t)
	id := h.Run(t, Container{Env: []string{"A=b"}})
	if got, want := h.Exec(t, id, "sh", "-c", "echo $A; wget 2>&1 | head -1"),
		"b\nBusyBox"; !strings.HasPrefix(got, want) {
		t.Errorf("exec: got %q, want prefix %q", got, want)
	}
	if _, code, err := h.TryExec(id, "sh", "-c", "exit 3"); err != nil || code != 3 {
		t.Errorf("exec of exit 3: got code %d, error %v", code, err)
	}
	if got := strings.TrimSpace(h.CLI(t, "ps", "-q", "--no-trunc")); got != id {
		t.Errorf("docker ps: got %q, want %q", got, id)
	}
	if _, err := os.Stat(h.Inspect(t, id).NetworkSettings.SandboxKey); err != nil {
		t.Errorf("the container's namespace cannot be opened by path: %v", err)
	}
}

func TestRootPrivateNetwork(t *testing.T) {
	h := Shared(t)
	own, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if own.Equal(h.NS) {
		t.Error("the host's network namespace is the test's")
	}
	if out, err := h.Command("ip", "-o", "link", "show",
		"docker0").CombinedOutput(); err != nil {
		t.Errorf("docker0 in the host's namespace: %v: %s", err, out)
	}
	err = h.Do(func() error {
		ns, err := netns.Get()
		if err == nil && !ns.Equal(h.NS) {
			t.Error("Do runs elsewhere")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// N01, N02, N03: the shape of an awsvpc task.
func TestRootRunTask(t *testing.T) {
	h := Shared(t)
	eni := netip.MustParsePrefix("10.9.8.7/24")
	task := h.RunTask(t, Task{ID: "one", ENI: []netip.Prefix{eni},
		Containers: []Container{{Name: "app"}, {Name: "side"}}})
	other := h.RunTask(t, Task{ID: "two", Containers: []Container{{Name: "app"}}})
	for _, id := range task.Containers {
		out := h.Exec(t, id, "ip", "-4", "-o", "addr")
		for _, want := range []string{"inet " + task.Port.Addr.String() + "/22 ",
			"inet 10.9.8.7/24 "} {
			if !strings.Contains(out, want) {
				t.Errorf("addresses: got %q, want %q", out, want)
			}
		}
		lines := strings.Split(strings.TrimSpace(h.Exec(t, id, "sh", "-c",
			"ip route | grep ecs-eth0 | sort")), "\n")
		for i, want := range []string{"169.254.170.2 via 169.254.172.1 dev ecs-eth0",
			"169.254.172.1 via 169.254.172.1 dev ecs-eth0"} {
			if len(lines) != 2 || strings.TrimSpace(lines[i]) != want {
				t.Errorf("routes: got %q, want %q", lines, want)
			}
		}
	}
	if task.Port.Addr == other.Port.Addr || task.Port.Ifindex == other.Port.Ifindex {
		t.Errorf("two tasks at one port: %v", task.Port)
	}
	h.Exec(t, task.Pause, "ping", "-c1", "-w5", "169.254.172.1")
	inNetwork := h.Run(t, Container{Network: h.ECSNetwork(t)})
	if ip := h.Inspect(t,
		inNetwork).NetworkSettings.Networks[ECSBridge].IPAddress; !strings.HasPrefix(ip,
		"169.254.174.") {
		t.Errorf("the Engine hands out %s, which could be a task's", ip)
	}
}

func TestRootContainersSurviveDocker(t *testing.T) {
	h := Start(t)
	id := h.Run(t, Container{})
	pid := h.Inspect(t, id).State.Pid
	h.StopDocker(t)
	h.StartDocker(t)
	if got := h.Inspect(t, id).State.Pid; got != pid {
		t.Errorf("pid after stop and start: got %d, want %d", got, pid)
	}
	h.KillDocker(t)
	h.StartDocker(t)
	if got := h.Inspect(t, id).State.Pid; got != pid {
		t.Errorf("pid after kill and start: got %d, want %d", got, pid)
	}
	h.Exec(t, id, "true")
}

// TestRootNothingLeftAfterKill has a test process killed while its host runs a container.
func TestRootNothingLeftAfterKill(t *testing.T) {
	const role = "METAD_TESTDOCKER_VICTIM"
	if os.Getenv(role) != "" {
		h := Start(t)
		id := h.Run(t, Container{})
		os.Stderr.WriteString("victim " + h.Dir + " " +
			strconv.Itoa(h.Inspect(t, id).State.Pid) + "\n")
		select {}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestRootNothingLeftAfterKill$")
	cmd.Env = append(os.Environ(), role+"=1")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir, pid string
	for sc := bufio.NewScanner(stderr); sc.Scan(); {
		if f := strings.Fields(sc.Text()); len(f) == 3 && f[0] == "victim" {
			dir, pid = f[1], f[2]
			break
		}
	}
	if dir == "" {
		t.Fatal("the victim did not start")
	}
	sockets := shimSockets(hostDir(dir))
	if len(sockets) != 1 {
		t.Errorf("got shim sockets %v, want one", sockets)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	expect.Until(t, dir+" to be removed", func() bool {
		_, err := os.Stat(dir)
		return err != nil
	})
	left := append(sockets, dir, "/proc/"+pid)
	cgroups, _ := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(dir))
	for _, path := range append(left, cgroups...) {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("left: %s", path)
		}
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(b), dir) {
		t.Errorf("mounts left:\n%s", b)
	}
}

func TestRootImageFromBinary(t *testing.T) {
	h := Shared(t)
	h.ImageFromBinary(t, "metad-test-app:1", "/bin/busybox")
	id := h.Run(t, Container{Image: "metad-test-app:1", Cmd: []string{"sleep", "1000"}})
	if got := h.Inspect(t, id).Path; got != "/app" {
		t.Errorf("entrypoint: got %q", got)
	}
}
