//go:build root

package loader

import (
	"fmt"
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"metad/bpf"
	"metad/internal/testnet"
)

// benchmarkProgram reports what the kernel says a run of the program takes (BPF_PROG_TEST_RUN), the
// best of b.N times: the machine has other things to do. "empty" is what the test run itself costs.
func benchmarkProgram(b *testing.B, h *testnet.Host, p *ebpf.Program, frame []byte, want uint32) {
	b.Helper()
	best := time.Duration(math.MaxInt64)
	err := testnet.In(h.NS, func() error {
		for b.Loop() {
			ret, took, err := p.Benchmark(frame, 100000, nil)
			if err != nil {
				return err
			}
			best = min(best, took)
			if ret != want {
				return fmt.Errorf("got %#x, want %#x", ret, want)
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(best.Nanoseconds()), "ns/packet")
	b.ReportMetric(0, "ns/op")
}

// A packet that is not ours, at a port. The limit is 30 ns over an empty program.
func BenchmarkProgramNotOurs(b *testing.B) {
	h, l, k, br := benchHost(b)
	run := func(name string, p *ebpf.Program, frame testnet.Frame, want uint32) {
		b.Run(name, func(b *testing.B) { benchmarkProgram(b, h, p, frame.Bytes(), want) })
	}
	frame := testnet.Frame{SrcMAC: k.MAC, DstMAC: br.MAC, Src: k.Addr, Dst: br.Gateway.Addr(),
		Payload: make([]byte, 1400)}
	run("empty", emptyProgram(b), frame, actUnspec)
	run("port", l.progs.MetadPort, frame, actUnspec)
	frame.EtherType = 0x86dd
	run("ipv6", l.progs.MetadPort, frame, actUnspec)
}

// A known task's packet and its answer. The limit is 250 ns over an empty program.
func BenchmarkProgramOurs(b *testing.B) {
	h, l, k, br := benchHost(b)
	run := func(name string, p *ebpf.Program, frame testnet.Frame, want uint32) {
		b.Run(name, func(b *testing.B) { benchmarkProgram(b, h, p, frame.Bytes(), want) })
	}
	frame := testnet.Frame{SrcMAC: k.MAC, DstMAC: br.MAC, Src: k.Addr, SrcPort: benchPort,
		Flags: testnet.ACK, Payload: make([]byte, 100)}
	answer := testnet.Frame{DstMAC: k.MAC, Src: Endpoint.Addr(), Dst: k.Addr, SrcPort: 80,
		DstPort: 40000, Flags: testnet.ACK}
	run("empty", emptyProgram(b), frame, actUnspec)
	run("port", l.progs.MetadPort, frame, actRedirect)
	syn := frame
	syn.SrcPort, syn.Flags, syn.Payload = benchPort+1, testnet.SYN, nil
	run("syn", l.progs.MetadPort, syn, actRedirect)
	// without a mark: no less work
	run("enter", l.progs.MetadEnter, frame, actShot)
	run("carry", l.progs.MetadCarry, answer, actUnspec)
	run("reply", l.progs.MetadReply, answer, actRedirect)
}

// benchPort is where the task has a connection from.
const benchPort = 45000

func benchHost(b *testing.B) (*testnet.Host, *Loader, *testnet.Task, *testnet.Bridge) {
	b.Helper()
	h := testnet.NewHost(b)
	br := h.AddBridge("ecs-bridge", "169.254.172.1/22")
	k := br.AddTask("")
	agent := netip.MustParseAddrPort("127.0.0.1:51679")
	h.StandInAgent(agent.String())
	l := open(b, h, Config{AgentAddr: agent})
	put(b, l, k, 1)
	serve(b, l)
	c, err := testnet.Dial(k.NS, netip.AddrPortFrom(k.Addr, benchPort).String(),
		testnet.Endpoint, timeout)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	// A run starts with what the last one left of the frame. With this MAC the answer that
	// metad_reply has readdressed is again one that carries the task's tag.
	k.MAC = [6]byte{0x02, 0, 0, 0, 0, 1}
	k.Ifindex = 1 // lo, where a test run's packets come in
	put(b, l, k, 1)
	return h, l, k, br
}

func emptyProgram(b *testing.B) *ebpf.Program {
	b.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}

// What naming the container costs, over a task alone: a test run's packet has a socket of this
// process's cgroup. The limit is 60 ns over "task".
func BenchmarkProgramContainer(b *testing.B) {
	h, l, k, br := benchHost(b)
	c := testnet.NewCgroups(b)
	dir, id := c.Add("x")
	putContainers(b, l, map[uint64]uint32{id: bpf.ContainerTag(1, 1)})
	for i := range uint64(1000) { // others
		putContainers(b, l, map[uint64]uint32{1<<40 + i: bpf.ContainerTag(1, 2)})
	}
	frame := testnet.Frame{SrcMAC: k.MAC, DstMAC: br.MAC, Src: k.Addr, SrcPort: benchPort,
		Flags: testnet.ACK, Payload: make([]byte, 100)}
	c.Enter(dir)
	for _, s := range []struct {
		name   string
		levels [2]uint8
	}{{"task", [2]uint8{}}, {"first level", [2]uint8{2}}, {"second level", [2]uint8{3, 2}}} {
		b.Run(s.name, func(b *testing.B) {
			putLevels(b, l, k, 1, s.levels)
			benchmarkProgram(b, h, l.progs.MetadPort, frame.Bytes(), actRedirect)
		})
	}
}
