package keyguard

import (
	"bytes"
	"crypto/subtle"
	"fmt"

	"github.com/byokd/byokd/internal/seal"
)

// maxRecognized bounds the commitments that are kept, some 50 bytes each: the pinned roots
// come first, and a bucket makes a key an hour.
const maxRecognized = 1 << 14

// recognize refuses a root that is another one than the id had before: whatever were
// sealed under it after a thaw could never be opened again. What is kept of a root is a
// commitment, from which nothing of the key follows. It runs inside seal.Do.
func (g *Guard) recognize(root *seal.Root) error {
	check, err := root.KeyringCheck(0)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	known := g.recognized[root.ID()]
	switch {
	case known == nil && len(g.recognized) < maxRecognized:
		g.recognized[root.ID()] = bytes.Clone(check)
	case known != nil && subtle.ConstantTimeCompare(known, check) != 1:
		return &KMSError{Op: "Decrypt", State: Misconfigured, Reason: ReasonWrongKey,
			Err: fmt.Errorf("KMS has unwrapped the data key %v to another key than before", root.ID())}
	}
	return nil
}
