//go:build root

package loader

import (
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"metad/bpf"
	"metad/internal/testnet"
)

func putLevels(t testing.TB, l *Loader, k *testnet.Task, tag uint32, levels [2]uint8) {
	t.Helper()
	v := &bpf.TaskValue{Tag: tag, Ifindex: uint32(k.Ifindex), Mac: k.MAC, Levels: levels}
	if err := l.Put(k.Addr, v); err != nil {
		t.Fatal(err)
	}
}

func putContainers(t testing.TB, l *Loader, tags map[uint64]uint32) {
	t.Helper()
	for id, tag := range tags {
		if err := l.PutContainer(id, &bpf.ContainerValue{Tag: tag}); err != nil {
			t.Fatal(err)
		}
	}
}

// A connection names the container whose cgroup its socket was made in, and only a container of the
// task that has the address: two containers in one network namespace are told apart, a cgroup that
// a container made is the container's, a process of neither is the task's, and a container of
// another task is not believed.
func TestRootContainers(t *testing.T) {
	bothModes(t, func(t *testing.T, mode AttachMode) {
		h := testnet.NewHost(t)
		b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
		one, two := b.AddTask(""), b.AddTask("")
		h.NoLeak()
		l := open(t, h, Config{Attach: mode, HostRoute: true})
		c := testnet.NewCgroups(t)
		putLevels(t, l, one, 1, [2]uint8{2})
		putLevels(t, l, two, 2, [2]uint8{3, 2})
		x, idX := c.Add("x")
		y, idY := c.Add("y")
		inY, _ := c.Add("y/inner/leaf")
		other, _ := c.Add("other")
		deep, idDeep := c.Add("ecs/deep")
		onHost, idHost := c.Add("host")
		putContainers(t, l, map[uint64]uint32{idX: bpf.ContainerTag(1, 1), idY: bpf.ContainerTag(1, 2), idDeep: bpf.ContainerTag(2, 127)})
		if err := l.PutHostContainer(idHost,
			&bpf.ContainerValue{Tag: bpf.ContainerTag(3, 1)}); err != nil {
			t.Fatal(err)
		}
		serve(t, l)
		for _, want := range []struct {
			dir     string
			k       *testnet.Task
			answer  string
			verdict string
		}{
			{x, one, "metad 0x1000001", "port_container"},
			{y, one, "metad 0x2000001", "port_container"},
			{inY, one, "metad 0x2000001", "port_container"},
			{other, one, "metad 0x1", "port_task"},
			{onHost, one, "metad 0x1", "port_task"},
			{deep, two, "metad 0x7f000002", "port_container"},
			{x, two, "metad 0x2", "port_task"}, // not its container
		} {
			c.Enter(want.dir)
			before := verdictsOf(t, l)[want.verdict]
			wantAnswer(t, want.k, want.answer)
			if verdictsOf(t, l)[want.verdict] == before {
				t.Errorf("%s: %s did not move", filepath.Base(want.dir),
					want.verdict)
			}
		}
		for dir, want := range map[string]string{onHost: "metad 0x1000003", x: "metad 0x0",
			other: "metad 0x0"} {
			c.Enter(dir)
			wantHostAnswer(t, h, want)
		}
		if verdictsOf(t, l)["host_container"] == 0 {
			t.Error("host_container did not move")
		}

		// The socket's maker counts, not the process that uses it.
		c.Enter(x)
		conn, err := one.Dial(timeout)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c.Enter(y)
		if _, body, err := testnet.GetOn(conn, "/", timeout); err != nil ||
			body != "metad 0x1000001" {
			t.Errorf("a socket that has moved: got %q, %v, want its maker's", body, err)
		}
		for _, id := range []uint64{idX, idX, idHost} { // twice: no error
			if err := l.DeleteContainer(id); err != nil {
				t.Fatal(err)
			}
		}
		c.Enter(x)
		wantAnswer(t, one, "metad 0x1")
		c.Enter(onHost)
		wantHostAnswer(t, h, "metad 0x0")
		own, host, err := l.Containers()
		if err != nil || len(own) != 2 || own[idY].Tag != bpf.ContainerTag(1, 2) ||
			len(host) != 0 {
			t.Errorf("containers: got %v, %v, %v", own, host, err)
		}
		putLevels(t, l, one, 1, [2]uint8{})
		c.Enter(y)
		wantAnswer(t, one, "metad 0x1") // not looked at
	})
}

// A container that shares its network with another cannot be taken for it by what it sends:
// another's mark on the packets of its socket, or a connection that it makes by raw frames, without
// a socket of TCP. Both belong to the container that made them.
func TestRootContainerPoses(t *testing.T) {
	b := newBridge(t)
	k := b.AddTask("")
	l := open(t, b.Host, Config{})
	putLevels(t, l, k, 1, [2]uint8{2})
	c := testnet.NewCgroups(t)
	x, idX := c.Add("x")
	y, idY := c.Add("y")
	neither, _ := c.Add("neither")
	putContainers(t, l, map[uint64]uint32{idX: bpf.ContainerTag(1, 1),
		idY: bpf.ContainerTag(1, 2)})
	serve(t, l)
	c.Enter(x)
	wantAnswer(t, k, "metad 0x1000001")
	posers := []struct{ dir, want string }{{y, "metad 0x2000001"}, {neither, "metad 0x1"}}
	for _, from := range posers {
		c.Enter(from.dir)
		if got := markedGet(t, k, bpf.ContainerTag(1, 1)); got != from.want {
			t.Errorf("%s with a mark: got %q, want %q", filepath.Base(from.dir), got,
				from.want)
		}
	}
	// The kernel's answers to segments without a socket go nowhere.
	if err := k.Blackhole(testnet.Endpoint); err != nil {
		t.Fatal(err)
	}
	for i, from := range posers {
		c.Enter(from.dir)
		raw := testnet.NewRaw(t, k.NS, "eth0")
		if got := rawGet(t, raw, testnet.Frame{SrcMAC: k.MAC, DstMAC: b.MAC, Src: k.Addr,
			SrcPort: uint16(42000 + i)}); got != from.want {
			t.Errorf("%s by frames: got %q, want %q", filepath.Base(from.dir), got,
				from.want)
		}
	}
}

// markedGet makes a request of k by a socket with the mark, and returns the body of the answer.
func markedGet(t *testing.T, k *testnet.Task, mark uint32) (body string) {
	t.Helper()
	d := net.Dialer{Timeout: timeout}
	d.Control = func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		})
		return errors.Join(cerr, err)
	}
	d.SetMultipathTCP(false)
	err := testnet.In(k.NS, func() error {
		c, err := d.Dial("tcp4", testnet.Endpoint)
		if err != nil {
			return err
		}
		defer c.Close()
		_, body, err = testnet.GetOn(c, "/", timeout)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// rawGet makes a connection of frames like f, and returns the body of the answer to one request.
func rawGet(t *testing.T, raw *testnet.Raw, f testnet.Frame) string {
	t.Helper()
	f.Seq = 1000
	raw.Send(f.Bytes())
	synAck, ok := raw.Answer(f.SrcPort, timeout)
	if !ok || synAck.Flags != testnet.SYN|testnet.ACK {
		t.Fatalf("got %+v, want a SYN-ACK", synAck)
	}
	f.Seq, f.Ack, f.Flags = 1001, synAck.Seq+1, testnet.ACK|testnet.PSH
	f.Payload = []byte("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	raw.Send(f.Bytes())
	for {
		s, ok := raw.Answer(f.SrcPort, timeout)
		if !ok {
			t.Fatal("no answer")
		}
		if _, body, found := strings.Cut(string(s.Payload), "\r\n\r\n"); found {
			return strings.TrimSpace(body)
		}
	}
}

// Containers stay known over a restart and a takeover.
func TestRootContainersStay(t *testing.T) {
	h := testnet.NewHost(t)
	k := h.AddBridge("ecs-bridge", "169.254.172.1/22").AddTask("")
	c := testnet.NewCgroups(t)
	x, id := c.Add("x")
	c.Enter(x)
	dir := testnet.PinDir(t)
	first := open(t, h, Config{PinDir: dir})
	putLevels(t, first, k, 1, [2]uint8{2})
	putContainers(t, first, map[uint64]uint32{id: bpf.ContainerTag(1, 1)})
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	l := open(t, h, Config{PinDir: dir})
	serve(t, l)
	wantAnswer(t, k, "metad 0x1000001")
	files, meta, err := l.OfferTakeover()
	if err != nil {
		t.Fatal(err)
	}
	next, ln, err := TakeOver(Config{Netns: h.NS, PinDir: dir}, files, meta)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer func() {
		if err := next.FinishTakeover(); err != nil {
			t.Error(err)
		}
	}()
	go answerAll(ln)
	defer ln.Close()
	wantAnswer(t, k, "metad 0x1000001")
	if err := next.DeleteContainer(id); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, k, "metad 0x1")
	if err := l.CancelTakeover(); err != nil {
		t.Fatal(err)
	}
}

// A packet that a process of the host puts on metad's device past its hooks gets nowhere, whatever
// address it has.
func TestRootPastTheHooks(t *testing.T) {
	b := newBridge(t)
	k := b.AddTask("")
	l := serving(t, b, Config{HostRoute: true}, k)
	raw := testnet.NewRaw(t, b.Host.NS, hostVeth)
	raw.BypassQdisc()
	atTask := testnet.NewRaw(t, k.NS, "eth0")
	metad1 := macOf(t, l)
	for i, src := range []testnet.Frame{{SrcMAC: k.MAC, Src: k.Addr}, {Src: HostAddr}} {
		src.DstMAC, src.SrcPort = metad1, uint16(43000+i)
		before := verdictsOf(t, l)["enter_unmarked"]
		raw.Send(src.Bytes())
		testnet.Until(t, "it is dropped", func() bool {
			return verdictsOf(t, l)["enter_unmarked"] == before+1
		})
		for _, r := range []*testnet.Raw{raw, atTask} {
			if s, ok := r.Answer(src.SrcPort, 60*time.Millisecond); ok {
				t.Errorf("from %s: got an answer: %+v", src.Src, s)
			}
		}
	}
	wantAnswer(t, k, "metad 0x1")
	wantHostAnswer(t, b.Host, "metad 0x0")
}

// macOf returns metad1's address.
func macOf(t testing.TB, l *Loader) (mac [6]byte) {
	t.Helper()
	err := testnet.In(l.end.server, func() error {
		i, err := net.InterfaceByName(serverVeth)
		if err == nil {
			copy(mac[:], i.HardwareAddr)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

// bpftool shows the task and the container of a cgroup as text.
func TestRootBpftoolContainers(t *testing.T) {
	testnet.RequireTool(t, "bpftool")
	h := testnet.NewHost(t)
	l := open(t, h, Config{})
	v := &bpf.ContainerValue{Tag: bpf.ContainerTag(1, 2)}
	text(v.TaskId[:], "158d1c8083dd49d6b527399fd6414f5c")
	text(v.Container[:], "web-1")
	if err := l.PutContainer(77, v); err != nil {
		t.Fatal(err)
	}
	pin := filepath.Join(l.cfg.PinDir, pinName(bpf.MetadMapContainerCgroup, l.progs.layout))
	out, err := exec.Command("bpftool", "map", "dump", "pinned", pin).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%s", out)
	for _, want := range []string{`"key": 77`, `"tag": 33554433`,
		`"task_id": "158d1c8083dd49d6b527399fd6414f5c"`, `"container": "web-1"`} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %s in %s", want, out)
		}
	}
}

func text(dst []int8, s string) {
	for i := range s {
		dst[i] = int8(s[i])
	}
}
