package main

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/procfs"
)

// tcpListen is the state of a listening TCP socket in /proc/net/tcp.
const tcpListen = 0x0a

// holders are the processes that have a socket, by number, with their names. None are known where they are in a PID namespace, or
// belong to a user, that we may not look into.
type holders map[int32]string

func (h holders) String() string {
	if len(h) == 0 {
		return "a process that cannot be seen from here (as root, and outside of the container: ss -ltnup, ss -xlp)"
	}
	var all []string
	for _, pid := range slices.Sorted(maps.Keys(h)) {
		all = append(all, fmt.Sprintf("%s (pid %d)", h[pid], pid))
	}
	return strings.Join(all, ", ")
}

// mayBe tells whether one of them is one of others: yes, as far as can be seen, where one side is not known.
func (h holders) mayBe(others holders) bool {
	if len(h) == 0 || len(others) == 0 {
		return true
	}
	for pid := range h {
		if _, found := others[pid]; found {
			return true
		}
	}
	return false
}

// name finds the names of processes of which the numbers are known.
func (h holders) name() {
	for pid := range h {
		h[pid] = "a process"
		if p, err := procfs.NewProc(int(pid)); err == nil {
			if comm, err := p.Comm(); err == nil {
				h[pid] = comm
			}
		}
	}
}

// holdersOf finds who has the sockets that are in the way of one at an address. What cannot be read is as good as not there.
func holdersOf(network, address string) holders {
	found := holders{}
	targets := map[string]bool{}
	for _, inode := range socketsAt(network, address) {
		targets["socket:["+strconv.FormatUint(inode, 10)+"]"] = true
	}
	if len(targets) == 0 {
		return found
	}
	all, err := procfs.AllProcs()
	if err != nil {
		return found
	}
	for _, p := range all {
		open, err := p.FileDescriptorTargets()
		if err == nil && slices.ContainsFunc(open, func(target string) bool { return targets[target] }) {
			found[int32(p.PID)] = ""
		}
	}
	found.name()
	return found
}

// socketsAt are the inodes of the sockets that listen at an address, or at all addresses with its port.
func socketsAt(network, address string) (inodes []uint64) {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return nil
	}
	want, err := net.ResolveTCPAddr("tcp", address) // for ports and addresses there is no difference to UDP
	if err != nil {
		return nil
	}
	note := func(ip net.IP, port, state, inode uint64) {
		overlap := want.IP == nil || want.IP.IsUnspecified() || ip.IsUnspecified() || ip.Equal(want.IP)
		if int(port) == want.Port && overlap && (network == "udp" || state == tcpListen) {
			inodes = append(inodes, inode)
		}
	}
	if network == "udp" {
		for _, read := range []func() (procfs.NetUDP, error){proc.NetUDP, proc.NetUDP6} {
			lines, _ := read()
			for _, s := range lines {
				note(s.LocalAddr, s.LocalPort, s.St, s.Inode)
			}
		}
		return inodes
	}
	//lint:ignore SA1019 slow where there are many sockets; it is read once, at a start that has failed, and needs no netlink module
	for _, read := range []func() (procfs.NetTCP, error){proc.NetTCP, proc.NetTCP6} {
		lines, _ := read()
		for _, s := range lines {
			note(s.LocalAddr, s.LocalPort, s.St, s.Inode)
		}
	}
	return inodes
}
