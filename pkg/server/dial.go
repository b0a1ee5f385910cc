package server

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"metad/bpf"
)

// standIn returns the loopback address from which metad connects to the agent for the source with
// tag: the agent limits /v1/credentials by source address. It is in 127.64.0.0/10 for a task's tag,
// and in 127.128.0.0/10 for a port's. Without a tag it is the zero Addr.
func standIn(tag uint32) netip.Addr {
	const port = uint32(bpf.MetadTagTAG_PORT)
	if tag == uint32(bpf.MetadTagTAG_NONE) {
		return netip.Addr{}
	}
	net := byte(64)
	if tag&port != 0 {
		net = 128
	}
	return netip.AddrFrom4([4]byte{127, net | byte(tag>>16)&0x3f, byte(tag >> 8), byte(tag)})
}

// dialAgent connects to the agent at address, from the address from if that is possible. For an
// agent that is not on loopback, for example, it is not.
func (s *Server) dialAgent(ctx context.Context, address string, from netip.Addr) (net.Conn, error) {
	if s.cfg.AgentTrusted != nil && !s.cfg.AgentTrusted() {
		return nil, syscall.ECONNREFUSED
	}
	d := net.Dialer{KeepAlive: -1}
	to, err := netip.ParseAddrPort(address)
	if err != nil || !to.Addr().Is4() || !to.Addr().IsLoopback() || !from.IsValid() {
		return d.DialContext(ctx, "tcp", address)
	}
	own := d
	own.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	c, err := own.DialContext(ctx, "tcp", address)
	if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EADDRINUSE) {
		return d.DialContext(ctx, "tcp", address)
	}
	return c, err
}
