// Package keeper is the process that outlives the one that does the work, so that
// the latter may be killed, run out of memory or be replaced under load while those
// who use its mount wait for some milliseconds and notice nothing else.
//
// The keeper ([Run]) is the parent. It knows neither configuration nor keys. It
// starts the worker, holds the descriptors that the worker has handed over (the
// FUSE device, the journal of the mount, listeners, inodes without a name), and
// gives them to the next worker when this one has died. The worker's side is
// [Worker].
//
// # Why a descriptor handed over is safe
//
// Messages go over a SOCK_SEQPACKET pair. A message that was sent lies in the
// keeper's queue, descriptors and all, also when its sender is killed the moment
// after: no acknowledgement is waited for.
//
// # The fence
//
// A new worker must not run before the old one can do nothing any more. The end of
// the file on the socket says so: the kernel closes a process's descriptors when
// its last thread that shares them has left its last system call. Waiting for the
// process itself (wait4) would wait for its threads with descriptors of their own,
// too, which may hang in a notification to the kernel until a request is answered
// that the next worker is to answer; they touch nothing but the kernel's cache.
package keeper
