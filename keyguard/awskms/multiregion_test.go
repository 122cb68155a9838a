package awskms

import (
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// asAdmin is the owner of the keys, in a Region.
func asAdmin(t *testing.T, endpoint, region string) *kms.Client {
	t.Helper()
	return kms.NewFromConfig(configuration(t, kmstest.AdminAccessKey, kmstest.AdminSecret), func(o *kms.Options) {
		o.Region, o.BaseEndpoint = region, aws.String(endpoint)
	})
}

// replicate makes a replica of a multi-Region key and returns its ARN.
func replicate(t *testing.T, endpoint, primary, region string) string {
	t.Helper()
	policy := kmstest.DocumentedPolicy(kmstest.DefaultAccount, kmstest.TenantRole)
	out, err := asAdmin(t, endpoint, kmstest.DefaultRegion).ReplicateKey(t.Context(),
		&kms.ReplicateKeyInput{KeyId: &primary, ReplicaRegion: &region, Policy: &policy})
	if err != nil {
		t.Fatal(err)
	}
	return *out.ReplicaKeyMetadata.Arn
}

// Primary and replica of a multi-Region key are disabled apart: the guard of one
// freezes, says that the other still decrypts the data, and does not turn to it. A
// guard of the other opens what was wrapped under the first, also when that is gone.
func TestMultiRegionKey(t *testing.T) {
	server := startKMS(t)
	w := newMultiRegionRig(t, server.Server)
	replica := replicate(t, server.URL(), w.arn, "eu-west-1")
	if !keyguard.SameKey(w.arn, replica) {
		t.Errorf("%s and %s are not taken for one key", w.arn, replica)
	}
	w.open()
	id, wrapped, err := w.guard.Create(t.Context(), binding)
	if err != nil {
		t.Fatal(err)
	}
	sealed := sealName(t, w.guard, id)

	w.must(w.kms.Disable(w.arn))
	s := w.await("the warning", func(s keyguard.Status) bool {
		return s.Gate == keyguard.Frozen && slices.Equal(s.SiblingsEnabled, []string{replica})
	})
	if !s.MultiRegion || !strings.Contains(s.Cause(), "Still enabled: "+replica) || !strings.Contains(s.Cause(), "does not turn to them") {
		t.Errorf("%+v\n%s", s, s.Cause())
	}
	w.must(w.kms.Enable(w.arn))
	if s := w.awaitGate(keyguard.Open); len(s.SiblingsEnabled) != 0 {
		t.Errorf("the warning stays: %+v", s)
	}
	w.must(w.kms.Disable(replica))
	w.must(w.kms.Disable(w.arn))
	w.await("the freeze without warning", func(s keyguard.Status) bool {
		return s.Gate == keyguard.Frozen && len(s.Siblings) == 1 && len(s.SiblingsEnabled) == 0
	})
	w.must(w.kms.Enable(replica))
	w.must(w.kms.Delete(w.arn))

	other := newRig(t, server.Server)
	other.watch(replica)
	other.start()
	other.awaitGate(keyguard.Open)
	if err := other.guard.Load(t.Context(), id, wrapped, binding); err != nil {
		t.Fatalf("the replica does not open what was wrapped under the primary: %v", err)
	}
	if again := sealName(t, other.guard, id); again != sealed {
		t.Error("another key came out")
	}
}

// A primary whose deletion waits for its replicas is scheduled for deletion, without a date: it is given back by
// cancelling and enabling. While the primary Region changes a key works on.
func TestStatesOfAMultiRegionKey(t *testing.T) {
	server := startKMS(t)
	w := newMultiRegionRig(t, server.Server)
	replicate(t, server.URL(), w.arn, "eu-west-1")
	w.open()
	w.must(w.kms.SetState(w.arn, "Updating"))
	before := w.guard.Status().LastSuccess
	w.written("probes of a key whose primary Region changes", func() bool { return w.guard.Status().LastSuccess.After(before.Add(3 * rigInterval)) })
	if s := w.guard.Status(); s.Gate != keyguard.Open || s.Key != keyguard.Enabled || s.Epoch != 1 {
		t.Errorf("while Updating: %+v", s)
	}
	w.must(w.kms.SetState(w.arn, "Enabled"))
	admin := asAdmin(t, server.URL(), kmstest.DefaultRegion)
	if _, err := admin.ScheduleKeyDeletion(t.Context(), &kms.ScheduleKeyDeletionInput{KeyId: &w.arn}); err != nil {
		t.Fatal(err)
	}
	described, err := admin.DescribeKey(t.Context(), &kms.DescribeKeyInput{KeyId: &w.arn})
	if err != nil || described.KeyMetadata.KeyState != types.KeyStatePendingReplicaDeletion {
		t.Fatalf("%+v, %v", described, err)
	}
	s := w.await("the freeze", func(s keyguard.Status) bool { return s.Gate == keyguard.Frozen && s.Key == keyguard.PendingDeletion })
	if !s.DeletionDate.IsZero() || !strings.Contains(s.Cause(), "is scheduled for deletion") || strings.Contains(s.Cause(), "deletion on ") || !strings.Contains(s.NextStep(), "cancel-key-deletion") {
		t.Errorf("PendingReplicaDeletion, date %v: %s %s", s.DeletionDate, s.Cause(), s.NextStep())
	}
	if _, err := admin.CancelKeyDeletion(t.Context(), &kms.CancelKeyDeletionInput{KeyId: &w.arn}); err != nil {
		t.Fatal(err)
	}
	w.must(w.kms.Enable(w.arn))
	w.awaitGate(keyguard.Open)
}

// newMultiRegionRig is a rig on the primary of a multi-Region set.
func newMultiRegionRig(t *testing.T, server *kmstest.Server) *rig {
	t.Helper()
	w := newRig(t, server)
	arn, err := server.CreateKey("", "", "", true)
	if err != nil {
		t.Fatal(err)
	}
	w.watch(arn)
	return w
}

// Rotation, automatic or on demand, is noticed and changes nothing for readers.
func TestRotationIsNoticed(t *testing.T) {
	server := startKMS(t)
	w := newRig(t, server.Server)
	w.open()
	before := w.await("the material", func(s keyguard.Status) bool { return s.KeyMaterialID != "" }).KeyMaterialID
	sealed := sealName(t, w.guard, w.pinned)
	if _, err := asAdmin(t, server.URL(), kmstest.DefaultRegion).RotateKeyOnDemand(t.Context(), &kms.RotateKeyOnDemandInput{KeyId: &w.arn}); err != nil {
		t.Fatal(err)
	}
	w.must(w.kms.Disable(w.arn)) // the next look at the key; without it, ten minutes
	w.awaitGate(keyguard.Frozen)
	w.must(w.kms.Enable(w.arn))
	w.awaitGate(keyguard.Open)
	w.await("the new material", func(s keyguard.Status) bool { return s.KeyMaterialID != before })
	w.awaitAudit(keyguard.AuditRotate, behaviour{})
	if again := sealName(t, w.guard, w.pinned); again != sealed {
		t.Error("what was wrapped before the rotation opens to another key")
	}
	if _, _, err := w.guard.Create(t.Context(), binding); err != nil {
		t.Errorf("a data key under the new material: %v", err)
	}
}
