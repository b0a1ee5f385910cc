package loader

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/internal/expect"
)

func TestConfig(t *testing.T) {
	f := func(c Config, field string) {
		t.Helper()
		_, err := c.withDefaults()
		expect.Field(t, err, field)
	}
	f(Config{}, "")
	f(Config{Bridges: []string{}}, "Bridges")
	f(Config{Bridges: []string{"br-["}}, "Bridges")
	f(Config{Bridges: []string{""}}, "Bridges")
	f(Config{PinDir: "relative"}, "PinDir")
	f(Config{Attach: "xdp"}, "Attach")
	f(Config{OnExit: "maybe"}, "OnExit")
	f(Config{OnExit: OnExitDrop, Attach: AttachTCX}, "OnExit")
	f(Config{OnExit: OnExitDrop}, "")
	f(Config{Netns: -2}, "Netns")
	f(Config{MaxEntries: -1}, "MaxEntries")
	f(Config{AgentAddr: netip.MustParseAddrPort("[::1]:80")}, "AgentAddr")
	f(Config{AgentAddr: netip.MustParseAddrPort("127.0.0.1:0")}, "AgentAddr")
	f(Config{AgentAddr: netip.MustParseAddrPort("127.0.0.1:51679")}, "")
	c, err := Config{OnExit: OnExitDrop}.withDefaults()
	if err != nil || c.Attach != AttachClsact {
		t.Errorf("drop attaches by %q, want clsact", c.Attach)
	}
}

func TestWatches(t *testing.T) {
	p := newPorts(nil, DefaultBridges, zap.NewNop())
	for name, want := range map[string]bool{"docker0": true, "ecs-bridge": true,
		"br-12ab": true, "docker1": false, "xbr-1": false, "": false} {
		if got := p.watches(name); got != want {
			t.Errorf("%q: got %v, want %v", name, got, want)
		}
	}
}

func TestCheckRelease(t *testing.T) {
	f := func(release, want string) {
		t.Helper()
		err := checkRelease(release)
		if want == "" && err != nil || want != "" && (!errors.Is(err, ErrKernel) ||
			!strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", release, err, want)
		}
	}
	f("5.10.0-8-amd64", "")
	f("6.18.44-v1", "")
	f("10.0", "")
	f("5.4.0-1", "Linux 5.10 or later; this is 5.4")
	f("4.19", "Linux 5.10 or later; this is 4.19")
	f("strange", "cannot read")
}

func TestCheckCaps(t *testing.T) {
	f := func(effective uint64, want string) {
		t.Helper()
		err := checkCaps(effective)
		if want == "" && err != nil || want != "" && (!errors.Is(err, ErrPermission) ||
			!strings.HasSuffix(err.Error(), want)) {
			t.Errorf("%#x: got %v, want %q", effective, err, want)
		}
	}
	f(1<<unix.CAP_SYS_ADMIN, "needs CAP_NET_ADMIN")
	f(1<<unix.CAP_NET_ADMIN|1<<unix.CAP_SYS_ADMIN, "")
	f(1<<unix.CAP_NET_ADMIN|1<<unix.CAP_BPF, "needs CAP_SYS_ADMIN")
	f(0, "needs CAP_NET_ADMIN and CAP_SYS_ADMIN")
}

func TestIsPinOf(t *testing.T) {
	for file, want := range map[string]bool{"ip_task_v1": true, "ip_task_v12": true,
		"ip_task": false, "ip_task_vx": false, "ip_task_v1.bak": false, "counters_v1": false} {
		if got := isPinOf(file, "ip_task"); got != want {
			t.Errorf("%q: got %v, want %v", file, got, want)
		}
	}
}
