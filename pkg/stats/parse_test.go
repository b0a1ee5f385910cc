package stats

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
)

func TestParseUint(t *testing.T) {
	f := func(in string, want uint64, ok bool) {
		t.Helper()
		if got, gotOK := parseUint([]byte(in)); got != want || gotOK != ok {
			t.Errorf("%q: got %d, %v; want %d, %v", in, got, gotOK, want, ok)
		}
	}
	f("0", 0, true)
	f("18446744073709551615", math.MaxUint64, true)
	f("18446744073709551616", 0, false)
	f("99999999999999999999", 0, false)
	f("000000000000000000001", 0, false)
	f("-5", 0, true)
	f("", 0, false)
	f("-", 0, false)
	f("1.5", 0, false)
	f(" 1", 0, false)
}

func TestParseValue(t *testing.T) {
	f := func(in string, want uint64, ok bool) {
		t.Helper()
		got, err := parseValue([]byte(in))
		if got != want || (err == nil) != ok || !ok && !errors.Is(err, errDamaged) {
			t.Errorf("%q: got %d, %v; want %d", in, got, err, want)
		}
	}
	f("12\n", 12, true)
	f("max\n", math.MaxUint64, true)
	f("12", 0, false)
	f("12\n13\n", 0, false)
	f("\n", 0, false)
	f("", 0, false)
}

func TestParsePerCPU(t *testing.T) {
	f := func(in, want string, sum uint64) {
		t.Helper()
		got, gotSum, err := parsePerCPU([]byte(in), nil)
		if want == "" {
			if !errors.Is(err, errDamaged) {
				t.Errorf("%q: got %v, want damaged", in, err)
			}
			return
		}
		if err != nil || fmt.Sprint(got) != want || gotSum != sum {
			t.Errorf("%q: got %v, sum %d, error %v; want %s, %d", in, got, gotSum, err,
				want, sum)
		}
	}
	f("1 2 3 \n", "[1 2 3]", 6)
	f("7\n", "[7]", 7)
	f("\n", "", 0)
	f("1 2", "", 0)
	f("1 x\n", "", 0)
	f(strings.Repeat("1 ", maxNumbers+1)+"\n", "", 0)
}

func TestParseIOStat(t *testing.T) {
	f := func(in, want string) {
		t.Helper()
		got, err := parseIOStat([]byte(in), nil)
		if want == "damaged" {
			if !errors.Is(err, errDamaged) {
				t.Errorf("%q: got %v, %v; want damaged", in, got, err)
			}
			return
		}
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("%q: got %v, %v; want %s", in, got, err, want)
		}
	}
	f("", "[]")
	f("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n", "[{8 0 read 1} {8 0 write 2}]")
	f("8:16 rbytes=1 wbytes=2\n253:0 rbytes=3 wbytes=4 cost.usage=1.5\n", "[{8 16 read 1} {8 16 write 2} {253 0 read 3} {253 0 write 4}]")
	f("8:16 8:0 rbytes=1 wbytes=2\n", "[{8 0 read 1} {8 0 write 2}]")
	f("8:16 \n", "[]")
	f("8:0 rbytes=1", "damaged")
	f("8:0 rbytes=x\n", "damaged")
	f("8 rbytes=1\n", "damaged")
}

func TestParseBlkio(t *testing.T) {
	f := func(in, want string) {
		t.Helper()
		got, err := parseBlkio([]byte(in), nil)
		if want == "damaged" {
			if !errors.Is(err, errDamaged) {
				t.Errorf("%q: got %v, %v; want damaged", in, got, err)
			}
			return
		}
		if err != nil || got == nil || fmt.Sprint(got) != want {
			t.Errorf("%q: got %v, %v; want %s", in, got, err, want)
		}
	}
	f("Total 0\n", "[]")
	f("8:0 Read 1\n8:0 Total 1\nTotal 1\n", "[{8 0 Read 1} {8 0 Total 1}]")
	f("8:0 Steal 1\n", "damaged")
	f("8:0 Read\n", "damaged")
	f("", "damaged")
}

func TestParseProcStat(t *testing.T) {
	f := func(in string, system uint64, online uint32) {
		t.Helper()
		gotSystem, gotOnline, err := parseProcStat([]byte(in))
		if gotSystem != system || gotOnline != online || (err == nil) != (online > 0) {
			t.Errorf("%q: got %d, %d, %v; want %d, %d", in, gotSystem, gotOnline, err,
				system, online)
		}
	}
	f("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1\ncpu3 1 1 1 1 1 1 1\nintr 9 9", 28*nsPerTick, 2)
	f("cpu  1 2 3 4 5 6 7\ncpu0 1\ncpu1 1", 28*nsPerTick, 1) // the rest did not fit
	f("cpu  1 2 3 4 5 6\ncpu0 1\n", 0, 0)
	f("", 0, 0)
	f("cpu0 1 2 3\n", 0, 0)
}

func TestCgroupPath(t *testing.T) {
	const id = "0123abcd"
	f := func(file, controller, want string, wantErr error) {
		t.Helper()
		got, err := cgroupPath([]byte(file), controller, id)
		if string(got) != want || !errors.Is(err, wantErr) {
			t.Errorf("%q, %q: got %q, %v; want %q, %v", file, controller, got, err,
				want, wantErr)
		}
	}
	const v1 = "12:name=systemd:/x\n4:memory:/docker/" + id + "\n3:cpu,cpuacct:/ecs/task/" +
		id + "/init.scope\n0::/docker/" + id + "\n"
	f(v1, "memory", "/docker/"+id, nil)
	f(v1, "cpu", "/ecs/task/"+id, nil)
	f(v1, "cpuacct", "/ecs/task/"+id, nil)
	f(v1, "pids", "", errNoController)
	f(v1, "", "/docker/"+id, nil)
	f("0::/system.slice/docker-"+id+".scope/a/b\n", "", "/system.slice/docker-"+id+".scope", nil)
	f("0::/user.slice\n", "", "", errNotOurs)
	f("0::/../"+id+"\n", "", "", errNotOurs) // seen from another cgroup namespace
	f("0::/docker/"+id, "", "", errNoController)
	f("", "memory", "", errNoController)
	f("::\n", "", "", errNotOurs)
}

func TestNetLines(t *testing.T) {
	f := func(in, want string) {
		t.Helper()
		var got []string
		var n Network
		lines := newNetLines([]byte(in))
		for name, ok := lines.next(&n); ok; name, ok = lines.next(&n) {
			got = append(got, fmt.Sprintf("%s %d %d %d %d %d %d %d %d", name, n.RxBytes,
				n.RxPackets, n.RxErrors, n.RxDropped,
				n.TxBytes, n.TxPackets, n.TxErrors, n.TxDropped))
		}
		if lines.err != nil {
			got = append(got, "damaged")
		}
		if strings.Join(got, "|") != want {
			t.Errorf("%q: got %q, want %q", in, strings.Join(got, "|"), want)
		}
	}
	const numbers = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
	f(netDev, "")
	f(netDev+"  eth0: "+numbers, "eth0 1 2 3 4 9 10 11 12")
	f(netDev+"eth0:"+numbers, "eth0 1 2 3 4 9 10 11 12")
	f(netDev+"a:1: "+numbers, "a:1 1 2 3 4 9 10 11 12")
	f(netDev+"eth0: 1 2 3\n", "damaged")
	f(netDev+"eth0: "+numbers[:20], "damaged")
	f("eth0: "+numbers, "damaged")
}

// FuzzParsers: whatever a file holds, a parser either says that it is damaged or returns no more
// than the file can have held, and what it returns makes a document that is valid, has the Engine's
// keys only, and holds the same numbers.
func FuzzParsers(f *testing.F) {
	for _, seed := range []string{
		"12\n", "max\n", "1 2 3 \n", "user 1\nsystem 2\n", "nr_periods 5\nnr_throttled 2\nthrottled_time 3\n",
		"usage_usec 1\nuser_usec 2\nsystem_usec 3\n", memoryStat(false, 1), memoryStat(true, 1), "low 0\noom 2\n",
		"8:0 Read 1\nTotal 1\n", "8:0 rbytes=1 wbytes=2\n8:16 8:32 rbytes=1\n", "cpu  1 2 3 4 5 6 7 8\ncpu0 1\nintr 1\n",
		netDev + "eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\xff\"<: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n",
		"4:cpu,memory:/docker/abc/d\n0::/abc\n", "MemTotal:  12 kB\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := Counters{Read: time.Unix(1, 0)}
		var err error
		var errs []error
		limit := func(n int, what string) {
			if n > len(b) {
				t.Errorf("%s: %d numbers from %d bytes", what, n, len(b))
			}
		}
		if c.CPU.PerCPU, c.CPU.Total, err = parsePerCPU(b, nil); err != nil {
			c.CPU.PerCPU = nil
			errs = append(errs, err)
		}
		limit(len(c.CPU.PerCPU), "CPUs")
		for _, parse := range []func([]byte, *CPU) error{parseCPUAcctStat, parseCPUStatV1,
			parseCPUStatV2} {
			errs = append(errs, parse(b, &c.CPU))
		}
		c.CPU.System, c.CPU.Online, err = parseProcStat(b)
		errs = append(errs, err)
		limit(int(c.CPU.Online), "CPUs online")
		if c.Memory.Stats, err = parseMemoryStat(b, nil, memoryKeysV1,
			memoryIndexV1); err == nil {
			limit(len(memoryKeysV1)/2, "keys")
		}
		errs = append(errs, err)
		c.Memory.Usage, err = parseValue(b)
		errs = append(errs, err)
		c.Memory.Failcnt, err = parseOOM(b)
		errs = append(errs, err)
		_, err = parseMemTotal(b)
		errs = append(errs, err)
		c.Blkio.ServiceBytes, err = parseBlkio(b, nil)
		errs = append(errs, err)
		c.Blkio.Serviced, err = parseIOStat(b, nil)
		errs = append(errs, err)
		limit(len(c.Blkio.ServiceBytes)+len(c.Blkio.Serviced), "devices")
		var n Network
		lines := newNetLines(b)
		for name, ok := lines.next(&n); ok; name, ok = lines.next(&n) {
			n.Name = string(name)
			c.Networks = append(c.Networks, n)
		}
		errs = append(errs, lines.err)
		limit(len(c.Networks), "interfaces")
		for _, err := range errs {
			if err != nil && !errors.Is(err, errDamaged) {
				t.Errorf("got error %v, want damaged", err)
			}
		}
		if path, err := cgroupPath(b, "memory", "abc"); err == nil {
			if !bytes.Contains(path, []byte("abc")) || path[0] != '/' ||
				bytes.Contains(path, []byte("..")) &&
					bytes.Contains(path, []byte("/../")) {
				t.Errorf("got path %q", path)
			}
		}
		checkDocument(t, &c, string(b))
	})
}

// checkDocument checks the rendered c against encoding/json and the Engine's own type.
func checkDocument(t *testing.T, c *Counters, name string) {
	t.Helper()
	doc, start, end := appendSample(nil, "id", name, c, previous{})
	next, _, _ := appendSample(nil, "id", name, c, previous{read: c.Read, cpu: doc[start:end]})
	for _, doc := range [][]byte{doc, next} {
		dec := json.NewDecoder(bytes.NewReader(doc))
		dec.DisallowUnknownFields()
		var s container.StatsResponse
		if err := dec.Decode(&s); err != nil {
			t.Fatalf("%v: %s", err, doc)
		}
		// Encoded again by the Engine's type it is the same document, but for the order of
		// the keys.
		again, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := flatten(t, doc), flatten(t, again); !reflect.DeepEqual(got, want) &&
			!sameNames(c.Networks) {
			t.Errorf("got\n%s\nwant\n%s", doc, again)
		}
		if s.CPUStats.CPUUsage.TotalUsage != c.CPU.Total ||
			s.MemoryStats.Usage != c.Memory.Usage ||
			len(s.BlkioStats.IoServicedRecursive) != len(c.Blkio.Serviced) {
			t.Errorf("got %+v, want the numbers of %+v", s, c)
		}
	}
}

// sameNames reports whether two interfaces print the same name, which no kernel has: then the
// document has a key twice.
func sameNames(nets []Network) bool {
	seen := map[string]bool{}
	for _, n := range nets {
		name := strings.ToValidUTF8(n.Name, "\ufffd")
		if seen[name] || name != n.Name {
			return true
		}
		seen[name] = true
	}
	return false
}

// S13: the Engine's zero sample, to the byte.
func TestZeroSample(t *testing.T) {
	got, _, _ := appendSample(nil, "", "", &Counters{}, previous{})
	const cpu = `{"cpu_usage":{"total_usage":0,"usage_in_kernelmode":0,"usage_in_usermode":0},"throttling_data":{"periods":0,"throttled_periods":0,"throttled_time":0}}`
	const want = `{"read":"0001-01-01T00:00:00Z","preread":"0001-01-01T00:00:00Z","pids_stats":{},"blkio_stats":{"io_service_bytes_recursive":null,` +
		`"io_serviced_recursive":null,"io_queue_recursive":null,"io_service_time_recursive":null,"io_wait_time_recursive":null,` +
		`"io_merged_recursive":null,"io_time_recursive":null,"sectors_recursive":null},"num_procs":0,"storage_stats":{},"cpu_stats":` + cpu +
		`,"precpu_stats":` + cpu + `,"memory_stats":{}}`
	if string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// percpu_usage is there only if clients cannot divide by a wrong length.
func TestPerCPUUsage(t *testing.T) {
	f := func(percpu int, online uint32, want bool) {
		t.Helper()
		got := appendCPU(nil, &CPU{PerCPU: make([]uint64, percpu), Online: online})
		if strings.Contains(string(got), "percpu_usage") != want {
			t.Errorf("%d CPUs listed, %d online: got %s", percpu, online, got)
		}
	}
	f(2, 2, true)
	f(128, 2, false)
	f(0, 0, false)
}

func TestAppendString(t *testing.T) {
	for _, s := range []string{"", "eth0", "a\"b\\c", "\x00\x1f\t\n\r\b\f", "<>&",
		"é\u2028\u2029\U0001f600", "\xff\xc3"} {
		var want bytes.Buffer
		if err := json.NewEncoder(&want).Encode(s); err != nil {
			t.Fatal(err)
		}
		if got := appendString(nil, s); string(got)+"\n" != want.String() {
			t.Errorf("%q: got %s, want %s", s, got, want.String())
		}
	}
}
