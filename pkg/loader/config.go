package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// AttachMode is how programs are attached to network devices.
type AttachMode string

// Attach modes. TCX links (Linux 6.6) go with the process that holds them. A clsact filter stays
// when the process dies, but leaves every packet alone from then on.
const (
	// TCX if the kernel has it, and clsact where there are many devices; else clsact
	AttachAuto   AttachMode = "auto"
	AttachTCX    AttachMode = "tcx"
	AttachClsact AttachMode = "clsact"
)

// OnExit says what happens to packets for the endpoint while metad is away.
type OnExit string

// OnExitOpen lets packets go where they go without metad. OnExitDrop drops them at the ports and
// bridges that metad was attached to, until the next start or Detach. A port made later is open.
// OnExitDrop needs clsact, because a TCX link ends with the process and cannot drop.
const (
	OnExitOpen OnExit = "open"
	OnExitDrop OnExit = "drop"
)

// DefaultPinDir is where the maps are pinned if Config.PinDir is empty.
const DefaultPinDir = "/sys/fs/bpf/metad"

// DefaultBridges are the ECS agent's bridge, Docker's default bridge, the bridge by which
// containers on overlay networks leave the host, and the bridges that Docker makes for its
// networks.
var DefaultBridges = []string{"ecs-bridge", "docker0", "docker_gwbridge", "br-*"}

// RequiredCaps are the capabilities that Open needs, in the order error messages name them.
// CAP_SYS_ADMIN is for making and entering network namespaces (setns(2)), and includes CAP_BPF and
// CAP_PERFMON (capabilities(7)).
var RequiredCaps = []Cap{
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN},
	{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN},
}

// Cap is a Linux capability.
type Cap struct {
	Name string
	Bit  uint
}

// Errors that a caller may want to tell apart.
var (
	// ErrPermission: a capability is missing.
	ErrPermission = errors.New("permission denied")
	// ErrKernel: the kernel is too old.
	ErrKernel = errors.New("kernel not supported")
	// ErrNoBPFFS: PinDir is not on a BPF file system.
	ErrNoBPFFS = errors.New("not on a bpf file system (mount -t bpf bpf /sys/fs/bpf)")
	// ErrPinDir: PinDir is not a directory, or another user owns it or may write to it.
	ErrPinDir = errors.New("pin directory is not metad's own")
	// ErrFull: the map of tasks has no room for another address.
	ErrFull = errors.New("map full")
	// ErrNoPort: the port that an entry names does not exist.
	ErrNoPort = errors.New("no such port")
	// ErrForeignFilter: another program's filter has metad's priority and handle.
	ErrForeignFilter = errors.New("another program's filter has metad's place")
)

// Config configures Open and TakeOver. The zero value is usable.
type Config struct {
	// Bridges are patterns (path.Match) of the names of the bridges to watch; nil:
	// DefaultBridges.
	Bridges []string
	// PinDir is a directory on a BPF file system, made if missing; empty: DefaultPinDir.
	PinDir string
	// Attach is how to attach; empty: AttachAuto.
	Attach AttachMode
	// TrustBridge lets the address and MAC alone identify a task whose port is not hooked.
	TrustBridge bool
	// OnExit says what happens to packets once metad is gone; empty: OnExitOpen.
	OnExit OnExit
	// Netns is the host's network namespace; 0 or netns.None(): the calling thread's. The
	// caller keeps it open, and closes it.
	Netns netns.NsHandle
	// HostLevels are the depths, below the root, of the cgroups of containers in the host's
	// network; zero: 2 and 3, Docker's and the ECS agent's.
	HostLevels [2]uint8
	// MaxEntries is the number of addresses that can have a task; 0: the C's size (16384).
	MaxEntries int
	// Log receives changes of state; nil: none.
	Log *zap.Logger
	// HostRoute adds a route by which the host's own processes reach the endpoint while metad
	// is armed. Their source address is HostAddr, which belongs to no task. The ECS agent's
	// OUTPUT rule, if there is one, applies before any route.
	HostRoute bool
	// AgentAddr is the address to which the ECS agent's rule sends connections to the endpoint.
	// A connection that the agent accepted there while metad was not running stays with the
	// agent. Zero: there is no agent.
	AgentAddr netip.AddrPort
	// OnPort is called when a port has been hooked that did not exist at Open or TakeOver: a
	// container starts. One call at a time, no lock held; nil: none.
	OnPort func(ifindex int)
	// OnPortGone is called when a device that carried task addresses or a hook no longer
	// exists, after the addresses behind it have left the kernel. One call at a time, no lock
	// held; nil: none.
	OnPortGone func(ifindex int)
}

// withDefaults returns c with every zero value replaced, or an error that names the bad field.
func (c Config) withDefaults() (Config, error) {
	if c.Bridges == nil {
		c.Bridges = DefaultBridges
	}
	if len(c.Bridges) == 0 {
		return c, errors.New("Bridges: no pattern")
	}
	c.Bridges = slices.Clone(c.Bridges)
	for _, p := range c.Bridges {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			return c, fmt.Errorf("Bridges: bad pattern %q", p)
		}
	}
	if c.PinDir == "" {
		c.PinDir = DefaultPinDir
	}
	if !filepath.IsAbs(c.PinDir) {
		return c, fmt.Errorf("PinDir: %q is not absolute", c.PinDir)
	}
	if c.Attach == "" {
		c.Attach = AttachAuto
	}
	if c.OnExit == "" {
		c.OnExit = OnExitOpen
	}
	switch c.OnExit {
	case OnExitOpen:
	case OnExitDrop:
		if c.Attach == AttachTCX {
			return c, errors.New("OnExit: drop needs clsact, Attach is tcx")
		}
		c.Attach = AttachClsact
	default:
		return c, fmt.Errorf("OnExit: %q is neither open nor drop", c.OnExit)
	}
	switch c.Attach {
	case AttachAuto, AttachTCX, AttachClsact:
	default:
		return c, fmt.Errorf("Attach: %q is none of auto, tcx, clsact", c.Attach)
	}
	if c.Netns < netns.None() {
		return c, fmt.Errorf("Netns: %d is not a namespace", c.Netns)
	}
	if c.MaxEntries < 0 || c.MaxEntries > 1<<20 {
		return c, fmt.Errorf("MaxEntries: %d is not between 0 and %d", c.MaxEntries, 1<<20)
	}
	if c.HostLevels == ([2]uint8{}) {
		c.HostLevels = [2]uint8{2, 3}
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.AgentAddr != (netip.AddrPort{}) && (!c.AgentAddr.Addr().Is4() ||
		c.AgentAddr.Port() == 0) {
		return c, fmt.Errorf("AgentAddr: %s is not an IPv4 address and a port", c.AgentAddr)
	}
	if c.OnPort == nil {
		c.OnPort = func(int) {}
	}
	if c.OnPortGone == nil {
		c.OnPortGone = func(int) {}
	}
	return c, nil
}

// checkHost checks what the kernel would refuse later with only an error number.
func checkHost() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	if err := checkRelease(unix.ByteSliceToString(u.Release[:])); err != nil {
		return err
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	return checkCaps(uint64(data[1].Effective)<<32 | uint64(data[0].Effective))
}

func checkCaps(effective uint64) error {
	var missing []string
	for _, c := range RequiredCaps {
		if effective&(1<<c.Bit) == 0 {
			missing = append(missing, c.Name)
		}
	}
	if n := len(missing); n > 1 {
		missing = append(missing[:n-2], missing[n-2]+" and "+missing[n-1])
	}
	if missing != nil {
		return fmt.Errorf("%w: needs %s", ErrPermission, strings.Join(missing, ", "))
	}
	return nil
}

// checkRelease refuses a kernel before Linux 5.10: bpf_redirect_peer came with that version.
func checkRelease(release string) error {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return fmt.Errorf("%w: cannot read the release %q", ErrKernel, release)
	}
	if major < 5 || major == 5 && minor < 10 {
		return fmt.Errorf("%w: needs Linux 5.10 or later; this is %d.%d", ErrKernel, major,
			minor)
	}
	return nil
}
