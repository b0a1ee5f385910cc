package main

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// The listener of a port, and whose it is, is what the kernel says: by either family, and not one
// of another address.
func TestListenerOwners(t *testing.T) {
	f := func(listen, ask string, want bool) {
		t.Helper()
		ln, err := net.Listen("tcp", net.JoinHostPort(listen, "0"))
		if err != nil {
			t.Skipf("listen on %s: %v", listen, err)
		}
		defer ln.Close()
		port := uint16(ln.Addr().(*net.TCPAddr).Port)
		c, err := net.Dial("tcp", ln.Addr().String()) // a connection is no listener
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		got, err := listenerOwners(netip.AddrPortFrom(netip.MustParseAddr(ask), port))
		if err != nil {
			t.Fatal(err)
		}
		if found := len(got) == 1 && got[0] == uint32(os.Getuid()); found != want ||
			!want && len(got) != 0 {
			t.Errorf("%s, asked for %s: got %v, want this user's: %v", listen, ask, got,
				want)
		}
	}
	f("127.0.0.1", "127.0.0.1", true)
	f("0.0.0.0", "127.0.0.1", true)
	f("", "127.0.0.1", true) // both families, one listener
	f("127.0.0.2", "127.0.0.1", false)
}

// Nothing is passed on to a port that is not root's, and the log has one line for each change.
func TestAgentGuard(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	core, logs := observer.New(zap.InfoLevel)
	var owners []uint32
	var failure error
	g := newAgentGuard(netip.MustParseAddrPort(ln.Addr().String()), zap.New(core))
	logs.TakeAll() // the test's own user may be any
	g.foreign = false
	g.owners = func(netip.AddrPort) ([]uint32, error) { return owners, failure }
	f := func(what string, uids []uint32, err error, want bool, line string) {
		t.Helper()
		owners, failure = uids, err
		g.look()
		g.look()
		if got := g.trusted.Load(); got != want {
			t.Errorf("%s: trusted %v, want %v", what, got, want)
		}
		var got []string
		for _, e := range logs.TakeAll() {
			got = append(got, e.Message)
		}
		if len(got) > 1 || len(got) == 1 && got[0] != line || len(got) == 0 && line != "" {
			t.Errorf("%s: got lines %q, want %q", what, got, line)
		}
	}
	const taken = "the ECS agent's port belongs to a user: forwarding no requests"
	const unknown = "cannot find the owner of the ECS agent's port: forwarding no requests"
	const over = "the ECS agent's port no longer belongs to a user"
	f("no agent", nil, nil, false, "")
	f("root's", []uint32{0}, nil, true, "")
	f("a user's", []uint32{1000}, nil, false, taken)
	f("a user's beside root's", []uint32{0, 1000}, nil, false, "")
	f("root's again", []uint32{0}, nil, true, over)
	f("unknown", nil, errors.New("no sock_diag"), false, unknown)
	f("no agent again", nil, nil, false, over)

	if newAgentGuard(netip.MustParseAddrPort("10.0.0.1:51679"), zap.NewNop()) != nil ||
		newAgentGuard(netip.AddrPort{}, zap.NewNop()) != nil {
		t.Error("an agent that is not on loopback has a guard")
	}
}
