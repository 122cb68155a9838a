// Package fs is the encrypted filesystem: a FUSE mount whose files are kept,
// sealed, in a lower directory of an ordinary filesystem.
//
// # Shape
//
// [loop] reads requests from the FUSE device, asks the gate, lets go-fuse's
// protocol server decode the request into one call of fuse.RawFileSystem (type
// call, files ops_*.go), and writes the reply. Gate, parking and the final
// look at the epoch are in the loop and nowhere else, so no operation can
// forget them. An operation translates plain ranges to blocks (content.go),
// does one lower read or write, and seals or opens the blocks with keys that
// only its pass can give.
//
// # Guarantees
//
//   - No reply that carries plaintext is written after its epoch ended: the
//     pass is asked last, and a reply that lost the race is wiped and the
//     request enters again, which waits.
//   - A frozen call waits; it never fails because of a freeze. It ends early
//     only when its caller is being killed (EINTR, parking.go).
//   - A freeze leaves no page of file data in the kernel's cache (freeze.go).
//   - A lower block is replaced as a whole and never changed in a page that may
//     be under writeback (dirty.go, lower.go).
//   - A mount that was passed to us outlives us: calls that we did not answer are
//     answered by the next byokd (passed.go, resent.go).
//   - The process is the only user of the lower directory: it holds a lock on
//     it from [OpenLocked] to [Filesystem.Close].
//
// # Order of locks
//
// nodeTable.mu, node.content, node.owner.mu (the root's after another's), node.meta; node.ranges.mu and seams.mu, which are
// held for moments, last. nodeTable.mu is not taken while one of the others is held.
// No notification is sent to the kernel from a handler, nor with a lock held
// that a handler takes: the kernel may wait for a handler to answer first. The
// exceptions, which wait for nobody, say why (askAgain, askForSpace).
package fs
