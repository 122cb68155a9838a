package inject

import (
	"encoding/json"
	"fmt"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
)

// Apply carries a patch out on an object in JSON.
func Apply(object []byte, patch []Operation) ([]byte, error) {
	text, err := json.Marshal(patch)
	if err != nil {
		return nil, err
	}
	decoded, err := jsonpatch.DecodePatch(text)
	if err != nil {
		return nil, fmt.Errorf("the patch: %w", err)
	}
	return decoded.Apply(object)
}
