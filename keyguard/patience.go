package keyguard

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

const (
	patientAttempts = 60 // about a minute
	patientPause    = time.Second
)

// Patiently repeats a call of KMS that failed for want of an answer, not of a
// permission, for about a minute: for tools that use a KMS without a Guard, whose
// KMS leaves repeating to its caller. It returns the last error.
func Patiently(ctx context.Context, call func() error) error {
	for attempt := 1; ; attempt++ {
		err := call()
		var kms *KMSError
		if !errors.As(err, &kms) || StateOf(err) != Unreachable || attempt == patientAttempts {
			return err
		}
		if ctxErr := sleep(ctx, patientPause/2+rand.N(patientPause)); ctxErr != nil {
			return err
		}
	}
}
