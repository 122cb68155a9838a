package keyguard

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

const (
	patientFor   = time.Minute
	patientPause = time.Second
)

// Patiently repeats a call of KMS that failed for want of an answer, not of a
// permission, until a minute has passed: for tools that use a KMS without a Guard, whose
// KMS leaves repeating to its caller. It returns the last error. The call must end by itself.
func Patiently(ctx context.Context, call func() error) error {
	began := time.Now()
	for {
		err := call()
		var kms *KMSError
		if !errors.As(err, &kms) || StateOf(err) != Unreachable || time.Since(began) >= patientFor {
			return err
		}
		if ctxErr := sleep(ctx, patientPause/2+rand.N(patientPause)); ctxErr != nil {
			return err
		}
	}
}
