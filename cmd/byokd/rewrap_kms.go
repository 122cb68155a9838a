package main

import (
	"context"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/awskms"
)

// callLimit bounds one call of KMS, which answers in some 10 ms: without it, a KMS that hangs would hang the
// command, or a request to a running byokd, for good.
const callLimit = 10 * time.Second

// boundedKMS is a key whose calls end, for whatever asks KMS without a Guard.
type boundedKMS struct{ *awskms.Client }

func (k *boundedKMS) GenerateProbe(ctx context.Context, b keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return k.Client.GenerateProbe(ctx, b)
}

func (k *boundedKMS) Probe(ctx context.Context, ciphertext []byte, b keyguard.Binding) (keyguard.Receipt, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return k.Client.Probe(ctx, ciphertext, b)
}

func (k *boundedKMS) GenerateDataKey(ctx context.Context, b keyguard.Binding, use func([]byte) error) ([]byte, keyguard.Receipt, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return k.Client.GenerateDataKey(ctx, b, use)
}

func (k *boundedKMS) Unwrap(ctx context.Context, wrapped []byte, b keyguard.Binding, use func([]byte) error) (keyguard.Receipt, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return k.Client.Unwrap(ctx, wrapped, b, use)
}

func (k *boundedKMS) Describe(ctx context.Context) (keyguard.Description, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return k.Client.Describe(ctx)
}
