// Command bench compares a byokd mount with the raw filesystem below it and
// with peers that are installed: go-fuse's loopback filesystem, the price of
// FUSE without encryption, served by this program itself with byokd's settings
// and without kernel passthrough; gocryptfs; and encfs, cryfs and rclone's crypt
// remote, which are slow and measured once. What is not installed is told and left
// out; `make bench-peers` installs it.
//
// Every figure is the median of interleaved rounds: in each round every load
// runs once on every peer, in an order that turns from round to round, each in
// a process of its own. The state of the page cache is part of a load: cold
// means that the kernel dropped every page, name and inode before, of the lower
// filesystem too. It prints figures and asserts nothing. The machine is described;
// where it was busy at the beginning, a warning says so.
//
// The parts (-parts):
//
//   - fs: the filesystem, with processor time and peak memory of the servers;
//   - s3: the S3 proxy, the way straight to the same upstream (devcloud), and
//     rclone's crypt remote served over S3 where an rclone is installed that can
//     (1.65 or newer). It needs no root;
//   - gate: what the gate takes from each request;
//   - freeze: the key of a daemon under load is disabled and enabled;
//   - limits, and memlimits on a disk in memory: the loads on byokd and on a byokd that
//     copies where it would seal: what is in the way of a goal, cryptography, the
//     format or its code, or FUSE;
//   - scale: a million files, a file of 1 TiB, 10,000 open files, 64 writers, starts:
//     curves of what an operation costs as there is more of everything.
//
// For example:
//
//	make bench
//	go run ./bench -parts s3
//	go run ./bench -parts fs -rounds 5 -loads 'append|msync' -peers raw,byokd
//	go run ./bench -parts scale -scale 'files|start' -files 100000 -plot scale.svg
package main
