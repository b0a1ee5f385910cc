package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/vishvananda/netlink/nl"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// agentGuard allows connections to the ECS agent's port only while root owns its listener. On a
// host without an agent any user can listen there, and would receive every container's requests for
// credentials.
type agentGuard struct {
	log    *zap.Logger
	addr   netip.AddrPort // of the agent, on loopback
	uid    uint32         // of the listener that is trusted: root
	owners func(netip.AddrPort) ([]uint32, error)

	trusted atomic.Bool // requests may go to the listener
	foreign bool        // the state that the log shows; only look uses it
}

// newAgentGuard returns the guard of an agent at addr. It returns nil if addr is not on loopback:
// then no user of this host can listen there.
func newAgentGuard(addr netip.AddrPort, log *zap.Logger) *agentGuard {
	if !addr.IsValid() || !addr.Addr().IsLoopback() {
		return nil
	}
	g := &agentGuard{log: log, addr: addr, owners: listenerOwners}
	g.look()
	return g
}

// run looks once a second, so that requests do not need to look.
func (g *agentGuard) run(ctx context.Context) error {
	return eachSecond(ctx, g.look)
}

// look finds the owner of the listener. One call at a time.
func (g *agentGuard) look() {
	owners, err := g.owners(g.addr)
	var other *uint32
	for _, uid := range owners {
		if uid != g.uid {
			other = &uid
		}
	}
	g.trusted.Store(err == nil && len(owners) > 0 && other == nil)
	foreign := err != nil || other != nil
	switch {
	case foreign == g.foreign:
	case err != nil:
		g.log.Warn("cannot find the owner of the ECS agent's port: forwarding no requests",
			zap.Stringer("addr", g.addr), zap.Error(err))
	case foreign:
		g.log.Warn("the ECS agent's port belongs to a user: forwarding no requests",
			zap.Stringer("addr", g.addr), zap.Uint32("uid", *other))
	default:
		g.log.Info("the ECS agent's port no longer belongs to a user",
			zap.Stringer("addr", g.addr))
	}
	g.foreign = foreign
}

// diagRequest is struct inet_diag_req_v2 (include/uapi/linux/inet_diag.h): the listeners of a port.
type diagRequest struct {
	family uint8
	port   uint16
}

// Len and Serialize implement nl.NetlinkRequestData.
func (diagRequest) Len() int { return 56 }

func (r diagRequest) Serialize() []byte {
	const listen = 10 // TCP_LISTEN, include/net/tcp_states.h
	b := make([]byte, r.Len())
	b[0], b[1] = r.family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 1<<listen)
	binary.BigEndian.PutUint16(b[8:], r.port)
	binary.NativeEndian.PutUint64(b[48:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	return b
}

// listenerOwners returns the user of each listener, in the calling thread's network namespace, that
// a connection to addr could reach.
func listenerOwners(addr netip.AddrPort) (uids []uint32, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		req.AddData(diagRequest{family, addr.Port()})
		messages, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
		if err != nil {
			return nil, fmt.Errorf("listeners of port %d: %w", addr.Port(), err)
		}
		for _, m := range messages { // struct inet_diag_msg
			const source, uid, size = 8, 64, 72
			if len(m) < size || binary.BigEndian.Uint16(m[4:]) != addr.Port() {
				continue
			}
			at := netip.AddrFrom16([16]byte(m[source:])).Unmap()
			if family == unix.AF_INET {
				at = netip.AddrFrom4([4]byte(m[source:]))
			}
			if at.IsUnspecified() || at == addr.Addr() {
				uids = append(uids, binary.NativeEndian.Uint32(m[uid:]))
			}
		}
	}
	return uids, nil
}
