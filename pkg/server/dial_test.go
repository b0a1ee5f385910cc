package server

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"

	"metad/bpf"
)

// The agent sees each task by a loopback address of its own, the same each time, and metad's own
// questions by another.
func TestAgentSeesTasksApart(t *testing.T) {
	agent := serveAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = io.WriteString(w, host)
	}))
	cfg := testConfig()
	cfg.AgentURL = "http://" + agent.addr
	port := uint32(bpf.MetadTagTAG_PORT)
	tags := map[netip.Addr]uint32{addrT: 1, addrB: 0x10002, addrU: port | 7,
		netip.MustParseAddr("127.1.0.10"): 0}
	cfg.Tag = func(c net.Conn) (uint32, error) {
		return tags[c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()], nil
	}
	h := newHost(t, cfg, newTask(), newOther())
	for from, want := range map[netip.Addr]string{
		addrT: "127.64.0.1", addrB: "127.65.0.2", addrU: "127.128.0.7", netip.MustParseAddr("127.1.0.10"): "127.0.0.1",
	} {
		for range 2 {
			if got := h.get(t, from, "/v1/credentials").body; got != want {
				t.Errorf("tag %#x: the agent saw %q, want %s", tags[from], got,
					want)
			}
		}
	}
}

// An agent that such an address does not reach is asked without it, and one that is not trusted is
// not asked.
func TestDialAgentFallsBack(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	h := newStopped(t, testConfig())
	// no address of this host
	c, err := h.dialAgent(t.Context(), ln.Addr().String(), netip.MustParseAddr("192.0.2.1"))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	h.cfg.AgentTrusted = func() bool { return false }
	if c, err := h.dialAgent(t.Context(), ln.Addr().String(), netip.Addr{}); err == nil {
		c.Close()
		t.Error("an agent that is not trusted was asked")
	}
}
