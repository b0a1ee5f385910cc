package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strings"
	"testing"

	"metad/pkg/takeover"
)

func TestRunDirError(t *testing.T) {
	if err := runDirError("/r", takeover.ErrRefused); !errors.Is(err, takeover.ErrRefused) ||
		strings.Contains(err.Error(), "run-dir") {
		t.Errorf("refused: got %v", err)
	}
	if err := runDirError("/r", fmt.Errorf("mkdir: %w", fs.ErrPermission)); !errors.Is(err,
		fs.ErrPermission) || !strings.HasPrefix(err.Error(), `run-dir "/r": mkdir`) {
		t.Errorf("not writable: got %v", err)
	}
}

func TestAgentAddr(t *testing.T) {
	f := func(url, want string) {
		t.Helper()
		addr := netip.AddrPort{}
		if want != "" {
			addr = netip.MustParseAddrPort(want)
		}
		if got := agentAddr(url); got != addr {
			t.Errorf("%q: got %v, want %q", url, got, want)
		}
	}
	f("http://127.0.0.1:51679", "127.0.0.1:51679")
	f("http://localhost:51679", "127.0.0.1:51679")
	f("http://10.0.0.1", "10.0.0.1:80")
	f("http://agent:51679", "") // a name
	f("http://[::1]:51679", "") // rules for it are IPv4's
	f("", "")
}
