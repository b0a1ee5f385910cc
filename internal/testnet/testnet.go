// Package testnet builds hosts and tasks out of network namespaces for tests. It does not touch the
// namespace of the test process, and t.Cleanup undoes everything, also when the test fails.
package testnet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"metad/internal/expect"
	"metad/pkg/netdump"
)

// Endpoint is the address that tasks ask.
const Endpoint = "169.254.170.2:80"

// RequireRoot fails the test if it does not run as root. It does not skip: such a test is built
// only with the tag root.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
}

// KernelAtLeast reports whether this kernel is release major.minor or later.
func KernelAtLeast(t testing.TB, major, minor int) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var a, b int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	return a > major || a == major && b >= minor
}

// SkipBefore skips the test on kernels before release, "6.6" for example.
func SkipBefore(t testing.TB, release string) {
	t.Helper()
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	if !KernelAtLeast(t, a, b) {
		t.Skipf("needs Linux %s", release)
	}
}

// NewNS returns a new namespace without a name, with lo up.
func NewNS(t testing.TB) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	err := onThread(func() (err error) {
		if ns, err = netns.New(); err != nil {
			return err
		}
		// IPv6's own packets would move counters that tests read. A kernel without IPv6 has
		// no such file.
		for _, which := range []string{"all", "default"} {
			err = os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6",
				[]byte("1"), 0)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatalf("new namespace: %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	h := handle(t, ns)
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatalf("lo: %v", err)
	}
	return ns
}

// In runs f on a thread in ns and returns its error. The thread ends with f: goroutines that f
// starts are not in ns.
func In(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
		return f()
	})
}

func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread goes with the goroutine
		done <- f()
	}()
	return <-done
}

func handle(t testing.TB, ns netns.NsHandle) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatalf("netlink: %v", err)
	}
	t.Cleanup(h.Close)
	return h
}

// Host is a namespace that stands for a container host.
type Host struct {
	NS netns.NsHandle
	NL *netlink.Handle // in NS

	t    testing.TB
	next atomic.Int64 // for names
}

// NewHost returns a host without bridges. Forwarding and route_localnet are on, as the agent sets
// them.
func NewHost(t testing.TB) *Host {
	t.Helper()
	RequireRoot(t)
	h := &Host{NS: NewNS(t), t: t}
	h.NL = handle(t, h.NS)
	h.Sysctl("net/ipv4/ip_forward", "1")
	h.Sysctl("net/ipv4/conf/all/route_localnet", "1")
	return h
}

// Sysctl sets path (below /proc/sys) in the host.
func (h *Host) Sysctl(path, value string) {
	h.t.Helper()
	if err := In(h.NS, func() error {
		return os.WriteFile("/proc/sys/"+path, []byte(value),
			0)
	}); err != nil {
		h.t.Fatalf("sysctl: %v", err)
	}
}

// AddBridge adds a bridge that is up and has the gateway address, "169.254.172.1/22" for example.
func (h *Host) AddBridge(name, gateway string) *Bridge {
	h.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := h.NL.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		h.t.Fatalf("add bridge %s: %v", name, err)
	}
	prefix := netip.MustParsePrefix(gateway)
	h.AddAddr(name, gateway)
	l := h.Link(name)
	if err := h.NL.LinkSetUp(l); err != nil {
		h.t.Fatalf("bridge %s up: %v", name, err)
	}
	b := &Bridge{Host: h, Name: name, Ifindex: l.Attrs().Index, Gateway: prefix}
	copy(b.MAC[:], h.Link(name).Attrs().HardwareAddr)
	// A bridge without a MAC of its own takes the lowest of its ports' MACs. This one must not
	// change. Setting the MAC that it already has does not help: Linux 5.10 would then not
	// take it for its own, and deliver nothing.
	b.MAC[5] ^= 1
	if err := h.NL.LinkSetHardwareAddr(l, b.MAC[:]); err != nil {
		h.t.Fatalf("bridge %s address: %v", name, err)
	}
	return b
}

// AddAddr gives the device an address with prefix length.
func (h *Host) AddAddr(device, addr string) {
	h.t.Helper()
	a, err := netlink.ParseAddr(addr)
	if err == nil {
		err = h.NL.AddrAdd(h.Link(device), a)
	}
	if err != nil {
		h.t.Fatalf("add %s to %s: %v", addr, device, err)
	}
}

// Link returns the host's device.
func (h *Host) Link(name string) netlink.Link {
	h.t.Helper()
	l, err := h.NL.LinkByName(name)
	if err != nil {
		h.t.Fatalf("device %s: %v", name, err)
	}
	return l
}

// LinkNames returns the names of the host's devices.
func (h *Host) LinkNames() []string {
	h.t.Helper()
	all, err := netdump.Whole(h.NL.LinkList)
	if err != nil {
		h.t.Fatalf("list devices: %v", err)
	}
	var names []string
	for _, l := range all {
		names = append(names, l.Attrs().Name)
	}
	return names
}

// Bridge is a bridge of a Host.
type Bridge struct {
	Host    *Host
	Name    string
	Ifindex int
	MAC     [6]byte
	Gateway netip.Prefix
}

// Dial connects from the namespace; local may be "", or an address and port to connect from.
func Dial(ns netns.NsHandle, local, remote string, timeout time.Duration) (c net.Conn, err error) {
	err = In(ns, func() error {
		d := net.Dialer{Timeout: timeout}
		d.SetMultipathTCP(false)
		if local != "" {
			ap, err := netip.ParseAddrPort(local)
			if err != nil {
				return err
			}
			d.LocalAddr = net.TCPAddrFromAddrPort(ap)
		}
		c, err = d.Dial("tcp4", remote)
		return err
	})
	return c, err
}

// GetOn asks on c, which it leaves open.
func GetOn(c net.Conn, path string, timeout time.Duration) (int, string, error) {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return 0, "", err
	}
	req, err := http.NewRequest(http.MethodGet, "http://"+Endpoint+path, nil)
	if err == nil {
		err = req.Write(c)
	}
	if err != nil {
		return 0, "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// Serve answers HTTP on addr in ns with f until the test ends. f is given the connection the
// request came on; its answer is the body.
func Serve(t testing.TB, ns netns.NsHandle, addr string, f func(net.Conn, *http.Request) string) {
	t.Helper()
	var ln net.Listener
	err := In(ns, func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), "tcp4", addr)
		return err
	})
	if err != nil {
		t.Fatalf("listen on %s: %v", addr, err)
	}
	ServeOn(t, ln, f)
}

// ServeOn is Serve on a listener; the test's end closes it.
func ServeOn(t testing.TB, ln net.Listener, f func(net.Conn, *http.Request) string) {
	type connKey struct{}
	s := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, _ := r.Context().Value(connKey{}).(net.Conn)
			_, _ = io.WriteString(w, f(c, r))
		}),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	t.Cleanup(func() { s.Close(); <-done })
}

// StandInAgent answers "agent" where the ECS agent's rule sends requests for the endpoint: at the
// address itself, which the bridge has, or at another one that a DNAT rule names.
func (h *Host) StandInAgent(addr string) {
	h.t.Helper()
	Serve(h.t, h.NS, addr, func(net.Conn, *http.Request) string { return "agent" })
}

// Mark returns the SO_MARK of a connection.
func Mark(c net.Conn) (uint32, error) {
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return 0, errors.New("not a TCP connection")
	}
	rc, err := tc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var mark int
	var serr error
	err = rc.Control(func(fd uintptr) {
		mark, serr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
	})
	return uint32(mark), errors.Join(err, serr)
}

// RequireTool fails the test with a message if the command is not installed.
func RequireTool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("needs %s: %v", name, err)
	}
}

var pinDirs atomic.Int64

// PinDir returns a new directory for the test on a BPF file system. It mounts the file system if
// necessary.
func PinDir(t testing.TB) string {
	t.Helper()
	const bpffs = "/sys/fs/bpf"
	var st unix.Statfs_t
	if err := unix.Statfs(bpffs, &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
		if err := unix.Mount("bpf", bpffs, "bpf", 0, ""); err != nil {
			t.Fatalf("mount bpf: %v", err)
		}
	}
	dir := filepath.Join(bpffs, fmt.Sprintf("metad-test-%d-%d-%s", os.Getpid(), pinDirs.Add(1),
		sanitize(t.Name())))
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove pins: %v", err)
		}
	})
	return dir
}

// sanitize makes a file name of a test's name; bpffs allows no dots.
func sanitize(name string) string {
	return strings.NewReplacer("/", "-", ".", "-", " ", "-").Replace(name)
}

// NoLeak checks at the end of the test, after all cleanups registered later, that the host has the
// devices it has now and no more.
func (h *Host) NoLeak() {
	h.t.Helper()
	before := map[string]bool{}
	for _, n := range h.LinkNames() {
		before[n] = true
	}
	h.t.Cleanup(func() {
		for _, n := range h.LinkNames() {
			if !before[n] {
				h.t.Errorf("device %s is left", n)
			}
		}
	})
}

// Until is expect.Until.
func Until(t testing.TB, what string, f func() bool) {
	t.Helper()
	expect.Until(t, what, f)
}
