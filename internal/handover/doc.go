// Package handover passes a FUSE mount from who may make one to who serves it: from
// the CSI node driver, which is root, to a byokd without any privilege, over a unix
// socket that only the two of them can reach. With the FUSE device come the services
// that byokd needs of its mounter (fs.Services), and a place for descriptors that
// outlive it.
//
// # Protocol
//
// The socket is SOCK_SEQPACKET; a message is one JSON object of at most 64 KiB, with
// descriptors beside it (SCM_RIGHTS). The client sends requests with a number, the
// server answers each with the same number, in any order. Unknown operations and
// fields are refused. One client is served at a time: the mount has one server.
//
// Neither keys nor data travel here: device and inode descriptors, limits, thread
// numbers.
package handover
