package testnet

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TCP flags of a Frame.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// Frame describes an Ethernet frame with an IPv4 packet with a TCP segment. Its zero values are
// those of a valid one; a test changes one thing.
type Frame struct {
	SrcMAC, DstMAC   [6]byte
	Src, Dst         netip.Addr // Dst zero: the endpoint's
	SrcPort, DstPort uint16     // DstPort zero: 80
	Seq, Ack         uint32
	Flags            byte // zero: SYN
	Options          int  // bytes of IP options (no-operation), a multiple of 4
	Payload          []byte

	EtherType   uint16 // zero: IPv4
	Protocol    byte   // zero: TCP
	Version     byte   // zero: 4
	IHL         byte   // zero: what Options makes it
	VLAN        uint16 // zero: no tag in the frame
	BadChecksum bool   // of TCP
	Cut         int    // zero: whole; else its length in bytes
}

// Bytes returns the frame.
func (f Frame) Bytes() []byte {
	or := func(v, def uint16) uint16 {
		if v == 0 {
			return def
		}
		return v
	}
	if !f.Dst.IsValid() {
		f.Dst = netip.MustParseAddrPort(Endpoint).Addr()
	}
	if f.Flags == 0 {
		f.Flags = SYN
	}
	tcp := make([]byte, 20, 20+len(f.Payload))
	binary.BigEndian.PutUint16(tcp, or(f.SrcPort, 40000))
	binary.BigEndian.PutUint16(tcp[2:], or(f.DstPort, 80))
	binary.BigEndian.PutUint32(tcp[4:], f.Seq)
	binary.BigEndian.PutUint32(tcp[8:], f.Ack)
	tcp[12], tcp[13] = 5<<4, f.Flags
	binary.BigEndian.PutUint16(tcp[14:], 64240)
	tcp = append(tcp, f.Payload...)
	src, dst := f.Src.As4(), f.Dst.As4()
	pseudo := append(append(append([]byte{}, src[:]...), dst[:]...), 0, unix.IPPROTO_TCP,
		byte(len(tcp)>>8), byte(len(tcp)))
	sum := checksum(append(pseudo, tcp...))
	if f.BadChecksum {
		sum ^= 0x5555
	}
	binary.BigEndian.PutUint16(tcp[16:], sum)

	ip := make([]byte, 20+f.Options)
	ip[0] = byte(or(uint16(f.Version), 4))<<4 | byte(or(uint16(f.IHL), uint16(5+f.Options/4)))
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(tcp)))
	binary.BigEndian.PutUint16(ip[4:], or(f.SrcPort, 40000)) // identification: as good as any
	ip[8], ip[9] = 64, byte(or(uint16(f.Protocol), unix.IPPROTO_TCP))
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	for i := 20; i < len(ip); i++ {
		ip[i] = 1
	}
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))

	b := append(append([]byte{}, f.DstMAC[:]...), f.SrcMAC[:]...)
	if f.VLAN != 0 {
		b = binary.BigEndian.AppendUint16(b, unix.ETH_P_8021Q)
		b = binary.BigEndian.AppendUint16(b, f.VLAN)
	}
	b = binary.BigEndian.AppendUint16(b, or(f.EtherType, unix.ETH_P_IP))
	b = append(append(b, ip...), tcp...)
	if f.Cut != 0 {
		b = b[:f.Cut]
	}
	return b
}

// Fragments returns the frame as two, the IP payload split after n bytes, a multiple of 8.
func (f Frame) Fragments(n int) [2][]byte {
	whole := f.Bytes()
	const eth, ip = 14, 20
	part := func(payload []byte, field uint16) []byte {
		b := append(append([]byte{}, whole[:eth+ip]...), payload...)
		binary.BigEndian.PutUint16(b[eth+2:], uint16(ip+len(payload)))
		binary.BigEndian.PutUint16(b[eth+6:], field)
		b[eth+10], b[eth+11] = 0, 0
		binary.BigEndian.PutUint16(b[eth+10:], checksum(b[eth:eth+ip]))
		return b
	}
	const moreFragments = 0x2000
	payload := whole[eth+ip:]
	return [2][]byte{part(payload[:n], moreFragments), part(payload[n:], uint16(n/8))}
}

// checksum is RFC 1071's.
func checksum(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		w := uint32(b[i]) << 8
		if i+1 < len(b) {
			w |= uint32(b[i+1])
		}
		s += w
	}
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// Raw sends and receives whole frames on one device.
type Raw struct {
	fd      int
	ifindex int
	t       testing.TB
}

// NewRaw opens the device in ns.
func NewRaw(t testing.TB, ns netns.NsHandle, device string) *Raw {
	t.Helper()
	r := &Raw{t: t}
	err := In(ns, func() error {
		d, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		r.ifindex = d.Index
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network byte order
		if r.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC,
			all); err != nil {
			return err
		}
		return errors.Join(
			unix.Bind(r.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: r.ifindex}),
			unix.SetsockoptTimeval(r.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO,
				&unix.Timeval{Usec: 20000}))
	})
	if err != nil {
		t.Fatalf("raw socket on %s: %v", device, err)
	}
	t.Cleanup(func() { unix.Close(r.fd) })
	return r
}

// BypassQdisc sends past the device's queue, and with it past the programs on its egress hook
// (packet(7)).
func (r *Raw) BypassQdisc() {
	r.t.Helper()
	if err := unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS,
		1); err != nil {
		r.t.Fatalf("bypass the queue: %v", err)
	}
}

// Send sends frames as they are.
func (r *Raw) Send(frames ...[]byte) {
	r.t.Helper()
	for _, f := range frames {
		if err := unix.Sendto(r.fd, f, 0,
			&unix.SockaddrLinklayer{Ifindex: r.ifindex}); err != nil {
			r.t.Fatalf("send frame: %v", err)
		}
	}
}

// Segment is a TCP segment from the endpoint.
type Segment struct {
	Dst     netip.Addr
	DstPort uint16
	Flags   byte
	Seq     uint32
	DstMAC  [6]byte
	Payload []byte
}

// Answer waits at most d for a segment from the endpoint to the TCP port; 0 means any.
func (r *Raw) Answer(port uint16, d time.Duration) (Segment, bool) {
	buf := make([]byte, 65536)
	for deadline := time.Now().Add(d); time.Now().Before(deadline); {
		n, from, err := unix.Recvfrom(r.fd, buf, 0)
		if err != nil || n < 54 || binary.BigEndian.Uint16(buf[12:]) != unix.ETH_P_IP ||
			buf[23] != unix.IPPROTO_TCP {
			continue
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok &&
			ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		src, _ := netip.AddrFromSlice(buf[26:30])
		tcp := 14 + int(buf[14]&15)*4
		s := Segment{DstPort: binary.BigEndian.Uint16(buf[tcp+2:]), Flags: buf[tcp+13],
			Seq: binary.BigEndian.Uint32(buf[tcp+4:])}
		s.Dst, _ = netip.AddrFromSlice(buf[30:34])
		copy(s.DstMAC[:], buf)
		if ip := buf[14 : 14+binary.BigEndian.Uint16(buf[16:])]; len(ip) > tcp-14+
			int(buf[tcp+12]>>4)*4 {
			s.Payload = slices.Clone(ip[tcp-14+int(buf[tcp+12]>>4)*4:])
		}
		if netip.AddrPortFrom(src,
			binary.BigEndian.Uint16(buf[tcp:])).String() == Endpoint &&
			(port == 0 || s.DstPort == port) {
			return s, true
		}
	}
	return Segment{}, false
}

// GratuitousARP returns a broadcast that says that addr is at mac.
func GratuitousARP(mac [6]byte, addr netip.Addr) []byte {
	b := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	b = append(b, mac[:]...)
	b = append(b, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1) // ARP: Ethernet, IPv4, request
	a := addr.As4()
	b = append(append(b, mac[:]...), a[:]...)
	return append(append(b, 0, 0, 0, 0, 0, 0), a[:]...)
}
