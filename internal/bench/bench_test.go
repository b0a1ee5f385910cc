//go:build bench

// Package bench measures metad from outside, as a ratio to a floor in the same run. It prints the
// figures, and no test in it fails because metad is slow.
//
//	make bench
package bench

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"metad/internal/testnet"
	"metad/pkg/task"
)

// The test binary is also each of the processes that the bench needs.
const roleVar = "METAD_BENCH_ROLE"

func TestMain(m *testing.M) {
	var err error
	switch role := os.Getenv(roleVar); role {
	case "":
		os.Exit(m.Run())
	case "metad":
		err = metadRole()
	case "floor":
		err = floorRole()
	case "client":
		err = clientRole()
	case "slow":
		err = slowRole()
	case "attack":
		err = attackRole()
	case "bystander":
		err = bystanderRole()
	case "sink":
		err = sinkRole()
	case "source":
		err = sourceRole()
	default:
		err = fmt.Errorf("unknown role %q", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Getenv(roleVar)+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child is one of those processes: commands go in, a line of JSON comes out for each.
type child struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start starts a role in the namespace of in, pinned to a CPU.
func start(t testing.TB, role string, in interface {
	In(func() error) error
}, cpu int, config any) *child {
	t.Helper()
	arg, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: exec.Command("taskset", "-c", strconv.Itoa(cpu%runtime.NumCPU()),
		self, string(arg))}
	c.cmd.Env = append(os.Environ(), roleVar+"="+role, "GOMAXPROCS=1")
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := in.In(c.cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.in.Close() // a child ends with its input
		_ = c.cmd.Wait()
	})
	return c
}

// do sends a command and reads the answer into into.
func (c *child) do(command string, into any) {
	c.t.Helper()
	if command != "" {
		fmt.Fprintln(c.in, command)
	}
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		c.t.Fatalf("child: %v", err)
	}
	if err := json.Unmarshal(line, into); err != nil {
		c.t.Fatalf("child: %v: %s", err, line)
	}
}

// cpuTime is the CPU time of the process so far, in nanoseconds.
func (c *child) cpuTime() time.Duration {
	c.t.Helper()
	var ts unix.Timespec
	// CPUCLOCK_SCHED of the whole process: include/linux/posix-timers.h
	clock := int32(^uint32(c.cmd.Process.Pid)<<3 | 2)
	if err := unix.ClockGettime(clock, &ts); err != nil {
		c.t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// systemTime is what all CPUs have spent in the kernel, interrupts included.
func systemTime(t testing.TB) time.Duration {
	t.Helper()
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line) // cpu user nice system idle iowait irq softirq
	var ticks int64
	for _, i := range []int{3, 6, 7} {
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

// commands reads commands until the input ends, and prints f's answer to each.
func commands(f func(string) (any, error)) error {
	sc := bufio.NewScanner(os.Stdin)
	for sc.Scan() {
		v, err := f(sc.Text())
		if err != nil {
			return err
		}
		if err := json.NewEncoder(os.Stdout).Encode(v); err != nil {
			return err
		}
	}
	return sc.Err()
}

func config(into any) error { return json.Unmarshal([]byte(os.Args[1]), into) }

// sampleJSON is as long as a real sample of v4 with one network (cgroup v1).
var sampleJSON = `{"read":"` + strings.Repeat("x", 2389) + `"}`

// ns makes a namespace handle something to start a child in.
type ns struct{ in func(func() error) error }

func (n ns) In(f func() error) error { return n.in(f) }

func hostOf(h *testnet.Host) ns {
	return ns{func(f func() error) error {
		return testnet.In(h.NS, f)
	}}
}
func taskOf(k *testnet.Task) ns {
	return ns{func(f func() error) error {
		return testnet.In(k.NS, f)
	}}
}

// ground is a host with a bridge and two tasks, and metad ready to be armed.
type ground struct {
	t      testing.TB
	host   *testnet.Host
	bridge *testnet.Bridge
	tasks  []*testnet.Task
	cfg    metadConfig
	metad  *child
}

func newGround(t testing.TB) *ground {
	t.Helper()
	g := newHost(t)
	g.startMetad()
	return g
}

// startMetad starts metad, or another one after stopMetad.
func (g *ground) startMetad() { g.metad = start(g.t, "metad", hostOf(g.host), 0, g.cfg) }

func (g *ground) stopMetad() {
	g.metad.in.Close()
	_ = g.metad.cmd.Wait() // the pipe's end is its end
}

func newHost(t testing.TB) *ground {
	t.Helper()
	g := &ground{t: t, host: testnet.NewHost(t), cfg: metadConfig{PinDir: testnet.PinDir(t)}}
	br := g.host.AddBridge("ecs-bridge", "169.254.172.1/22")
	g.bridge = br
	for i := range 2 {
		k := br.AddTask("")
		g.tasks = append(g.tasks, k)
		g.cfg.Tasks = append(g.cfg.Tasks, exampleTask(i, k))
	}
	return g
}

// exampleTask has a document of usual length: two containers, the agent's labels.
func exampleTask(i int, k *testnet.Task) *task.Task {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	t := &task.Task{
		ID:      fmt.Sprintf("task-%d", i),
		ARN:     fmt.Sprintf("arn:aws:ecs:us-west-2:111122223333:task/default/task-%d", i),
		Cluster: "default", Family: "web", Revision: "7", DesiredStatus: task.StatusRunning,
		KnownStatus: task.StatusRunning,
		Endpoints:   []task.Endpoint{{Addr: k.Addr, Ifindex: k.Ifindex, MAC: k.MAC}},
	}
	for _, name := range []string{"app", task.PauseName} {
		t.Containers = append(t.Containers, &task.Container{
			ID: strings.Repeat(fmt.Sprintf("%x", len(t.Containers)+1), 64), Name: name,
			DockerName: "ecs-web-7-" + name, Image: "nginx:1",
			ImageID:       "sha256:" + strings.Repeat("a", 64),
			DesiredStatus: task.StatusRunning, KnownStatus: task.StatusRunning,
			Labels: map[string]string{task.LabelTaskARN: t.ARN,
				task.LabelCluster: "default", task.LabelContainerName: name,
				task.LabelFamily: "web", task.LabelRevision: "7"},
			CreatedAt: at, StartedAt: at, Type: task.TypeNormal,
			Limits: task.ContainerLimits{CPU: 2, Memory: 512}, PID: 1,
			Networks: []task.Network{{Mode: "awsvpc",
				IPv4Addresses: []string{"10.0.0.7"}}},
		})
	}
	return t
}

func (g *ground) set(command string) {
	var s string
	g.metad.do(command, &s)
}

// median of what f takes from each.
func median[T any, N cmp.Ordered](from []T, f func(T) N) N {
	v := make([]N, len(from))
	for i := range from {
		v[i] = f(from[i])
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// TestBenchRequests compares the request path with the floor: the same fasthttp with fixed bytes of
// the same length, reached as the agent is, by an iptables DNAT rule with connection tracking.
func TestBenchRequests(t *testing.T) {
	const rounds, seconds = 7, 2
	g := newGround(t)
	whole, _ := task.Render(g.cfg.Tasks[0])
	lengths := map[string]int{"/v2/metadata": whole[task.V2].Len(),
		"/v4/task": whole[task.V4].Len()}
	for _, c := range g.cfg.Tasks[0].Containers {
		lengths["/v4/task/stats"] += len(`,"":`) + len(c.ID) + len(sampleJSON)
	}
	lengths["/v4/task/stats"]++ // two braces and a comma less
	floor := start(t, "floor", hostOf(g.host), 0, floorConfig{Addr: "127.0.0.1:51679",
		Lengths: lengths})
	rule := exec.Command("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d",
		"169.254.170.2", "--dport", "80",
		"-j", "DNAT", "--to-destination", "127.0.0.1:51679")
	if err := testnet.In(g.host.NS, rule.Run); err != nil {
		t.Fatalf("iptables: %v", err)
	}
	client := start(t, "client", taskOf(g.tasks[0]), 1, nil)

	type result struct {
		rps            float64
		server, system time.Duration // per request
		p50            time.Duration
	}
	measure := func(s *child, l load) result {
		cpu0, sys0 := s.cpuTime(), systemTime(t)
		command, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		client.do(string(command), &l)
		if l.Requests == 0 || l.Errors > 0 {
			t.Fatalf("client: %+v", l)
		}
		n := time.Duration(l.Requests)
		return result{float64(l.Requests) / l.Elapsed.Seconds(), (s.cpuTime() - cpu0) / n,
			(systemTime(t) - sys0) / n, l.P50}
	}
	fmt.Printf("\nmedians of %d interleaved runs of %d s; metad by redirect against as many "+
		"fixed bytes by DNAT\n", rounds, seconds)
	fmt.Printf("%-56s %12s %12s %18s %18s %12s\n", "", "requests/s", "ratio",
		"system CPU ratio", "server CPU ratio", "p50 ratio")
	for _, l := range []load{
		{Conns: 64, KeepAlive: true, Seconds: seconds, Path: "/v2/metadata"},
		{Conns: 64, KeepAlive: false, Seconds: seconds, Path: "/v2/metadata"},
		{Conns: 64, KeepAlive: true, Seconds: seconds, Path: "/v4/task"},
		{Conns: 64, KeepAlive: true, Seconds: seconds, Path: "/v4/task/stats"},
	} {
		var ours, theirs []result
		g.set("arm")
		if _, body, err := g.tasks[0].Get(l.Path, 5*time.Second); err != nil ||
			len(body) != lengths[l.Path] {
			t.Fatalf("%s: %d bytes, %v; the floor's answer has %d", l.Path, len(body),
				err, lengths[l.Path])
		}
		for range rounds {
			g.set("arm")
			ours = append(ours, measure(g.metad, l))
			g.set("disarm")
			theirs = append(theirs, measure(floor, l))
		}
		name := "64 keep-alive connections"
		if !l.KeepAlive {
			name = "a connection per request"
		}
		name += fmt.Sprintf(", %s, %d B", l.Path, lengths[l.Path])
		ratio := func(f func(result) float64) float64 {
			return median(ours, f) / median(theirs, f)
		}
		fmt.Printf("%-56s %12.0f %12.2f %18.2f %18.2f %12.2f\n", name,
			median(ours, func(r result) float64 { return r.rps }),
			ratio(func(r result) float64 { return r.rps }),
			ratio(func(r result) float64 { return float64(r.system) }),
			ratio(func(r result) float64 { return float64(r.server) }),
			ratio(func(r result) float64 { return float64(r.p50) }))
	}
}

// TestBenchSlowNeighbour measures what 1,000 connections that send a byte a second do to another
// task.
func TestBenchSlowNeighbour(t *testing.T) {
	const rounds, slow = 5, 1000
	g := newGround(t)
	g.set("arm")
	client := start(t, "client", taskOf(g.tasks[0]), 1, nil)
	run := func() (ls []load) {
		for range rounds {
			l := load{Conns: 4, KeepAlive: true, Seconds: 2, Path: "/v2/metadata"}
			command, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			client.do(string(command), &l)
			if l.Errors > 0 {
				t.Errorf("the other task saw %d errors", l.Errors)
			}
			ls = append(ls, l)
		}
		return ls
	}
	var before, during, after int
	run()
	g.metad.do("rss", &before)
	quiet := run()
	attacker := start(t, "slow", taskOf(g.tasks[1]), 1, nil)
	var n int
	attacker.do(strconv.Itoa(slow), &n)
	loud := run()
	g.metad.do("rss", &during)
	if err := attacker.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// longer than any time-out of the server, and than its workers idle
	time.Sleep(15 * time.Second)
	g.metad.do("rss", &after)
	p99 := func(l load) time.Duration { return l.P99 }
	fmt.Printf("\n%d connections of a neighbour, a byte a second each: p99 of another task "+
		"× %.2f (%v → %v); memory %d → %d → %d KiB afterwards\n", slow,
		float64(median(loud, p99))/float64(median(quiet, p99)), median(quiet, p99),
		median(loud, p99), before>>10, during>>10, after>>10)
}

// TestBenchBulk measures what the programs cost the traffic that is not theirs: bulk TCP between
// two containers, with metad attached and armed against without.
func TestBenchBulk(t *testing.T) {
	const rounds, seconds, settle = 12, 1.5, 300 * time.Millisecond
	g := newHost(t)
	var listens string
	start(t, "sink", taskOf(g.tasks[1]), 0, nil).do("ready", &listens)
	source := start(t, "source", taskOf(g.tasks[0]), 1, nil)
	command := fmt.Sprintf("%s:9000 %v", g.tasks[1].Addr, seconds)
	var with, without []float64
	for i := range rounds + 1 {
		var a, b float64
		both := []func(){
			func() { source.do(command, &a) },
			func() {
				g.startMetad()
				g.set("arm")
				time.Sleep(settle)
				source.do(command, &b)
				g.stopMetad()
				time.Sleep(settle)
			},
		}
		if i%2 == 1 { // what else goes on meets the one as often as the other
			slices.Reverse(both)
		}
		for _, run := range both {
			run()
		}
		if i > 0 { // the first is the warm-up
			without, with = append(without, a), append(with, b)
		}
	}
	self := func(v float64) float64 { return v }
	fmt.Printf("\nbulk TCP between two containers, medians of %d interleaved runs: %.1f "+
		"Gbit/s without metad, %.1f with, ratio %.3f\n", rounds,
		median(without, self)*8e-9, median(with, self)*8e-9,
		median(with, self)/median(without, self))
}
