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
)

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

// tellDescriptors warns where there are few descriptors.
func tellDescriptors(log *zap.Logger) {
	if err := fewDescriptorsError(); err != nil {
		log.Warn("few files may be open at once: under load calls will fail with EMFILE", zap.Error(err))
	}
}

func fewDescriptorsError() error {
	if limit := descriptorLimit(); limit < fewDescriptors {
		return fmt.Errorf("the limit of open files is %d; raise it to %d or more (LimitNOFILE= of systemd, --ulimit nofile= of docker, ulimit -Hn)", limit, fewDescriptors)
	}
	return nil
}
