//go:build root

package sockdiag_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"metad/bpf"
	"metad/internal/testnet"
	"metad/pkg/docker"
	"metad/pkg/loader"
	"metad/pkg/lookup"
	"metad/pkg/sockdiag"
	"metad/pkg/task"
)

const timeout = 5 * time.Second

var x, y = strings.Repeat("a1", 32), strings.Repeat("b2", 32)

// maker returns the container that made the socket of k's connection c, "" if nobody knows.
func maker(t *testing.T, k *testnet.Task, c net.Conn) string {
	t.Helper()
	path := fmt.Sprintf("/proc/self/fd/%d", int(k.NS))
	local, remote := netip.MustParseAddrPort(c.LocalAddr().String()),
		netip.MustParseAddrPort(c.RemoteAddr().String())
	cgroup, err := sockdiag.Cgroup(path, local, remote)
	if err != nil && !errors.Is(err, sockdiag.ErrUnknown) {
		t.Errorf("socket from %s: %v", local, err)
	}
	return docker.OpenCgroups("/proc", "/sys/fs/cgroup").Container(cgroup)
}

// The socket itself tells which container made it, whether or not anything is known of the
// container's cgroup: also where the process is in a cgroup that the container made, or has handed
// the socket over. A process of no container is nobody's.
func TestRootMaker(t *testing.T) {
	h := testnet.NewHost(t)
	k := h.AddBridge("ecs-bridge", "169.254.172.1/22").AddTask("")
	testnet.Serve(t, h.NS, "169.254.172.1:80", func(net.Conn, *http.Request) string {
		return ""
	})
	c := testnet.NewCgroups(t)
	dial := func(dir string) net.Conn {
		c.Enter(dir)
		conn, err := testnet.Dial(k.NS, "", "169.254.172.1:80", timeout)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	for name, want := range map[string]string{
		x: x, y: y, x + "/inner/leaf": x, "docker-" + y + ".scope/" + x: y, "other": "", "other/" + x: x,
	} {
		dir, _ := c.Add(name)
		if got := maker(t, k, dial(dir)); got != want {
			t.Errorf("made in %s: got %q, want %q", name, got, want)
		}
	}
	inX, _ := c.Add(x)
	inY, _ := c.Add(y)
	conn := dial(inX)
	c.Enter(inY)
	if got := maker(t, k, conn); got != x {
		t.Errorf("a socket that was handed over: got %q, want its maker", got)
	}
	gone, id := c.Add(strings.Repeat("c3", 32))
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}
	if got := docker.OpenCgroups("/proc", "/sys/fs/cgroup").Container(id); got != "" {
		t.Errorf("a cgroup that is gone: got %q", got)
	}
}

// Where a v1 class takes the cgroups away from all sockets of the host (before Linux 5.15), neither
// the mark nor the socket names a container, and no wrong one: a container that alone has its
// address is named by that, and of two that share it none. Later kernels name each as before.
func TestRootNetPrio(t *testing.T) {
	classesTake := !testnet.KernelAtLeast(t, 5, 15)
	if b, err := os.ReadFile("/proc/cgroups"); err != nil || !strings.Contains(string(b),
		"net_prio\t") {
		t.Skip("the kernel has no net_prio")
	}
	// The hierarchy of cgroup v1 outlives the test, and with it containerd has no statistics of
	// containers that begin later; before Linux 5.15 the host would have to be booted again.
	if os.Getenv("METAD_TEST_GUEST") == "" {
		t.Skip("for a guest only: the host would keep the hierarchy")
	}
	h := testnet.NewHost(t)
	b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	alone, shared := b.AddTask(""), b.AddTask("")
	l, err := loader.Open(loader.Config{Netns: h.NS, PinDir: testnet.PinDir(t),
		Log: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer l.Close()
	table := lookup.New(l, zap.NewNop())
	table.NameContainers(l)
	c := testnet.NewCgroups(t)
	dirs := map[string]string{}
	container := func(id, network string) *task.Container {
		dir, cgroup := c.Add(id)
		dirs[id] = dir
		return &task.Container{ID: id, Name: id[:1], KnownStatus: task.StatusRunning,
			NetworkMode: network,
			Cgroup:      task.Cgroup{ID: cgroup, Level: 2}, Stats: &task.StatsCell{}}
	}
	of := func(k *testnet.Task, arn string, cs ...*task.Container) *task.Task {
		ep := task.Endpoint{Addr: k.Addr, Ifindex: k.Ifindex, MAC: k.MAC,
			Container: cs[0].ID}
		return &task.Task{ID: arn, ARN: arn, Containers: cs, Endpoints: []task.Endpoint{ep}}
	}
	z := strings.Repeat("c3", 32)
	if err := table.Apply([]*task.Task{of(alone, "alone", container(z, "")),
		of(shared, "shared", container(x, ""), container(y, "container:"+x))}); err != nil {
		t.Fatal(err)
	}
	serveNames(t, l, table)
	want := func(k *testnet.Task, id, named string) {
		t.Helper()
		c.Enter(dirs[id])
		conn, err := k.Dial(timeout)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, body, err := testnet.GetOn(conn, "/", timeout)
		if err != nil || body != named {
			t.Errorf("%s: got %q, %v, want %q", id[:1], body, err, named)
		}
		if got, bySocket := maker(t, k, conn), strings.HasPrefix(named,
			"mark"); (got == id) != bySocket || got != "" && got != id {
			t.Errorf("%s: the socket says %q", id[:1], got)
		}
	}
	want(alone, z, "mark c")
	want(shared, x, "mark a")
	want(shared, y, "mark b")
	testnet.EnterNetPrio(t)
	if !classesTake {
		want(alone, z, "mark c")
		want(shared, x, "mark a")
		want(shared, y, "mark b")
		return
	}
	want(alone, z, "address c")
	want(shared, x, "nobody")
	want(shared, y, "nobody")
}

// serveNames answers by what the container is named that asks, and its name.
func serveNames(t *testing.T, l *loader.Loader, table *lookup.Table) {
	t.Helper()
	ln, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	testnet.ServeOn(t, ln, func(c net.Conn, _ *http.Request) string {
		tag, err := testnet.Mark(c)
		if err != nil {
			return err.Error()
		}
		addr := netip.MustParseAddrPort(c.RemoteAddr().String()).Addr()
		v := table.Resolve(tag, addr)
		switch {
		case v == nil:
			return "no task"
		case v.Sender(tag, addr) == nil:
			return "nobody"
		case v.Only(addr) != nil && bpf.ContainerNumber(tag) == 0:
			return "address " + v.Sender(tag, addr).Name
		}
		return "mark " + v.Sender(tag, addr).Name
	})
	if err := l.Arm(); err != nil {
		t.Fatal(err)
	}
}
