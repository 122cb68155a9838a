package fs

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/internal/seal"
)

// readMark reads the record of the header's newest generation; nil without one.
// It is not authentic before checkMark.
func readMark(lower string) (*seal.VolumeMark, error) {
	path := filepath.Join(lower, seal.VolumeMarkName)
	text, err := durable.ReadFile(path, seal.VolumeMarkMax)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	mark, err := seal.ParseVolumeMark(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &mark, nil
}

// checkMark verifies header and mark with the volume's root key, and refuses a
// header that is older than the mark. It runs inside seal.Do.
func checkMark(root *seal.Root, header seal.VolumeHeader, mark *seal.VolumeMark) error {
	if err := root.VerifyVolumeHeader(header); err != nil {
		return err
	}
	if mark == nil {
		return nil
	}
	if err := root.VerifyVolumeMark(*mark); err != nil {
		return fmt.Errorf("%s: %w", seal.VolumeMarkName, err)
	}
	return refuseOlder(header.Generation, mark.Generation)
}

// refuseOlder refuses a header below the newest generation that was seen.
func refuseOlder(generation, newest uint64) error {
	if generation >= newest {
		return nil
	}
	return fmt.Errorf("%w: it is of generation %d, and generation %d was seen here. Put the newest %s back; if it is lost and the KMS key of the old one shall protect the volume again, remove %s",
		ErrOldHeader, generation, newest, seal.VolumeHeaderName, seal.VolumeMarkName)
}

// writeMark makes a signed mark durable.
func writeMark(lower string, mark seal.VolumeMark) error {
	return durable.WriteFile(filepath.Join(lower, seal.VolumeMarkName), mark.Marshal(), 0o600)
}
