package objstore

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A client that closes its connection in the midst of a body larger than our
// receive buffer cannot tell us: its FIN stands behind bytes that nobody reads
// while the key is frozen. But clients of a sidecar live in our own network
// namespace, so the kernel can be asked for the state of the other end.

const (
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY of linux/sock_diag.h
	// offsets and sizes of linux/inet_diag.h: a netlink header, inet_diag_req_v2
	// (family, protocol, ext, pad, states, and the socket's id).
	diagRequestSize = unix.SizeofNlMsghdr + 56
	diagID          = unix.SizeofNlMsghdr + 8
	diagState       = unix.SizeofNlMsghdr + 1
)

// peerClosed reports whether the far end of a TCP connection is a socket of this
// machine that has been closed. False means open, elsewhere, or unknown.
func peerClosed(c net.Conn) bool {
	ours, ok1 := addrPort(c.LocalAddr())
	theirs, ok2 := addrPort(c.RemoteAddr())
	if !ok1 || !ok2 || ours.Addr().Is4() != theirs.Addr().Is4() {
		return false
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return false // netlink is forbidden here: only the poll remains
	}
	defer unix.Close(fd)
	// The kernel answers before sendto returns; the timeout is for surprises.
	if unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}) != nil {
		return false
	}
	if unix.Sendto(fd, diagRequest(theirs, ours), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}) != nil {
		return false
	}
	var answer [1024]byte
	n, _, err := unix.Recvfrom(fd, answer[:], 0)
	if err != nil || n <= diagState || binary.NativeEndian.Uint16(answer[4:]) != sockDiagByFamily {
		return false
	}
	switch answer[diagState] {
	case unix.BPF_TCP_FIN_WAIT1, unix.BPF_TCP_FIN_WAIT2, unix.BPF_TCP_TIME_WAIT, unix.BPF_TCP_CLOSE, unix.BPF_TCP_LAST_ACK, unix.BPF_TCP_CLOSING:
		return true
	}
	return false
}

func addrPort(a net.Addr) (netip.AddrPort, bool) {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, false
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()), true
}

// diagRequest asks for the one socket with this local and remote address.
func diagRequest(local, remote netip.AddrPort) []byte {
	b := make([]byte, diagRequestSize)
	binary.NativeEndian.PutUint32(b[0:], diagRequestSize)
	binary.NativeEndian.PutUint16(b[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	b[unix.SizeofNlMsghdr] = unix.AF_INET
	if local.Addr().Is6() {
		b[unix.SizeofNlMsghdr] = unix.AF_INET6
	}
	b[unix.SizeofNlMsghdr+1] = unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[unix.SizeofNlMsghdr+4:], ^uint32(0)) // any state
	binary.BigEndian.PutUint16(b[diagID:], local.Port())
	binary.BigEndian.PutUint16(b[diagID+2:], remote.Port())
	copy(b[diagID+4:], local.Addr().AsSlice())
	copy(b[diagID+20:], remote.Addr().AsSlice())
	copy(b[diagID+40:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) // no cookie
	return b
}
