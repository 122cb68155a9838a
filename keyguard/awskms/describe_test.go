package awskms

import (
	"encoding/json"
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
	const id = ":111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"
	self, primary, replica := "arn:aws:kms:eu-central-1"+id, "arn:aws:kms:eu-west-1"+id, "arn:aws:kms:us-east-1"+id
	c := &Client{arn: self}
	ends := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	d := c.describe(metadata(func(m *types.KeyMetadata) {
		m.Arn, m.MultiRegion, m.ValidTo, m.Origin = &self, aws.Bool(true), &ends, types.OriginTypeExternal
		m.MultiRegionConfiguration = &types.MultiRegionConfiguration{
			PrimaryKey: &types.MultiRegionKey{Arn: &primary},
			// None but keys of the same set, in what can be a Region, are called.
			ReplicaKeys: []types.MultiRegionKey{{Arn: &self}, {Arn: &replica}, {Arn: aws.String(testARN)}, {Arn: aws.String("arn:aws:kms:evil.example/?" + id)},
				{Arn: aws.String("arn:aws:kms:eu-west-2@evil.example#" + id)}, {Arn: aws.String("arn:aws:kms:eu-west-3:444455556666:key/mrk-1234abcd12ab34cd56ef1234567890ab")}, {}},
		}
	}), "")
	if !d.MultiRegion || !d.ValidTo.Equal(ends) || d.Origin != "EXTERNAL" || !slices.Equal(d.Replicas, []string{primary, replica}) {
		t.Errorf("%+v", d)
	}
}

// A date that no key has is none: it could not be written as JSON, and the status with it.
func TestDescribeDropsImpossibleDates(t *testing.T) {
	c := &Client{arn: testARN}
	for _, seconds := range []int64{-1 << 62, -1, 0, 1 << 40, 1 << 62} {
		at := time.Unix(seconds, 0)
		d := c.describe(metadata(func(m *types.KeyMetadata) { m.DeletionDate, m.ValidTo = &at, &at }), "")
		if _, err := json.Marshal(d); err != nil || !d.DeletionDate.IsZero() || !d.ValidTo.IsZero() {
			t.Errorf("%v: %+v, %v", at, d, err)
		}
	}
}
