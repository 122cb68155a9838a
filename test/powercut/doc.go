// Package powercut cuts the power under a byokd volume, thousands of times,
// and looks whether anything is gone that was acknowledged.
//
// # Method
//
// A [disk] is a file served by FUSE, under a loop device, under ext4 or XFS. It
// keeps every write, flush and discard that the lower filesystem sends, in
// order. Workloads run on a byokd volume on that filesystem, with freezes in
// between, and note for each operation the place in the disk's log where it
// began and where it was acknowledged (fsync, fdatasync, msync or COMMIT had
// returned).
//
// Afterwards crash states are made of the log: all writes that were complete
// when the last flush before a cut began, and a random subset of the later ones,
// in pieces of 4 KiB. Half of the cuts are anywhere, half exactly where something
// was acknowledged, most of these with nothing of what came after the flush: an
// acknowledgement that came too early is wrong only until the next flush. Each
// state is mounted, so that the lower
// journal recovers; the volume on it is mounted by byokd; and every workload
// compares what it reads with what it was acknowledged. What was acknowledged
// must be there. What was begun and not acknowledged may be old, new or zeros,
// and may never be an error.
//
// Two controls show that the harness is seen to work: the same workloads on the
// bare lower filesystem lose nothing either, and a deliberately naive format
// (short last block, blocks not aligned; rewrites through the page cache) does.
//
// # A disk that fails
//
// The same disk can be made to fail reads and writes at random and to answer late,
// below ext4 below byokd, where a block layer's error injection would be if the
// kernel had one (TestFaultyDisk).
//
// # Isolation
//
// The tests run in a mount namespace of their own, so that nobody else on the
// machine can hold a copy of a filesystem whose medium becomes the next state.
//
// # Names
//
// A *recording* is one run of workloads on one disk. A *cut* is a place in its
// log. A *point* is one cut with one subset, mounted and compared.
//
// # Reproduction
//
// Recordings run concurrently and are not repeatable bit for bit; the choice of
// cuts and subsets follows the seed that is logged. BYOKD_POWERCUT_KEEP names a
// directory into which the image of each failing point is copied.
// BYOKD_POWERCUT_ROUNDS says how often each test records anew (1), and
// BYOKD_POWERCUT_BURNERS how many processes compete for the processors meanwhile
// (0).
package powercut
