//go:build root

package doctor

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"metad/internal/testnet"
	"metad/pkg/loader"
)

// newNamespace puts the calling goroutine into a network namespace of its own, which goes with it.
func newNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal("network namespace:", err)
	}
}

func command(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
}

func program(t *testing.T, typ ebpf.ProgramType, name string, code int32) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: typ, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, code), asm.Return()}})
	if err != nil {
		t.Fatalf("load %s: %v", name, err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func add(t *testing.T, l netlink.Link) netlink.Link {
	t.Helper()
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatalf("add %s: %v", l.Attrs().Name, err)
	}
	got, err := netlink.LinkByName(l.Attrs().Name)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// attachTC puts p at the ingress of l with clsact.
func attachTC(t *testing.T, l netlink.Link, p *ebpf.Program, prio uint16) {
	t.Helper()
	i := l.Attrs().Index
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: i,
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := netlink.QdiscReplace(q); err != nil {
		t.Fatal("clsact:", err)
	}
	f := &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: i,
		Parent: netlink.HANDLE_MIN_INGRESS,
		Handle: 1, Priority: prio, Protocol: unix.ETH_P_ALL}, Fd: p.FD(), Name: "filter",
		DirectAction: true}
	if err := netlink.FilterAdd(f); err != nil {
		t.Fatal("filter:", err)
	}
}

// The report of a host with one of each finding names every finding.
func TestRootDoctor(t *testing.T) {
	newNamespace(t)
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Fatal(err)
	}
	attrs := func(name string) netlink.LinkAttrs {
		a := netlink.NewLinkAttrs()
		a.Name = name
		return a
	}
	bridge := add(t, &netlink.Bridge{LinkAttrs: attrs("ecs-bridge")})
	ports := make([]netlink.Link, 4)
	for i, name := range []string{"veth0", "veth1", "veth2", "veth3"} {
		ports[i] = add(t, &netlink.Veth{LinkAttrs: attrs(name), PeerName: "eth-" + name})
		if err := netlink.LinkSetMaster(ports[i], bridge); err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(ports[i]); err != nil {
			t.Fatal(err)
		}
	}
	add(t, &netlink.Veth{LinkAttrs: attrs(hostEnd), PeerName: "metad1"})
	tasks := add(t, &netlink.Bridge{LinkAttrs: attrs("br-local")})
	addr, _ := netlink.ParseAddr("169.254.170.1/24")
	if err := netlink.AddrAdd(tasks, addr); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(tasks); err != nil {
		t.Fatal(err)
	}
	command(t, "iptables", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.170.2", "-p", "tcp",
		"--dport", "80",
		"-j", "DNAT", "--to-destination", "127.0.0.1:51679")
	command(t, "nft",
		"add table inet fence; add chain inet fence forward { type filter hook forward "+
			"priority 0; }; "+
			"add rule inet fence forward ip daddr 169.254.170.0/24 drop")

	// veth0 has metad's program alone; veth1 another program, then metad's; veth2 only another
	// program; veth3 metad's behind XDP.
	ours, other := program(t, ebpf.SchedCLS, "metad_port", -1),
		program(t, ebpf.SchedCLS, "shaper", -1)
	attachTC(t, ports[0], ours, 10)
	attachTC(t, ports[1], ours, 10)
	attachTC(t, ports[1], other, 5)
	attachTC(t, ports[2], other, 5)
	attachTC(t, ports[3], ours, 10)
	xdp := program(t, ebpf.XDP, "fence", 2)
	if err := netlink.LinkSetXdpFdWithFlags(ports[3], xdp.FD(),
		unix.XDP_FLAGS_SKB_MODE); err != nil {
		t.Fatal("xdp:", err)
	}
	tcx, err := link.AttachTCX(link.TCXOptions{Interface: ports[0].Attrs().Index,
		Program: other, Attach: ebpf.AttachTCXIngress})
	hasTCX := err == nil
	if hasTCX {
		defer tcx.Close()
	} else if strings.HasSuffix(checkKernel(context.Background(), Config{},
		thisHost())[0].Found, "by tcx") {
		t.Errorf("attach by tcx on %s: %v", release(t), err)
	}

	// An Engine listens at a socket; there is no agent.
	socket := filepath.Join(t.TempDir(), "docker.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	engine := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter,
		_ *http.Request) {
		w.Write([]byte(`{"Version":"20.10.24","ApiVersion":"1.41"}`))
	})}
	served := make(chan struct{})
	go func() { defer close(served); engine.Serve(ln) }()
	defer func() { engine.Close(); <-served }()

	r := Run(context.Background(), Config{
		Bridges: []string{"ecs-bridge"}, Attach: "auto",
		PinDir:     "/sys/fs/bpf/metad-doctor-test",
		DockerHost: "unix://" + socket, AgentURL: "http://127.0.0.1:51679",
		AdminSocket: "/nonexistent/admin.sock",
	})
	var text strings.Builder
	r.WriteTo(&text)
	t.Log("\n" + text.String())
	f := func(check string, want Status, found ...string) {
		t.Helper()
		for _, c := range r {
			if c.Name != check || c.Status != want {
				continue
			}
			all := true
			for _, s := range found {
				all = all && strings.Contains(c.Found, s)
			}
			if all {
				return
			}
		}
		t.Errorf("got no %v of %s with %q", want, check, found)
	}
	f("kernel", OK, release(t))
	f("bpf", OK, "bpf_redirect_peer")
	f("capabilities", OK)
	f("bpffs", OK, "/sys/fs/bpf/metad-doctor-test")
	f("metad", Warn, "does not answer")
	f("bridge ecs-bridge", Warn, "1 of 4 ports without metad's program: veth2; other programs: ", `tc "shaper" on veth2`)
	f("bridge ecs-bridge", Warn, `tc "shaper" runs before metad on veth1`)
	f("bridge ecs-bridge", Warn, `xdp "fence" runs before metad on veth3`)
	if hasTCX {
		f("bridge ecs-bridge", Warn, `tcx "shaper" runs before metad on veth0`)
	}
	f("address", Warn, "169.254.170.0/24 is a network of br-local")
	f("rules", OK, "ip nat PREROUTING", "127.0.0.1:51679")
	f("rules", Warn, "inet fence forward", "drop")
	f("docker", OK, "20.10.24")
	f("agent", OK, "none at http://127.0.0.1:51679")
	if got := r.Status(); got != Warn {
		t.Errorf("got status %v, want %v", got, Warn)
	}
}

// On a host where metad runs, every port has metad's program first, and the report names a port
// that loses it.
func TestRootBesideMetad(t *testing.T) {
	f := func(t *testing.T, mode loader.AttachMode) {
		h := testnet.NewHost(t)
		b := h.AddBridge("ecs-bridge", "169.254.172.1/22")
		one, two := b.AddTask(""), b.AddTask("")
		pins := testnet.PinDir(t)
		l, err := loader.Open(loader.Config{Netns: h.NS, Attach: mode, PinDir: pins})
		if err != nil {
			t.Fatalf("%+v", err)
		}
		defer l.Close()
		t.Log("attach mode:", l.Status().Attach)
		find := func(want Status, found string) {
			t.Helper()
			var r Report
			testnet.In(h.NS, func() error {
				r = Run(context.Background(), Config{Bridges: []string{"ecs-*"},
					PinDir: pins, DockerHost: "unix:///nowhere"})
				return nil
			})
			for _, c := range r {
				if c.Name == "bridge ecs-bridge" {
					if c.Status != want || c.Found != found {
						t.Errorf("got %v, %q, want %v, %q", c.Status,
							c.Found, want, found)
					}
					return
				}
			}
			t.Errorf("got nothing of the bridge: %v", r)
		}
		find(OK, "2 ports, all with metad's program")
		if err := testnet.In(h.NS,
			func() error { return takeOff(two.Ifindex) }); err != nil {
			t.Fatal(err)
		}
		find(Warn, "1 of 2 ports without metad's program: "+two.Port)
		one.Remove()
		testnet.Until(t, "the port to go", func() bool {
			return !slices.Contains(h.LinkNames(), one.Port)
		})
		find(Warn, "1 of 1 ports without metad's program: "+two.Port)
	}
	t.Run("clsact", func(t *testing.T) { f(t, loader.AttachClsact) })
	t.Run("tcx", func(t *testing.T) { testnet.SkipBefore(t, "6.6"); f(t, loader.AttachTCX) })
}

// takeOff removes a port's programs, as the clean-up of another program might.
func takeOff(ifindex int) error {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return err
	}
	filters, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
	for _, f := range filters {
		err = errors.Join(err, netlink.FilterDel(f))
	}
	q, qerr := link.QueryPrograms(link.QueryOptions{Target: ifindex,
		Attach: ebpf.AttachTCXIngress})
	if qerr != nil { // no TCX
		return err
	}
	for _, p := range q.Programs {
		id, _ := p.LinkID()
		k, kerr := link.NewFromID(id)
		if err = errors.Join(err, kerr); kerr == nil {
			err = errors.Join(err, k.Detach(), k.Close())
		}
	}
	return err
}

func release(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(u.Release[:])
}
