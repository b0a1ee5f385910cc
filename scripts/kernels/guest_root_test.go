//go:build root

package main

import (
	"os/exec"
	"strings"
	"testing"
)

// TestRootGuest checks what a guest gives to the tests of the data path: a network namespace whose
// nat table takes the agent's rule by iptables and shows it by nft.
func TestRootGuest(t *testing.T) {
	const rule = "unshare -n sh -ec '" +
		"iptables -t nat -A PREROUTING -p tcp -d 169.254.170.2 --dport 80 -j DNAT --to-destination 127.0.0.1:51679; " +
		"nft list ruleset'"
	out, err := exec.Command("sh", "-c", rule).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "127.0.0.1:51679") {
		t.Errorf("nat rule: got %v, %s", err, out)
	}
}
