package main

import (
	"fmt"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// maxS3Connections bounds the connections of the S3 listener: pools of SDKs have 50 each, and an idle one
	// takes some 16 KiB.
	maxS3Connections = 4096
	// maxAdminConnections bounds those of the admin listener: kubelet, Prometheus and some panels.
	maxAdminConnections = 256
	// fewDescriptors leaves the volume some thousand files beside the connections of a busy pod.
	fewDescriptors = 8192
	// tooFewDescriptors do not suffice for byokd itself: listeners, KMS, the volume's own, some connections.
	tooFewDescriptors = 256
	// manyDescriptors is the limit that byokd gives itself where it may: an eighth of what one process may
	// have at all by default (fs.nr_open).
	manyDescriptors = 1 << 17
)

// raiseDescriptorLimit raises the hard limit, which needs CAP_SYS_RESOURCE: without, the limit stays.
func raiseDescriptorLimit() {
	if descriptorLimit() < manyDescriptors {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: manyDescriptors, Max: manyDescriptors})
	}
}

// descriptorLimit is how many files this process may have open. The Go runtime has raised the soft limit to
// the hard one.
func descriptorLimit() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fewDescriptors // it cannot fail for this process itself
	}
	return limit.Max
}

// connectionLimit keeps a listener, of which there are two, within an eighth of the descriptors: a connection
// may have another one upstream, and half of all is for the volume.
func connectionLimit(most int) int {
	return int(max(16, min(uint64(most), descriptorLimit()/8)))
}

// checkDescriptors states the limit of open files, warns where it is low, and refuses one with which byokd
// itself cannot work.
func checkDescriptors(log *zap.Logger) error {
	if err := enoughDescriptors(log); err != nil {
		return err
	}
	if err := fewDescriptorsError(); err != nil {
		log.Warn("few files may be open at once: under load calls will fail with EMFILE", zap.Error(err))
	} else {
		log.Info("limit of open files", zap.Uint64("descriptors", descriptorLimit()))
	}
	return nil
}

// enoughDescriptors raises the limit, and refuses one with which byokd could not even start.
func enoughDescriptors(log *zap.Logger) error {
	raiseDescriptorLimit()
	if descriptorLimit() < tooFewDescriptors {
		return failure(log, "too few files may be open at once", exitConfig, fewDescriptorsError())
	}
	return nil
}

func fewDescriptorsError() error {
	if limit := descriptorLimit(); limit < fewDescriptors {
		return fmt.Errorf("the limit of open files is %d; raise it to %d or more (LimitNOFILE= of systemd, --ulimit nofile= of docker, ulimit -Hn)", limit, fewDescriptors)
	}
	return nil
}
