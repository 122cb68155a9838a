package main

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/seal"
)

// ownership is that of a new volume.
func (v *volume) ownership() fs.Ownership {
	sealed := v.passed() || !ownsLower()
	switch v.cfg.Volume.Ownership {
	case ownershipSealed:
		sealed = true
	case ownershipLower:
		sealed = false
	}
	if sealed {
		return fs.OwnershipSealed
	}
	return fs.OwnershipLower
}

// ownsLower tells whether this process may give lower files to others and open those of others.
func ownsLower() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // of 32 capabilities each
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	const needed = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER
	return data[0].Effective&needed == needed
}

// sameOwnership refuses a configuration that asks for another ownership than the volume has.
func (v *volume) sameOwnership() error {
	has, wants := fs.OwnershipOf(v.header).String(), v.cfg.Volume.Ownership
	if wants == has || wants == ownershipAuto || wants == "" {
		return nil
	}
	return fmt.Errorf("the volume in %s was made with ownership %s, the configuration says volume.ownership: %s. It is settled when a volume is made: "+
		"set %s or auto; or give an empty directory as volume.lower, and copy the files from one mount to the other (cp -a, as root)", v.cfg.Volume.Lower, has, wants, has)
}

// warnOfOwnership says what an unprivileged byokd cannot do with a volume that was made by a privileged one.
func (v *volume) warnOfOwnership() {
	if fs.OwnershipOf(v.header) == fs.OwnershipLower && !ownsLower() {
		v.log.Warn("the volume keeps owners and modes on its lower files, and byokd lacks the capabilities for that (CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER): " +
			"what is made in it belongs to byokd's user, and chown fails. A new volume (volume.ownership: sealed) has no such limits")
	}
}

func ownershipInWords(h seal.VolumeHeader) string {
	if h.SealedOwnership {
		return "sealed; lower files are byokd's own"
	}
	return "those of the lower files"
}
