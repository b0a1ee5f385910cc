package stats

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"metad/pkg/fdbudget"
	"metad/pkg/task"
)

// Killed processes are counted when the limit was hit again, and every ten seconds; where the
// kernel does not tell, no number is shown.
func TestOOMKills(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		feed, err := treeSource(t, tr.dir).Open(aTask(c), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		check := func(when string, want uint64, has bool) {
			t.Helper()
			s, err := feed.Sample(true)
			if err != nil {
				t.Fatal(err)
			}
			if s.Memory.OOMKills != want || s.Memory.HasKills != has {
				t.Errorf("%s: got %d, %v; want %d, %v", when, s.Memory.OOMKills,
					s.Memory.HasKills, want, has)
			}
		}
		set := func(failures, kills int) {
			if tr.v2 {
				tr.write(tr.file(0, "memory.events"), fmt.Sprintf(
					"oom %d\noom_kill %d\noom_group_kill 9\n", failures, kills))
				return
			}
			tr.write(tr.file(0, "memory.failcnt"), fmt.Sprintf("%d\n", failures))
			tr.write(tr.file(0, "memory.oom_control"), fmt.Sprintf(
				"oom_kill_disable 0\nunder_oom 0\noom_kill %d\n", kills))
		}
		set(5, 2)
		check("at first", 2, true)
		set(6, 3)
		check("after the limit was hit", 3, true)
		feed.(*cgroupFeed).rare.at = time.Now().Add(-rareEvery)
		set(6, 4)
		check("ten seconds later", 4, true)
		feed.(*cgroupFeed).rare.at = time.Now().Add(-rareEvery)
		tr.write(tr.file(0, map[bool]string{false: "memory.oom_control",
			true: "memory.events"}[tr.v2]), "oom 6\n")
		check("an old kernel", 0, false)
	})
}

// The files stay open while the container is hot and only then, all of them or none, and no more of
// them than the budget allows. What is read is new each time.
func TestFilesKeptOpen(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		a, b := tr.add(0), tr.add(1)
		src := treeSource(t, tr.dir)
		// without those of the limits
		files := map[bool]int{false: 11, true: 7}[tr.v2]
		// room for one container, and a bit
		src.cfg.Budget = fdbudget.New(100, func() (int, error) {
			return map[bool]int{false: 55, true: 60}[tr.v2], nil
		})
		open := openFiles(t)
		var feeds []Feed
		for _, c := range []*task.Container{a, b} {
			feed, err := src.Open(aTask(c), c, nil)
			if err != nil {
				t.Fatal(err)
			}
			render(t, feed, c) // what was opened is for the first reading
			feeds = append(feeds, feed)
		}
		sample := func(i int, hot bool, kept int) {
			t.Helper()
			feeds[i].(*cgroupFeed).rare.at = time.Time{} // each file is read
			s, err := feeds[i].Sample(hot)
			if err != nil {
				t.Fatal(err)
			}
			if got := src.cfg.Budget.Usage().Kept; got != kept {
				t.Errorf("got %d files kept open by the budget, want %d", got, kept)
			}
			if got := openFiles(t) - open; got != kept {
				t.Errorf("got %d files open, want %d", got, kept)
			}
			if s.Pids.Current != 3 {
				t.Errorf("got %d processes, want 3", s.Pids.Current)
			}
		}
		sample(0, false, 0)
		sample(0, true, files)
		sample(1, true, files)
		sample(0, true, files)
		tr.write(tr.file(0, "pids.current"), "17\n")
		if s, err := feeds[0].Sample(true); err != nil || s.Pids.Current != 17 {
			t.Errorf("got %d processes, %v; want the file's new 17", s.Pids.Current,
				err)
		}
		tr.write(tr.file(0, "pids.current"), "3\n")
		sample(0, false, 0)
		sample(1, true, files)
		src.cfg.Budget.Exhausted() // others need them
		sample(1, true, 0)
		feeds[0].Close()
		feeds[1].Close()
		unread, err := src.Open(aTask(a), a, nil)
		if err != nil {
			t.Fatal(err)
		}
		unread.Close()
		if got := openFiles(t) - open; got != 0 {
			t.Errorf("closed: %d files open", got)
		}
	})
}

// The limits are read every ten seconds. Throttled periods and failed allocations are read then
// too, and in each reading once there are some, or could be.
func TestRareNumbers(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		names := map[bool][3]string{false: {"memory.limit_in_bytes", "memory.failcnt",
			"memory.usage_in_bytes"},
			true: {"memory.max", "memory.events", "memory.current"}}[tr.v2]
		failures := map[bool]string{false: "%d\n", true: "oom %d\n"}[tr.v2]
		tr.write(tr.file(0, names[0]), "1000000\n")
		tr.write(tr.file(0, names[1]), fmt.Sprintf(failures, 0))
		if !tr.v2 {
			tr.write(tr.file(0, "memory.max_usage_in_bytes"), "5000\n")
		}
		feed, err := treeSource(t, tr.dir).Open(aTask(c), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		check := func(when string, limit, failed, pids uint64) {
			t.Helper()
			s, err := feed.Sample(true)
			if err != nil {
				t.Fatal(err)
			}
			if s.Memory.Limit != limit || s.Memory.Failcnt != failed ||
				s.Pids.Limit != pids {
				t.Errorf("%s: got limit %d, %d failures, %d processes; want %d, "+
					"%d, %d", when, s.Memory.Limit, s.Memory.Failcnt,
					s.Pids.Limit, limit, failed, pids)
			}
		}
		none := map[bool]uint64{false: 0, true: 1<<64 - 1}[tr.v2]
		check("at first", 1000000, 0, none)
		tr.write(tr.file(0, names[0]), "2000000\n")
		tr.write(tr.file(0, names[1]), fmt.Sprintf(failures, 3))
		tr.write(tr.file(0, "pids.max"), "64\n")
		check("a moment later", 1000000, 0, none)
		feed.(*cgroupFeed).rare.at = time.Now().Add(-rareEvery)
		check("ten seconds later", 2000000, 3, 64)
		tr.write(tr.file(0, names[1]), fmt.Sprintf(failures, 4))
		check("once it has failed", 2000000, 4, 64)

		feed.(*cgroupFeed).rare.memoryFailures = 0
		tr.write(tr.file(0, names[1]), fmt.Sprintf(failures, 0))
		check("again", 2000000, 0, 64)
		tr.write(tr.file(0, names[1]), fmt.Sprintf(failures, 1))
		tr.write(tr.file(0, names[2]), "1500000\n")
		check("near the limit", 2000000, 1, 64)
	})
}

// A container that has not run keeps its memory.stat for ten seconds; after it has run it shows
// the new one at once.
func TestMemoryStatOfTheIdle(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		feed, err := treeSource(t, tr.dir).Open(aTask(c), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		usage := map[bool]string{false: "memory.usage_in_bytes",
			true: "memory.current"}[tr.v2]
		check := func(when string, want uint64) {
			t.Helper()
			for _, hot := range []bool{true, false} { // with the file open or not
				s, err := feed.Sample(hot)
				if err != nil {
					t.Fatal(err)
				}
				if got := s.Memory.Stats[0].Value; got != want ||
					len(s.Memory.Stats) != len(memoryStatKeys(tr.v2)) {
					t.Errorf("%s: got %d (%d numbers), want %d", when, got,
						len(s.Memory.Stats), want)
				}
			}
		}
		check("at first", 1)
		tr.write(tr.file(0, "memory.stat"), memoryStat(tr.v2, 100))
		check("idle", 1)
		tr.write(tr.file(0, usage), "123456\n")
		check("it has more memory", 101)
		tr.write(tr.file(0, "memory.stat"), memoryStat(tr.v2, 200))
		if tr.v2 {
			tr.write(tr.file(0, "cpu.stat"),
				"usage_usec 2000\nuser_usec 600\nsystem_usec 400\n")
		} else {
			tr.write(tr.file(0, "cpuacct.usage_percpu"), "2000000 1000000 \n")
		}
		check("it has run", 201)
		tr.write(tr.file(0, "memory.stat"), memoryStat(tr.v2, 300))
		feed.(*cgroupFeed).rare.at = time.Now().Add(-rareEvery)
		check("ten seconds later", 301)
	})
}

func memoryStatKeys(v2 bool) []string {
	if v2 {
		return memoryKeysV2
	}
	return memoryKeysV1
}

func openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// withoutDescriptors runs f while this process can open nothing.
func withoutDescriptors(t testing.TB, f func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE,
		&unix.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

// A process without a free descriptor takes no container for ended or damaged, at any of the files.
func TestNoDescriptors(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		src := treeSource(t, tr.dir)
		check := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, unix.EMFILE) || errors.Is(err, errGone) ||
				errors.Is(err, errDamaged) {
				t.Errorf("%s: got %v, want EMFILE alone", what, err)
			}
		}
		withoutDescriptors(t, func() {
			_, err := src.Open(aTask(c), c, nil)
			check("open", err)
		})
		feed, err := src.Open(aTask(c), c, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer feed.Close()
		render(t, feed, c)
		withoutDescriptors(t, func() {
			_, err := feed.Sample(false)
			check("cold", err)
		})
		render(t, feed, c)
		f := feed.(*cgroupFeed)
		f.kept[fileMemoryUsage].close()
		f.complete = false
		withoutDescriptors(t, func() {
			_, err := f.file(fileMemoryUsage)
			check("one file", err)
			check("net/dev", f.net.openDev(unix.AT_FDCWD))
			check("the cgroup", f.alive(0))
		})
		render(t, feed, c)
	})
}

// Without a free descriptor a container keeps its sample, and gets a new one when a descriptor is
// free. The budget is released.
func TestNoDescriptorsKeepsTheSample(t *testing.T) {
	versions(t, func(t *testing.T, tr *tree) {
		c := tr.add(0)
		src := treeSource(t, tr.dir)
		s := New(Config{Budget: src.cfg.Budget}, src)
		s.Apply([]*task.Task{aTask(c)})
		defer s.stop()
		e := s.entries[c.ID]
		for range 2 {
			s.step(e, e.due, 0)
		}
		before := c.Stats.Load()
		if before == nil {
			t.Fatal("no sample")
		}
		src.cfg.Budget = fdbudget.New(1024, func() (int, error) { return 10, nil })
		s.short.budget = src.cfg.Budget
		withoutDescriptors(t, func() { s.step(e, e.due, 0) })
		if c.Stats.Load() != before || s.Metrics().Short.Load() != 1 ||
			s.Metrics().Gone.Load() != 0 {
			t.Errorf("got %d short, %d gone; want 1, 0 and the sample as it was",
				s.Metrics().Short.Load(), s.Metrics().Gone.Load())
		}
		if src.cfg.Budget.Keep(1) {
			t.Error("there is room at once for what is kept")
		}
		s.step(e, e.due, 0)
		if after := c.Stats.Load(); after == before {
			t.Error("with descriptors again: no new sample")
		}
	})
}
