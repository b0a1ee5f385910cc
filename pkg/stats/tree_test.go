package stats

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"metad/internal/expect"
	"metad/pkg/task"
)

// tree is a host's files as the cgroup source reads them.
type tree struct {
	t   testing.TB
	dir string
	v2  bool
}

func newTree(t testing.TB, v2 bool) *tree {
	tr := &tree{t: t, dir: t.TempDir(), v2: v2}
	tr.write("proc/meminfo", "MemTotal:        8000000 kB\nMemFree:         1000 kB\n")
	tr.write("proc/stat",
		"cpu  100 200 300 400 500 600 700 800 900 1000\ncpu0 1 1 1 1 1 1 1 1 1 1\ncpu1 "+
			"1 1 1 1 1 1 1 1 1 1\nintr 1 2 3\n")
	tr.write("proc/1/cgroup", "0::/init.scope\n")
	if v2 {
		tr.write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
	} else {
		// Hybrid: an empty v2 tree beside the controllers.
		tr.write("sys/fs/cgroup/unified/cgroup.controllers", "\n")
		tr.write("sys/fs/cgroup/cpuacct/cpuacct.usage", "1\n")
	}
	return tr
}

func (tr *tree) write(name, data string) {
	tr.t.Helper()
	writeFile(tr.t, filepath.Join(tr.dir, name), []byte(data))
}

// id returns the id of container n.
func (tr *tree) id(n int) string { return fmt.Sprintf("%064x", n+1) }

// file returns where a file of container n's cgroup is.
func (tr *tree) file(n int, name string) string {
	if tr.v2 {
		return filepath.Join("sys/fs/cgroup/system.slice/docker-"+tr.id(n)+".scope", name)
	}
	controller, _, _ := strings.Cut(name, ".")
	return filepath.Join("sys/fs/cgroup", controller, "docker", tr.id(n), name)
}

const netDev = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
`

// add makes a container with id n as process 1000+n, whose counters are made of n.
func (tr *tree) add(n int) *task.Container {
	pid := 1000 + n
	var membership strings.Builder
	if tr.v2 {
		fmt.Fprintf(&membership, "0::/system.slice/docker-%s.scope/a cgroup of its own\n",
			tr.id(n))
	} else {
		for i, c := range []string{"name=systemd", "pids", "blkio", "memory", "cpu,cpuacct",
			""} {
			fmt.Fprintf(&membership, "%d:%s:/docker/%s\n", i, c, tr.id(n))
		}
	}
	tr.write(fmt.Sprintf("proc/%d/cgroup", pid), membership.String())
	tr.write(fmt.Sprintf("proc/%d/net/dev", pid), netDev+
		"    lo:       0       0    0    0    0     0          0         0        0     "+
		"  0    0    0    0     0       0          0\n"+
		fmt.Sprintf(
			"  eth0: %d      20    3    4    0     0          0         0   %d      "+
				"60    7    8    0     0       0          0\n", 100+n, 500+n))
	tr.write(fmt.Sprintf("proc/%d/ns/net", pid),
		`[{"Name":"lo","Kind":"device","Loopback":true},{"Name":"eth0","Kind":"veth"}]`)
	files := map[string]string{
		"memory.stat": memoryStat(tr.v2, n), "pids.current": "3\n", "pids.max": "max\n", "cpu.stat": "nr_periods 5\nnr_throttled 2\nthrottled_time 123456\n",
	}
	if tr.v2 {
		files["cgroup.controllers"] = "cpuset cpu io memory hugetlb pids\n"
		files["cpu.stat"] = fmt.Sprintf(
			"usage_usec %d\nuser_usec 600\nsystem_usec 400\nnr_periods "+
				"5\nnr_throttled 2\nthrottled_usec 123\n", 1000+n)
		files["memory.current"], files["memory.max"] = fmt.Sprintf("%d\n", 4096*(n+1)),
			"max\n"
		files["memory.events"] = "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\n"
		files["io.stat"] = fmt.Sprintf(
			"8:0 rbytes=%d wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n", 4096+n)
		files["cgroup.procs"] = fmt.Sprintf("%d\n", pid)
	} else {
		files["cpuacct.usage_percpu"] = fmt.Sprintf("%d 1000000 \n", 1000000+n)
		files["cpuacct.stat"] = "user 12\nsystem 34\n"
		files["memory.usage_in_bytes"], files["memory.max_usage_in_bytes"] = fmt.Sprintf(
			"%d\n", 4096*(n+1)), "9000000\n"
		files["memory.failcnt"], files["memory.limit_in_bytes"] = "2\n",
			"9223372036854771712\n"
		files["memory.oom_control"] = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"
		files["blkio.throttle.io_service_bytes"] = fmt.Sprintf(
			"8:0 Read %d\n8:0 Write 8192\n8:0 Sync 0\n8:0 Async 0\n8:0 Discard "+
				"0\n8:0 Total 12288\nTotal 12288\n", 4096+n)
		files["blkio.throttle.io_serviced"] = "8:0 Read 1\n8:0 Write 2\n8:0 Sync 0\n8:0 " +
			"Async 0\n8:0 Discard 0\n8:0 Total 3\nTotal 3\n"
		for _, c := range []string{"cpuacct", "cpu", "memory", "blkio", "pids"} {
			tr.write(filepath.Dir(tr.file(n, c+".x"))+"/cgroup.procs",
				fmt.Sprintf("%d\n", pid))
		}
	}
	for name, data := range files {
		tr.write(tr.file(n, name), data)
	}
	return &task.Container{ID: tr.id(n), DockerName: fmt.Sprintf("c%d", n), PID: pid,
		NetworkMode: "bridge", Stats: new(task.StatsCell)}
}

// memoryStat returns a memory.stat in which every key has another value, among keys that are not
// shown.
func memoryStat(v2 bool, n int) string {
	keys := memoryKeysV1
	if v2 {
		keys = memoryKeysV2
	}
	var b strings.Builder
	for i, k := range keys {
		fmt.Fprintf(&b, "%s %d\nunshown_%d 9\n", k, n+i+1, i)
	}
	return b.String()
}

func versions(t *testing.T, f func(t *testing.T, tr *tree)) {
	for _, v := range []string{"v1", "v2"} {
		t.Run(v, func(t *testing.T) { f(t, newTree(t, v == "v2")) })
	}
}

func TestVisible(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		cfg := CgroupConfig{CgroupRoot: filepath.Join(tr.dir, "sys/fs/cgroup"),
			ProcRoot: filepath.Join(tr.dir, "proc")}
		if !Visible(cfg) {
			t.Error("got false, want true")
		}
		tr.write("proc/1/cgroup", "0::/../init.scope\n")
		if Visible(cfg) {
			t.Error("in a private cgroup namespace: got true, want false")
		}
		tr.write("proc/1/cgroup", "0::/init.scope\n")
		cfg.CgroupRoot = t.TempDir()
		if Visible(cfg) {
			t.Error("no cgroups: got true, want false")
		}
	})
}

// goldens are the bytes of one sample, complete; S14: id and name with them.
func TestGolden(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		c.DockerName = `web "1"` // cannot be; must not break the document
		src := treeSource(t, tr.dir)
		feed, err := src.Open(aTask(c), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		s, err := feed.Sample(false)
		if err != nil {
			t.Fatal(err)
		}
		s.Read = time.Date(2026, 11, 22, 10, 0, 0, 120_000_000, time.FixedZone("", 3600))
		prev := previous{read: s.Read.Add(-time.Second), cpu: []byte(zeroCPU)}
		got, start, end := appendSample(nil, c.ID, "/"+c.DockerName, s, prev)
		if string(got[start:end]) != string(appendCPU(nil, &s.CPU)) {
			t.Errorf("bounds of cpu_stats: got %s", got[start:end])
		}
		expect.Golden(t, filepath.Join("testdata", "golden-"+filepath.Base(t.Name())+
			".json"), append(got, '\n'))
	})
}

// Each file that is read, damaged in each way: no numbers, counted, and the neighbour unharmed.
func TestDamagedFiles(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		a, b := tr.add(0), tr.add(1)
		src := treeSource(t, tr.dir)
		fa, err := src.Open(aTask(a), a, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer fa.Close()
		fb, err := src.Open(aTask(b), b, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer fb.Close()
		neighbour := string(render(t, fb, b))
		read := 0
		var walk func(string)
		walk = func(dir string) {
			entries, _ := os.ReadDir(filepath.Join(tr.dir, dir))
			for _, e := range entries {
				name := filepath.Join(dir, e.Name())
				if e.IsDir() {
					walk(name)
					continue
				}
				inCgroup := strings.Contains(name, tr.id(0)) &&
					e.Name() != "cgroup.procs" &&
					e.Name() != "cgroup.controllers"
				if !inCgroup && name != fmt.Sprintf("proc/%d/net/dev", a.PID) {
					continue
				}
				read++
				path := filepath.Join(tr.dir, name)
				good, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				try := func(how string, break_ func() error, want error) {
					t.Helper()
					if e.Name() == "memory.oom_control" {
						want = nil // no sample is worth less without it
					}
					if err := break_(); err != nil {
						t.Fatal(err)
					}
					defer func() {
						_ = os.RemoveAll(path)
						writeFile(t, path, good)
					}()
					for range 2 { // the second time without the file kept open
						// the rare numbers are due: each file is read
						fa.(*cgroupFeed).rare.at = time.Time{}
						if _, err := fa.Sample(true); !errors.Is(err,
							want) {
							t.Errorf("%s %s: got error %v, want %v",
								e.Name(), how, err, want)
						}
					}
					if got := withoutRead(
						string(render(t, fb, b))); got != withoutRead(
						neighbour) {
						t.Errorf("%s %s: the neighbour has\n%s\nwant\n%s",
							e.Name(), how, got, neighbour)
					}
				}
				set := func(data string) func() error {
					return func() error {
						return os.WriteFile(path, []byte(data), 0o644)
					}
				}
				if e.Name() != "io.stat" { // is empty while there was no I/O
					try("empty", set(""), errDamaged)
				}
				try("garbage", set("\x00\xff garbage\nmore of it"), errDamaged)
				try("a line cut off", set(string(good[:len(good)-1])), errDamaged)
				try("a number too large",
					set(strings.NewReplacer(" ", " 99999999999999999999999",
						"=", "=99999999999999999999999",
						"max\n", "99999999999999999999999\n").Replace(
						"0 "+string(good))), errDamaged)
				try("huge", set(strings.Repeat("0", maxFileBytes+10)), errDamaged)
				missing := errDamaged
				if e.Name() == "dev" {
					// a process without its network files has ended
					missing = errGone
				}
				// an open file is there as long as its cgroup
				fa.(*cgroupFeed).cool()
				try("missing", func() error { return os.Remove(path) }, missing)
				fa.(*cgroupFeed).cool()
				try("a directory", func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o755)) }, missing)
			}
		}
		walk("")
		if want := map[bool]int{false: 14, true: 9}[tr.v2]; read != want {
			t.Errorf("damaged %d files, want %d", read, want)
		}
		if _, err := fa.Sample(true); err != nil {
			t.Errorf("mended: %v", err)
		}
	})
}

func withoutRead(doc string) string {
	_, rest, _ := strings.Cut(doc, `"preread"`)
	return rest
}

// A cgroup that is removed while it is read is the end of the container, not damage.
func TestRemovedCgroupIsGone(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		src := treeSource(t, tr.dir)
		feed, err := src.Open(aTask(c), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		for _, controller := range controllersV1 {
			if err := os.RemoveAll(filepath.Dir(filepath.Join(tr.dir,
				tr.file(0, controller+".x")))); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := feed.Sample(false); !errors.Is(err, errGone) {
			t.Errorf("got %v, want gone", err)
		}
		// Another container takes the same process number: the feed does not turn into its.
		other := tr.add(1)
		for _, name := range []string{"cgroup", "net/dev"} {
			b, err := os.ReadFile(filepath.Join(tr.dir,
				fmt.Sprintf("proc/%d", other.PID), name))
			if err != nil {
				t.Fatal(err)
			}
			tr.write(fmt.Sprintf("proc/%d/%s", c.PID, name), string(b))
		}
		if _, err := feed.Sample(false); !errors.Is(err, errNotOurs) {
			t.Errorf("its process number is another container's: got %v, want %v", err,
				errNotOurs)
		}
	})
}

// The process number that Docker reported belongs to another container by now, or to none.
func TestProcessNumberUsedAgain(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		a, b := tr.add(0), tr.add(1)
		a.PID = b.PID
		src := treeSource(t, tr.dir)
		if _, err := src.Open(aTask(a), a, nil); !errors.Is(err, errNotOurs) {
			t.Errorf("another container's: got %v, want %v", err, errNotOurs)
		}
		tr.write("proc/77/net/dev", netDev)
		tr.write("proc/77/cgroup",
			"9:memory:/\n3:cpu,cpuacct:/user.slice\n0::/user.slice\n")
		a.PID = 77
		if _, err := src.Open(aTask(a), a, nil); !errors.Is(err, errNotOurs) {
			t.Errorf("no container's: got %v, want %v", err, errNotOurs)
		}
		a.PID = 78
		if _, err := src.Open(aTask(a), a, nil); !errors.Is(err, errGone) {
			t.Errorf("nobody's: got %v, want gone", err)
		}
	})
}

// A controller that is not mounted or not enabled leaves its part out, as in the Engine's answer.
func TestControllersMissing(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		if tr.v2 {
			tr.write(tr.file(0, "cgroup.controllers"), "cpu\n")
		} else {
			tr.write("proc/1000/cgroup", "1:cpu,cpuacct:/docker/"+tr.id(0)+"\n")
		}
		feed, err := treeSource(t, tr.dir).Open(aTask(c), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		doc := string(render(t, feed, c))
		for _, part := range []string{`"pids_stats":{}`,
			`"io_service_bytes_recursive":null`, `"memory_stats":{}`} {
			if !strings.Contains(doc, part) {
				t.Errorf("want %s in %s", part, doc)
			}
		}
	})
}

func networks(t *testing.T, feed Feed) (names []string) {
	t.Helper()
	s, err := feed.Sample(false)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Networks {
		names = append(names, fmt.Sprintf("%s=%d", n.Name, n.RxBytes))
	}
	return names
}

// S15: in an awsvpc task every container has the counters of the task's eth0, and none of ecs-eth0.
func TestNetworksOfAnAWSVPCTask(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c, pause := tr.add(0), tr.add(1)
		pause.Type, pause.NetworkMode = task.TypeCNIPause, "none"
		c.NetworkMode = "container:" + pause.ID
		tr.write("proc/1001/net/dev", netDev+
			"    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n"+
			"ecs-eth0: 2 2 0 0 0 0 0 0 2 2 0 0 0 0 0 0\n"+
			"  sit0: 3 3 0 0 0 0 0 0 2 2 0 0 0 0 0 0\n"+
			"  eth0: 4294967296000 4 0 0 0 0 0 0 4 4 0 0 0 0 0 0\n"+
			"eth0.5: 6 4 0 0 0 0 0 0 4 4 0 0 0 0 0 0\n")
		tr.write("proc/1001/ns/net",
			`[{"Name":"lo","Kind":"device","Loopback":true},{"Name":"ecs-eth0","Kind":"veth"},
			{"Name":"sit0","Kind":"sit"},{"Name":"eth0","Kind":"device"},{"Name":"eth0.5","Kind":"vlan"}]`)
		src := treeSource(t, tr.dir)
		for _, c := range []*task.Container{c, pause} {
			feed, err := src.Open(aTask(c, pause), c, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer feed.Close()
			if got, want := fmt.Sprint(networks(t, feed)),
				"[eth0=4294967296000 eth0.5=6]"; got != want {
				t.Errorf("%s: got %s, want %s", c.DockerName, got, want)
			}
		}
	})
}

// Service Connect in bridge mode has a pause container for each container: each has its own
// counters.
func TestNetworksOfServiceConnect(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		a, pauseA, b, pauseB := tr.add(0), tr.add(1), tr.add(2), tr.add(3)
		pauseA.Type, pauseB.Type = task.TypeCNIPause, task.TypeCNIPause
		for _, pair := range [][2]*task.Container{{a, pauseA}, {b, pauseB}} {
			pair[0].NetworkMode = "container:" + pair[1].ID
			dev, err := os.ReadFile(filepath.Join(tr.dir, fmt.Sprintf("proc/%d/net/dev",
				pair[1].PID)))
			if err != nil {
				t.Fatal(err)
			}
			// they share a namespace
			tr.write(fmt.Sprintf("proc/%d/net/dev", pair[0].PID), string(dev))
		}
		src := treeSource(t, tr.dir)
		for c, want := range map[*task.Container]string{a: "[eth0=101]",
			pauseA: "[eth0=101]", b: "[eth0=103]", pauseB: "[eth0=103]"} {
			feed, err := src.Open(aTask(pauseA, pauseB, a, b), c, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer feed.Close()
			if got := fmt.Sprint(networks(t, feed)); got != want {
				t.Errorf("%s: got %s, want %s", c.DockerName, got, want)
			}
		}
	})
}

// A kernel that lists interfaces slowly delays only the containers that wait for theirs, and only
// a few lists run at a time.
func TestListingHoldsUpNobodyElse(t *testing.T) {
	tr := newTree(t, true)
	src := treeSource(t, tr.dir)
	var busy, most atomic.Int32
	release := make(chan struct{})
	list := src.net.links
	src.net.start = func(f func()) { go f() }
	src.net.links = func(fd int) ([]Link, error) {
		most.Store(max(most.Load(), busy.Add(1)))
		defer busy.Add(-1)
		<-release
		return list(fd)
	}
	s := New(Config{}, src)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { s.Run(ctx) })
	defer running.Wait()
	defer cancel()
	var waiting []*task.Container
	for n := range 3 * maxListing {
		waiting = append(waiting, tr.add(n))
	}
	s.Apply([]*task.Task{aTask(waiting...)})
	for busy.Load() < maxListing {
		runtime.Gosched()
	}
	host := tr.add(100)
	host.NetworkMode = "host"
	s.Apply([]*task.Task{aTask(append(waiting, host)...)}) // does not wait
	for host.Stats.Load() == nil {
		runtime.Gosched()
	}
	for _, c := range waiting {
		if got := c.Stats.Load(); got != nil {
			t.Errorf("got %s before the interfaces were known", got.JSON)
		}
	}
	close(release)
	for _, c := range waiting {
		for c.Stats.Load() == nil {
			runtime.Gosched()
		}
		if got := string(c.Stats.Load().JSON); !strings.Contains(got, `"eth0"`) {
			t.Errorf("got %s, want eth0", got)
		}
	}
	if most.Load() > maxListing {
		t.Errorf("%d listed at a time, want %d", most.Load(), maxListing)
	}
}

func TestNetworksOfDocker(t *testing.T) {
	tr := newTree(t, true)
	c := tr.add(0)
	src := treeSource(t, tr.dir)
	feed, err := src.Open(aTask(c), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	want := func(names string) {
		t.Helper()
		if got := fmt.Sprint(networks(t, feed)); got != names {
			t.Errorf("got %s, want %s", got, names)
		}
	}
	want("[eth0=100]")
	// docker network connect, and what the container makes for itself
	line := ": 7 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n"
	tr.write("proc/1000/net/dev", netDev+"eth0"+line+"wg0"+line+"eth10"+line+"eth1"+line+"a:b"+
		line)
	tr.write("proc/1000/ns/net",
		`[{"Name":"eth0","Kind":"veth"},{"Name":"wg0","Kind":"wireguard"},{"Name":"eth10","Kind":"macvlan"},
		{"Name":"eth1","Kind":"veth"},{"Name":"a:b","Kind":"veth"}]`)
	want("[a:b=7 eth0=7 eth1=7 eth10=7]")
	// docker network disconnect
	tr.write("proc/1000/net/dev", netDev)
	want("[]")

	host := tr.add(1)
	host.NetworkMode = "host"
	if feed, err = src.Open(aTask(host), host, nil); err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	want("[]")

	// A container joined to one in the host's namespace.
	joined := tr.add(3)
	for _, pid := range []string{"1", "1003"} {
		path := filepath.Join(tr.dir, "proc", pid, "ns/net")
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.RemoveAll(path),
			os.Symlink("net:[4026531840]", path)); err != nil {
			t.Fatal(err)
		}
	}
	joined.NetworkMode = "container:" + host.ID
	if feed, err = treeSource(t, tr.dir).Open(aTask(joined), joined, nil); err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	want("[]")

	// No right to look into the namespace: the usual names.
	src.net.links = func(int) ([]Link, error) { return nil, errors.New("not permitted") }
	other := tr.add(2)
	tr.write("proc/1002/net/dev", netDev+"lo"+line+"eth0"+line+"ecs-eth0"+line)
	if feed, err = src.Open(aTask(other), other, nil); err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	want("[eth0=7]")
}

// S18: a reading allocates nothing; what is allocated per sample is the sample.
func TestSampleAllocs(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		s := New(Config{}, treeSource(t, tr.dir))
		s.Apply([]*task.Task{aTask(c)})
		defer s.stop()
		e := s.entries[c.ID]
		sample := func() {
			if err := s.sample(e); err != nil {
				t.Fatal(err)
			}
		}
		sample()
		// the host's own file is opened by os
		s.sources[0].(*CgroupSource).system.at = time.Now().Add(time.Hour)
		if n := testing.AllocsPerRun(100, sample); n != 2 {
			t.Errorf("got %v allocations per sample, want 2: the sample and its bytes",
				n)
		}
		now := time.Now().UnixNano()
		if n := testing.AllocsPerRun(100,
			func() { c.Stats.Ask(now); _ = c.Stats.Load() }); n != 0 {
			t.Errorf("got %v allocations per reader, want 0", n)
		}
	})
}

// Numbers above 32 and 53 bits come out as they went in.
func TestLargeCounters(t *testing.T) {
	tr := newTree(t, false)
	c := tr.add(0)
	tr.write(tr.file(0, "cpuacct.usage_percpu"), "18446744073709551614 1 \n")
	tr.write(tr.file(0, "memory.max_usage_in_bytes"), strconv.FormatUint(1<<63+1, 10)+"\n")
	feed, err := treeSource(t, tr.dir).Open(aTask(c), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer feed.Close()
	doc := string(render(t, feed, c))
	for _, part := range []string{`"total_usage":18446744073709551615,`,
		`"max_usage":9223372036854775809,`} {
		if !strings.Contains(doc, part) {
			t.Errorf("want %s in %s", part, doc)
		}
	}
}
