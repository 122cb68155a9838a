package kmstest

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
)

// contractCheck is one thing that byokd relies on. check returns what is different.
type contractCheck struct {
	name  string
	makes bool // makes keys of its own
	check func(t *testing.T, s *subject) error
}

func contract() []contractCheck {
	return append(usingContract(), owningContract()...)
}

// usingContract is what byokd's role does.
func usingContract() []contractCheck {
	return []contractCheck{
		{name: "a data key opens again", check: func(t *testing.T, s *subject) error {
			made := s.wrap(t, s.key)
			out, err := s.open(t, s.key, made.CiphertextBlob)
			switch {
			case err != nil:
				return err
			case len(made.Plaintext) != 32 || !bytes.Equal(out.Plaintext, made.Plaintext):
				return errors.New("another key came out")
			case *made.KeyId != s.key || *out.KeyId != s.key:
				return fmt.Errorf("answered for %s and %s, want the ARN %s", *made.KeyId, *out.KeyId, s.key)
			}
			return nil
		}},
		{name: "an opened ciphertext names its algorithm", check: func(t *testing.T, s *subject) error {
			out, err := s.open(t, s.key, s.wrap(t, s.key).CiphertextBlob)
			if err == nil && out.EncryptionAlgorithm != types.EncryptionAlgorithmSpecSymmetricDefault {
				err = fmt.Errorf("algorithm %q", out.EncryptionAlgorithm)
			}
			return err
		}},
		{name: "a probe ciphertext without plaintext opens", check: func(t *testing.T, s *subject) error {
			made, err := s.user.GenerateDataKeyWithoutPlaintext(t.Context(), &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &s.key, NumberOfBytes: aws.Int32(32), EncryptionContext: contractContext})
			if err != nil {
				return err
			}
			out, err := s.open(t, s.key, made.CiphertextBlob)
			if err == nil && len(out.Plaintext) != 32 {
				err = fmt.Errorf("it opens to %d bytes", len(out.Plaintext))
			}
			return err
		}},
		{name: "every answer has a request id", check: func(t *testing.T, s *subject) error {
			out, err := s.open(t, s.key, s.wrap(t, s.key).CiphertextBlob)
			if err == nil && requestIDOf(out) == "" {
				err = errors.New("none")
			}
			return err
		}},
		{name: "another encryption context is refused", check: func(t *testing.T, s *subject) error {
			_, err := s.user.Decrypt(t.Context(), &kms.DecryptInput{KeyId: &s.key, CiphertextBlob: s.wrap(t, s.key).CiphertextBlob, EncryptionContext: map[string]string{"byokd:cluster": "other"}})
			return wants(err, "InvalidCiphertextException")
		}},
		{name: "a damaged ciphertext is refused", check: func(t *testing.T, s *subject) error {
			blob := s.wrap(t, s.key).CiphertextBlob
			blob[len(blob)-1] ^= 1
			_, err := s.open(t, s.key, blob)
			return wants(err, "InvalidCiphertextException")
		}},
		{name: "a dry run tells that the call would succeed", check: func(t *testing.T, s *subject) error {
			_, err := s.user.Decrypt(t.Context(), &kms.DecryptInput{KeyId: &s.key, CiphertextBlob: s.wrap(t, s.key).CiphertextBlob, EncryptionContext: contractContext, DryRun: aws.Bool(true)})
			return wants(err, "DryRunOperationException")
		}},
		{name: "a key that does not exist is not found", check: func(t *testing.T, s *subject) error {
			absent := s.key[:strings.LastIndexByte(s.key, '/')+1] + "00000000-0000-4000-8000-000000000000"
			_, err := s.open(t, absent, s.wrap(t, s.key).CiphertextBlob)
			return wants(err, "NotFoundException", "AccessDeniedException")
		}},
		{name: "a key of another region is not found", check: func(t *testing.T, s *subject) error {
			region := strings.Split(s.key, ":")[3]
			_, err := s.user.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: aws.String(strings.Replace(s.key, region, "af-south-1", 1))})
			return wants(err, "NotFoundException")
		}},
		{name: "describe tells kind, state and material", check: func(t *testing.T, s *subject) error {
			out, err := s.user.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &s.key})
			if err != nil {
				return err
			}
			m := out.KeyMetadata
			if *m.Arn != s.key || m.KeyState != types.KeyStateEnabled || !m.Enabled || m.KeySpec != types.KeySpecSymmetricDefault ||
				m.KeyUsage != types.KeyUsageTypeEncryptDecrypt || m.Origin != types.OriginTypeAwsKms || m.DeletionDate != nil {
				return fmt.Errorf("%s %s enabled %v %s %s %s deletion %v", *m.Arn, m.KeyState, m.Enabled, m.KeySpec, m.KeyUsage, m.Origin, m.DeletionDate)
			}
			return nil
		}},
		{name: "describe names the current key material", check: func(t *testing.T, s *subject) error {
			out, err := s.user.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &s.key})
			if err == nil && aws.ToString(out.KeyMetadata.CurrentKeyMaterialId) == "" {
				err = errors.New("no CurrentKeyMaterialId")
			}
			return err
		}},
	}
}

// owningContract is what the key's owner does, and what byokd then sees.
func owningContract() []contractCheck {
	return []contractCheck{
		{name: "describe tells disabled, scheduled and cancelled", makes: true, check: checkStates},
		{name: "a disabled key is refused by name, and works when enabled", makes: true, check: checkDisable},
		{name: "a key whose deletion is scheduled is in an invalid state", makes: true, check: checkSchedule},
		{name: "cancelling a deletion leaves the key disabled", makes: true, check: checkCancel},
		{name: "another key is refused", makes: true, check: func(t *testing.T, s *subject) error {
			_, err := s.open(t, s.create(t, false), s.wrap(t, s.key).CiphertextBlob)
			return wants(err, "IncorrectKeyException")
		}},
		{name: "rotation changes the material and keeps old ciphertexts", makes: true, check: checkRotation},
		{name: "re-encryption moves a wrapped key to another key", makes: true, check: checkReEncrypt},
		{name: "a replica opens what the primary has sealed", makes: true, check: checkReplica},
		{name: "primary and replica are disabled apart", makes: true, check: checkReplicaState},
	}
}

// eventually repeats a check for as long as AWS may take to agree with itself.
func eventually(check func() error) error {
	deadline := time.Now().Add(time.Minute)
	for {
		err := check()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(250 * time.Millisecond) // between two questions
	}
}

// checkStates follows one key through its states as DescribeKey tells them.
func checkStates(t *testing.T, s *subject) error {
	key := s.create(t, false)
	ctx := t.Context()
	is := func(want types.KeyState, dated bool) error {
		return eventuallyFor(s, func() error {
			d, err := s.user.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &key})
			if err == nil && (d.KeyMetadata.KeyState != want || d.KeyMetadata.Enabled != (want == types.KeyStateEnabled) || (d.KeyMetadata.DeletionDate != nil) != dated) {
				err = fmt.Errorf("%s, enabled %v, deletion %v; want %s", d.KeyMetadata.KeyState, d.KeyMetadata.Enabled, d.KeyMetadata.DeletionDate, want)
			}
			return err
		})
	}
	steps := []struct {
		do    func() error
		want  types.KeyState
		dated bool
	}{
		{func() error { return nil }, types.KeyStateEnabled, false},
		{func() error { _, err := s.admin.DisableKey(ctx, &kms.DisableKeyInput{KeyId: idOf(key)}); return err }, types.KeyStateDisabled, false},
		{func() error { _, err := s.admin.EnableKey(ctx, &kms.EnableKeyInput{KeyId: idOf(key)}); return err }, types.KeyStateEnabled, false},
		{func() error {
			_, err := s.admin.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: idOf(key), PendingWindowInDays: aws.Int32(7)})
			return err
		}, types.KeyStatePendingDeletion, true},
		{func() error {
			_, err := s.admin.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: idOf(key)})
			return err
		}, types.KeyStateDisabled, false},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return err
		}
		if err := is(step.want, step.dated); err != nil {
			return err
		}
	}
	return nil
}

func checkDisable(t *testing.T, s *subject) error {
	key := s.create(t, false)
	blob := s.wrap(t, key).CiphertextBlob
	if _, err := s.admin.DisableKey(t.Context(), &kms.DisableKeyInput{KeyId: idOf(key)}); err != nil {
		return err
	}
	err := eventuallyFor(s, func() error {
		_, err := s.open(t, key, blob)
		return wants(err, "DisabledException")
	})
	if err != nil {
		return err
	}
	_, err = s.user.GenerateDataKey(t.Context(), &kms.GenerateDataKeyInput{KeyId: &key, NumberOfBytes: aws.Int32(32)})
	if err := wants(err, "DisabledException"); err != nil {
		return fmt.Errorf("GenerateDataKey: %w", err)
	}
	if out, err := s.user.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &key}); err != nil || out.KeyMetadata.KeyState != types.KeyStateDisabled {
		return fmt.Errorf("DescribeKey: %+v, %v", out, err)
	}
	if _, err := s.admin.EnableKey(t.Context(), &kms.EnableKeyInput{KeyId: idOf(key)}); err != nil {
		return err
	}
	return eventuallyFor(s, func() error {
		_, err := s.open(t, key, blob)
		return err
	})
}

// eventuallyFor gives AWS time, and the others none: their changes are at once.
func eventuallyFor(s *subject, check func() error) error {
	if s.admin.Options().BaseEndpoint != nil {
		return check()
	}
	return eventually(check)
}

func checkSchedule(t *testing.T, s *subject) error {
	key := s.create(t, false)
	blob := s.wrap(t, key).CiphertextBlob
	out, err := s.admin.ScheduleKeyDeletion(t.Context(), &kms.ScheduleKeyDeletionInput{KeyId: idOf(key), PendingWindowInDays: aws.Int32(7)})
	if err != nil {
		return err
	}
	if left := time.Until(aws.ToTime(out.DeletionDate)); left < 6*24*time.Hour || left > 8*24*time.Hour {
		return fmt.Errorf("the deletion is %v away", left)
	}
	return eventuallyFor(s, func() error {
		_, err := s.open(t, key, blob)
		if err := wants(err, "KMSInvalidStateException"); err != nil {
			return err
		}
		d, err := s.user.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &key})
		if err != nil || d.KeyMetadata.KeyState != types.KeyStatePendingDeletion || d.KeyMetadata.DeletionDate == nil {
			return fmt.Errorf("DescribeKey: %+v, %v", d, err)
		}
		return nil
	})
}

func checkCancel(t *testing.T, s *subject) error {
	key := s.create(t, false)
	blob := s.wrap(t, key).CiphertextBlob
	if _, err := s.admin.ScheduleKeyDeletion(t.Context(), &kms.ScheduleKeyDeletionInput{KeyId: idOf(key), PendingWindowInDays: aws.Int32(7)}); err != nil {
		return err
	}
	if _, err := s.admin.CancelKeyDeletion(t.Context(), &kms.CancelKeyDeletionInput{KeyId: idOf(key)}); err != nil {
		return err
	}
	return eventuallyFor(s, func() error {
		d, err := s.user.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &key})
		if err != nil || d.KeyMetadata.KeyState != types.KeyStateDisabled || d.KeyMetadata.DeletionDate != nil {
			return fmt.Errorf("DescribeKey: %+v, %v", d, err)
		}
		_, err = s.open(t, key, blob)
		return wants(err, "DisabledException")
	})
}

func checkRotation(t *testing.T, s *subject) error {
	key := s.create(t, false)
	made := s.wrap(t, key)
	material := func() (string, error) {
		d, err := s.user.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &key})
		if err != nil {
			return "", err
		}
		return aws.ToString(d.KeyMetadata.CurrentKeyMaterialId), nil
	}
	before, err := material()
	if err != nil {
		return err
	}
	if _, err := s.admin.RotateKeyOnDemand(t.Context(), &kms.RotateKeyOnDemandInput{KeyId: idOf(key)}); err != nil {
		return err
	}
	if err := eventuallyFor(s, func() error {
		after, err := material()
		if err == nil && (after == "" || after == before) {
			err = fmt.Errorf("the material is %q, before it was %q", after, before)
		}
		return err
	}); err != nil {
		return err
	}
	out, err := s.open(t, key, made.CiphertextBlob)
	if err == nil && !bytes.Equal(out.Plaintext, made.Plaintext) {
		err = errors.New("another key came out")
	}
	return err
}

func checkReEncrypt(t *testing.T, s *subject) error {
	key := s.create(t, false)
	made := s.wrap(t, s.key)
	out, err := s.admin.ReEncrypt(t.Context(), &kms.ReEncryptInput{CiphertextBlob: made.CiphertextBlob, SourceKeyId: &s.key, DestinationKeyId: &key,
		SourceEncryptionContext: contractContext, DestinationEncryptionContext: contractContext})
	if err != nil {
		return err
	}
	again, err := s.open(t, key, out.CiphertextBlob)
	if err == nil && (!bytes.Equal(again.Plaintext, made.Plaintext) || *out.KeyId != key) {
		err = fmt.Errorf("another key came out, or under %s", *out.KeyId)
	}
	return err
}

const contractReplicaRegion = "eu-west-1"

// replica makes a multi-Region key with a replica.
func (s *subject) replica(t *testing.T) (primary, replica string) {
	t.Helper()
	primary = s.create(t, true)
	in := &kms.ReplicateKeyInput{KeyId: idOf(primary), ReplicaRegion: aws.String(contractReplicaRegion)}
	if s.policy != "" {
		in.Policy = &s.policy
	}
	out := must(s.admin.ReplicateKey(t.Context(), in))(t)
	return primary, *out.ReplicaKeyMetadata.Arn
}

func checkReplica(t *testing.T, s *subject) error {
	primary, replica := s.replica(t)
	made := s.wrap(t, primary)
	if primary[strings.LastIndexByte(primary, '/'):] != replica[strings.LastIndexByte(replica, '/'):] || !strings.Contains(primary, "key/mrk-") {
		return fmt.Errorf("%s and %s have different ids", primary, replica)
	}
	there := s.elsewhere(contractReplicaRegion)
	return eventuallyFor(s, func() error {
		out, err := there.Decrypt(t.Context(), &kms.DecryptInput{KeyId: &replica, CiphertextBlob: made.CiphertextBlob, EncryptionContext: contractContext})
		if err == nil && (!bytes.Equal(out.Plaintext, made.Plaintext) || *out.KeyId != replica) {
			err = fmt.Errorf("another key came out, or under %s", *out.KeyId)
		}
		return err
	})
}

func checkReplicaState(t *testing.T, s *subject) error {
	primary, replica := s.replica(t)
	made := s.wrap(t, primary)
	if _, err := s.admin.DisableKey(t.Context(), &kms.DisableKeyInput{KeyId: idOf(primary)}); err != nil {
		return err
	}
	there := s.elsewhere(contractReplicaRegion)
	return eventuallyFor(s, func() error {
		_, err := s.open(t, primary, made.CiphertextBlob)
		if err := wants(err, "DisabledException"); err != nil {
			return err
		}
		if _, err := there.Decrypt(t.Context(), &kms.DecryptInput{KeyId: &replica, CiphertextBlob: made.CiphertextBlob, EncryptionContext: contractContext}); err != nil {
			return fmt.Errorf("the replica: %w", err)
		}
		d, err := there.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &replica})
		if err != nil || d.KeyMetadata.MultiRegionConfiguration == nil || aws.ToString(d.KeyMetadata.MultiRegionConfiguration.PrimaryKey.Arn) != primary {
			return fmt.Errorf("DescribeKey of the replica: %+v, %v", d, err)
		}
		return nil
	})
}
