// Command bench compares a byokd mount with the raw filesystem below it and
// with peers that are installed: go-fuse's loopback filesystem, the price of
// FUSE without encryption, served by this program itself with byokd's settings
// and without kernel passthrough; and gocryptfs.
//
// Every figure is the median of interleaved rounds: in each round every load
// runs once on every peer, in an order that turns from round to round, each in
// a process of its own. The state of the page cache is part of a load: cold
// means that the kernel dropped every page, name and inode before, of the lower
// filesystem too. It prints figures and asserts nothing.
//
// A second part compares the S3 proxy with the way straight to the same upstream
// (devcloud), and with rclone's crypt remote served over S3 where an rclone is
// installed that can (1.65 or newer). It needs no root.
//
//	make bench
//	go run ./bench -parts s3
//	go run ./bench -rounds 5 -loads 'append|msync' -peers raw,byokd
package main
