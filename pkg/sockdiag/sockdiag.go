// Package sockdiag asks the kernel, by inet_diag, in which cgroup a TCP socket of another network
// namespace was made.
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrUnknown means that the kernel has no such socket, or does not say in which cgroup it was made.
var ErrUnknown = errors.New("no socket with a cgroup")

// patience is for an answer that the kernel makes in microseconds.
const patience = 100 * time.Millisecond

// Cgroup returns the id of the cgroup (v2) in which the socket of the connection from local to
// remote was made, as the network namespace at path has it. Both are IPv4. It enters the namespace
// for a moment, and needs CAP_SYS_ADMIN. Errors: ErrUnknown.
func Cgroup(path string, local, remote netip.AddrPort) (uint64, error) {
	if !local.Addr().Is4() || !remote.Addr().Is4() {
		return 0, fmt.Errorf("socket of %s: not IPv4", local)
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return 0, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	s, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, fmt.Errorf("enter network namespace: %w", err)
	}
	defer s.Close()
	limit := unix.NsecToTimeval(int64(patience))
	if err := errors.Join(s.SetSendTimeout(&limit), s.SetReceiveTimeout(&limit)); err != nil {
		return 0, err
	}
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, 0)
	req.AddData(request{local, remote})
	if err := s.Send(req); err != nil {
		return 0, fmt.Errorf("ask for a socket: %w", err)
	}
	answers, from, err := s.Receive()
	if err != nil {
		return 0, fmt.Errorf("ask for a socket: %w", err)
	}
	if from.Pid != nl.PidKernel || len(answers) != 1 {
		return 0, fmt.Errorf("ask for a socket: %d answers of %d", len(answers), from.Pid)
	}
	return parse(answers[0].Header.Type, answers[0].Data)
}

// request is a struct inet_diag_req_v2 (linux/inet_diag.h) for one connection.
type request struct{ local, remote netip.AddrPort }

const (
	requestLen = 56
	messageLen = 72 // of struct inet_diag_msg, which attributes follow
)

// Len implements nl.NetlinkRequestData.
func (r request) Len() int { return requestLen }

// Serialize implements nl.NetlinkRequestData.
func (r request) Serialize() []byte {
	b := make([]byte, requestLen)
	b[0], b[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 0xffffffff) // in any state
	binary.BigEndian.PutUint16(b[8:], r.local.Port())
	binary.BigEndian.PutUint16(b[10:], r.remote.Port())
	src, dst := r.local.Addr().As4(), r.remote.Addr().As4()
	copy(b[12:], src[:])
	copy(b[28:], dst[:])
	binary.NativeEndian.PutUint64(b[48:], 0xffffffffffffffff) // INET_DIAG_NOCOOKIE
	return b
}

// parse reads what the kernel answers: an error, or a struct inet_diag_msg and attributes.
func parse(kind uint16, b []byte) (uint64, error) {
	if kind == unix.NLMSG_ERROR && len(b) >= 4 {
		if e := unix.Errno(-int32(binary.NativeEndian.Uint32(b))); e != unix.ENOENT {
			return 0, fmt.Errorf("ask for a socket: %w", e)
		}
		return 0, ErrUnknown
	}
	if len(b) < messageLen {
		return 0, ErrUnknown
	}
	attrs, err := nl.ParseRouteAttr(b[messageLen:])
	if err != nil {
		return 0, fmt.Errorf("read what is said of a socket: %w", err)
	}
	for _, a := range attrs {
		if a.Attr.Type == netlink.INET_DIAG_CGROUP_ID && len(a.Value) == 8 {
			return binary.NativeEndian.Uint64(a.Value), nil
		}
	}
	return 0, ErrUnknown
}
