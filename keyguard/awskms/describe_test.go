package awskms

import (
	"slices"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/byokd/byokd/keyguard"
)

func metadata(change func(*types.KeyMetadata)) *types.KeyMetadata {
	m := &types.KeyMetadata{Arn: aws.String(testARN), KeyState: types.KeyStateEnabled,
		KeySpec: types.KeySpecSymmetricDefault, KeyUsage: types.KeyUsageTypeEncryptDecrypt}
	if change != nil {
		change(m)
	}
	return m
}

func TestDescribeMapsEveryState(t *testing.T) {
	c := &Client{arn: testARN}
	want := map[types.KeyState]keyguard.KeyState{
		types.KeyStateEnabled:                keyguard.Enabled,
		types.KeyStateUpdating:               keyguard.Enabled,
		types.KeyStateDisabled:               keyguard.Disabled,
		types.KeyStatePendingDeletion:        keyguard.PendingDeletion,
		types.KeyStatePendingReplicaDeletion: keyguard.PendingDeletion,
		types.KeyStatePendingImport:          keyguard.Unavailable,
		types.KeyStateUnavailable:            keyguard.Unavailable,
		types.KeyStateCreating:               keyguard.Unavailable,
		"AStateOfTheFuture":                  keyguard.Unavailable,
	}
	for _, state := range types.KeyState("").Values() {
		if _, listed := want[state]; !listed {
			t.Errorf("the SDK knows a state %s that this table does not", state)
		}
	}
	for state, key := range want {
		d := c.describe(metadata(func(m *types.KeyMetadata) { m.KeyState = state }), "request-1")
		if d.State != key || d.Raw != string(state) || d.RequestID != "request-1" {
			t.Errorf("%s: %+v, want %v", state, d, key)
		}
	}
}

func TestDescribeChecksTheKind(t *testing.T) {
	c := &Client{arn: testARN}
	wrong := map[string]func(*types.KeyMetadata){
		"RSA":      func(m *types.KeyMetadata) { m.KeySpec = types.KeySpecRsa2048 },
		"HMAC":     func(m *types.KeyMetadata) { m.KeyUsage = types.KeyUsageTypeGenerateVerifyMac },
		"other":    func(m *types.KeyMetadata) { m.Arn = aws.String(testARN + "0") },
		"disabled": func(m *types.KeyMetadata) { m.KeySpec, m.KeyState = types.KeySpecRsa2048, types.KeyStateDisabled },
		"nothing":  func(m *types.KeyMetadata) { *m = types.KeyMetadata{} },
	}
	for name, change := range wrong {
		if d := c.describe(metadata(change), ""); d.State != keyguard.Misconfigured || d.Problem == "" {
			t.Errorf("%s: %+v", name, d)
		}
	}
}

func TestDescribeListsSiblingsAndExpiry(t *testing.T) {
	c := &Client{arn: testARN}
	ends := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	d := c.describe(metadata(func(m *types.KeyMetadata) {
		m.MultiRegion, m.ValidTo, m.Origin = aws.Bool(true), &ends, types.OriginTypeExternal
		m.MultiRegionConfiguration = &types.MultiRegionConfiguration{
			PrimaryKey:  &types.MultiRegionKey{Arn: aws.String("arn:primary")},
			ReplicaKeys: []types.MultiRegionKey{{Arn: aws.String(testARN)}, {Arn: aws.String("arn:replica")}},
		}
	}), "")
	if !d.MultiRegion || !d.ValidTo.Equal(ends) || d.Origin != "EXTERNAL" || !slices.Equal(d.Replicas, []string{"arn:primary", "arn:replica"}) {
		t.Errorf("%+v", d)
	}
}
