package kmstest

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

// world is a server with one key under the documented policy and two clients.
type world struct {
	*Local
	t             *testing.T
	ctx           context.Context
	admin, tenant *kms.Client
	arn, id       string
}

func newWorld(t *testing.T, o Options) *world {
	t.Helper()
	l := start(t, o)
	arn, err := l.CreateKey("", "alias/byokd", "", false)
	if err != nil {
		t.Fatal(err)
	}
	return &world{Local: l, t: t, ctx: t.Context(), admin: admin(t, l), tenant: tenant(t, l), arn: arn, id: arn[strings.LastIndexByte(arn, '/')+1:]}
}

// must fails the test on an error and returns the value.
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (w *world) wrap(key string, context map[string]string) []byte {
	w.t.Helper()
	return must(w.tenant.Encrypt(w.ctx, &kms.EncryptInput{KeyId: &key, Plaintext: []byte("secret"), EncryptionContext: context}))(w.t).CiphertextBlob
}

func (w *world) unwrap(key string, blob []byte, context map[string]string) (*kms.DecryptOutput, error) {
	in := &kms.DecryptInput{CiphertextBlob: blob, EncryptionContext: context}
	if key != "" {
		in.KeyId = &key
	}
	return w.tenant.Decrypt(w.ctx, in)
}

func (w *world) describe(key string) *types.KeyMetadata {
	w.t.Helper()
	return must(w.admin.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: &key}))(w.t).KeyMetadata
}

func TestKeyIsFoundByEveryName(t *testing.T) {
	w := newWorld(t, Options{})
	for _, name := range []string{w.arn, w.id, "alias/byokd", "arn:aws:kms:eu-central-1:111122223333:alias/byokd"} {
		m := w.describe(name)
		if *m.Arn != w.arn || m.KeyState != types.KeyStateEnabled || !m.Enabled || m.KeySpec != types.KeySpecSymmetricDefault ||
			m.KeyUsage != types.KeyUsageTypeEncryptDecrypt || m.KeyManager != types.KeyManagerTypeCustomer ||
			m.Origin != types.OriginTypeAwsKms || *m.AWSAccountId != DefaultAccount || len(*m.CurrentKeyMaterialId) != 64 {
			t.Errorf("%s: %+v", name, m)
		}
		if blob := w.wrap(name, nil); string(must(w.unwrap(name, blob, nil))(t).Plaintext) != "secret" {
			t.Errorf("%s: no round trip", name)
		}
	}
}

func TestDataKeys(t *testing.T) {
	w := newWorld(t, Options{})
	context := map[string]string{"byokd:cluster": "acme", "byokd:resource": "vol-1"}
	for _, c := range []struct {
		name string
		in   kms.GenerateDataKeyInput
		want int
	}{
		{"256", kms.GenerateDataKeyInput{KeySpec: types.DataKeySpecAes256}, 32},
		{"128", kms.GenerateDataKeyInput{KeySpec: types.DataKeySpecAes128}, 16},
		{"bytes", kms.GenerateDataKeyInput{NumberOfBytes: aws.Int32(1024)}, 1024},
	} {
		c.in.KeyId, c.in.EncryptionContext = &w.arn, context
		out := must(w.tenant.GenerateDataKey(w.ctx, &c.in))(t)
		if len(out.Plaintext) != c.want || *out.KeyId != w.arn {
			t.Errorf("%s: %d bytes under %s", c.name, len(out.Plaintext), *out.KeyId)
		}
		opened := must(w.unwrap(w.arn, out.CiphertextBlob, context))(t)
		if !bytes.Equal(opened.Plaintext, out.Plaintext) || *opened.KeyId != w.arn || opened.EncryptionAlgorithm != types.EncryptionAlgorithmSpecSymmetricDefault {
			t.Errorf("%s: %+v", c.name, opened)
		}
	}
	sealed := must(w.tenant.GenerateDataKeyWithoutPlaintext(w.ctx, &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &w.arn, KeySpec: types.DataKeySpecAes256, EncryptionContext: context}))(t)
	if opened := must(w.unwrap(w.arn, sealed.CiphertextBlob, context))(t); len(opened.Plaintext) != 32 {
		t.Errorf("without plaintext: %d bytes", len(opened.Plaintext))
	}
}

func TestReEncryptMovesToAnotherKeyAndContext(t *testing.T) {
	w := newWorld(t, Options{})
	other := must(w.CreateKey("", "alias/other", "", false))(t)
	from, to := map[string]string{"volume": "1"}, map[string]string{"volume": "2"}
	out := must(w.tenant.ReEncrypt(w.ctx, &kms.ReEncryptInput{CiphertextBlob: w.wrap(w.arn, from), SourceKeyId: &w.arn,
		SourceEncryptionContext: from, DestinationKeyId: aws.String("alias/other"), DestinationEncryptionContext: to}))(t)
	if *out.SourceKeyId != w.arn || *out.KeyId != other {
		t.Errorf("from %s to %s", *out.SourceKeyId, *out.KeyId)
	}
	if opened := must(w.unwrap(other, out.CiphertextBlob, to))(t); string(opened.Plaintext) != "secret" {
		t.Error("lost the plaintext")
	}
	if _, err := w.unwrap(w.arn, out.CiphertextBlob, to); code(t, err) != "IncorrectKeyException" {
		t.Errorf("old key: %v", err)
	}
}

func TestRotationKeepsOldCiphertexts(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	w := newWorld(t, Options{Clock: func() time.Time { return now }})
	old, before := w.wrap(w.arn, nil), *w.describe(w.arn).CurrentKeyMaterialId
	if out := must(w.admin.RotateKeyOnDemand(w.ctx, &kms.RotateKeyOnDemandInput{KeyId: &w.arn}))(t); *out.KeyId != w.arn {
		t.Errorf("rotated %s", *out.KeyId)
	}
	after := *w.describe(w.arn).CurrentKeyMaterialId
	if after == before {
		t.Error("the material id did not change")
	}
	if out := must(w.unwrap(w.arn, old, nil))(t); *out.KeyMaterialId != before {
		t.Errorf("old ciphertext names material %s", *out.KeyMaterialId)
	}
	if out := must(w.unwrap(w.arn, w.wrap(w.arn, nil), nil))(t); *out.KeyMaterialId != after {
		t.Errorf("new ciphertext names material %s", *out.KeyMaterialId)
	}

	status := func() *kms.GetKeyRotationStatusOutput {
		return must(w.admin.GetKeyRotationStatus(w.ctx, &kms.GetKeyRotationStatusInput{KeyId: &w.arn}))(t)
	}
	if status().KeyRotationEnabled {
		t.Error("rotation is on from the start")
	}
	must(w.admin.EnableKeyRotation(w.ctx, &kms.EnableKeyRotationInput{KeyId: &w.arn, RotationPeriodInDays: aws.Int32(90)}))(t)
	if s := status(); !s.KeyRotationEnabled || *s.RotationPeriodInDays != 90 || !s.NextRotationDate.Equal(now.AddDate(0, 0, 90)) {
		t.Errorf("%+v", s)
	}
	now = now.AddDate(0, 0, 91)
	if *w.describe(w.arn).CurrentKeyMaterialId == after {
		t.Error("the automatic rotation did not come")
	}
	list := must(w.admin.ListKeyRotations(w.ctx, &kms.ListKeyRotationsInput{KeyId: &w.arn}))(t).Rotations
	if len(list) != 2 || list[0].RotationType != types.RotationTypeOnDemand || list[1].RotationType != types.RotationTypeAutomatic {
		t.Errorf("%+v", list)
	}
	must(w.admin.DisableKeyRotation(w.ctx, &kms.DisableKeyRotationInput{KeyId: &w.arn}))(t)
	if status().KeyRotationEnabled {
		t.Error("rotation is still on")
	}
	must(w.unwrap(w.arn, old, nil))(t)
}

func TestOnDemandRotationHasAWSsLimit(t *testing.T) {
	w := newWorld(t, Options{})
	for range onDemandLimit {
		must(w.admin.RotateKeyOnDemand(w.ctx, &kms.RotateKeyOnDemandInput{KeyId: &w.arn}))(t)
	}
	if _, err := w.admin.RotateKeyOnDemand(w.ctx, &kms.RotateKeyOnDemandInput{KeyId: &w.arn}); code(t, err) != "LimitExceededException" {
		t.Error(err)
	}
}

func TestDeletionIsCarriedOutWhenItsDateHasPassed(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	w := newWorld(t, Options{Clock: func() time.Time { return now }})
	blob := w.wrap(w.arn, nil)
	out := must(w.admin.ScheduleKeyDeletion(w.ctx, &kms.ScheduleKeyDeletionInput{KeyId: &w.arn, PendingWindowInDays: aws.Int32(7)}))(t)
	if want := now.AddDate(0, 0, 7); !out.DeletionDate.Equal(want) || out.KeyState != types.KeyStatePendingDeletion || *out.KeyId != w.arn || *out.PendingWindowInDays != 7 {
		t.Errorf("%+v, want %v", out, want)
	}
	if m := w.describe("alias/byokd"); m.KeyState != types.KeyStatePendingDeletion || m.Enabled || !m.DeletionDate.Equal(*out.DeletionDate) {
		t.Errorf("%+v", m)
	}
	if _, err := w.unwrap(w.arn, blob, nil); code(t, err) != "KMSInvalidStateException" || !strings.Contains(err.Error(), w.arn+" is pending deletion.") {
		t.Error(err)
	}
	if out := must(w.admin.CancelKeyDeletion(w.ctx, &kms.CancelKeyDeletionInput{KeyId: &w.arn}))(t); *out.KeyId != w.arn {
		t.Errorf("cancelled %s", *out.KeyId)
	}
	if m := w.describe(w.arn); m.KeyState != types.KeyStateDisabled || m.DeletionDate != nil {
		t.Errorf("after cancelling: %+v", m)
	}
	if _, err := w.unwrap(w.arn, blob, nil); code(t, err) != "DisabledException" {
		t.Errorf("after cancelling the key must stay disabled: %v", err)
	}
	must(w.admin.EnableKey(w.ctx, &kms.EnableKeyInput{KeyId: &w.arn}))(t)
	must(w.unwrap(w.arn, blob, nil))(t)

	must(w.admin.ScheduleKeyDeletion(w.ctx, &kms.ScheduleKeyDeletionInput{KeyId: &w.arn}))(t)
	now = now.AddDate(0, 0, 30).Add(-time.Second)
	if m := w.describe(w.arn); m.KeyState != types.KeyStatePendingDeletion {
		t.Errorf("deleted early: %v", m.KeyState)
	}
	now = now.Add(time.Second)
	_, err := w.unwrap(w.arn, blob, nil)
	if code(t, err) != "NotFoundException" || !strings.Contains(err.Error(), "Key '"+w.arn+"' does not exist") {
		t.Error(err)
	}
	if _, err := w.admin.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: aws.String("alias/byokd")}); code(t, err) != "NotFoundException" {
		t.Errorf("the alias must go with the key: %v", err)
	}
	if _, err := w.unwrap("", blob, nil); code(t, err) != "AccessDeniedException" {
		t.Errorf("without a key id KMS does not tell whether the key exists: %v", err)
	}
}

func TestMultiRegionKeysShareMaterialAndNothingElse(t *testing.T) {
	w := newWorld(t, Options{})
	ctx, west, westTenant := w.ctx, clientIn(t, w.Local, "eu-west-1", "test", "test"), clientIn(t, w.Local, "eu-west-1", TenantAccessKey, TenantSecret)
	made := must(w.admin.CreateKey(ctx, &kms.CreateKeyInput{MultiRegion: aws.Bool(true), Policy: aws.String(DocumentedPolicy(DefaultAccount, TenantRole))}))(t).KeyMetadata
	id, primary := *made.KeyId, *made.Arn
	if !strings.HasPrefix(id, "mrk-") || !*made.MultiRegion || made.MultiRegionConfiguration.MultiRegionKeyType != types.MultiRegionKeyTypePrimary {
		t.Fatalf("%+v", made)
	}
	copied := must(w.admin.ReplicateKey(ctx, &kms.ReplicateKeyInput{KeyId: &id, ReplicaRegion: aws.String("eu-west-1"),
		Policy: aws.String(DocumentedPolicy(DefaultAccount, TenantRole)), Tags: []types.Tag{{TagKey: aws.String("a"), TagValue: aws.String("b")}}}))(t)
	replica := *copied.ReplicaKeyMetadata.Arn
	if replica != strings.Replace(primary, "eu-central-1", "eu-west-1", 1) || len(copied.ReplicaTags) != 1 || *copied.ReplicaPolicy == "" {
		t.Fatalf("%+v", copied)
	}
	config := must(west.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &id}))(t).KeyMetadata.MultiRegionConfiguration
	if config.MultiRegionKeyType != types.MultiRegionKeyTypeReplica || *config.PrimaryKey.Arn != primary || len(config.ReplicaKeys) != 1 || *config.ReplicaKeys[0].Region != "eu-west-1" {
		t.Errorf("%+v", config)
	}
	blob := w.wrap(primary, nil)
	open := func() error {
		_, err := westTenant.Decrypt(ctx, &kms.DecryptInput{CiphertextBlob: blob, KeyId: &replica})
		return err
	}
	if err := open(); err != nil {
		t.Fatalf("the replica must open what the primary sealed: %v", err)
	}
	must(w.admin.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &primary}))(t)
	if blob = w.wrap(primary, nil); open() != nil {
		t.Error("the replica does not know the new material")
	}
	must(w.admin.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &primary}))(t)
	if err := open(); err != nil {
		t.Errorf("the replica is enabled by itself: %v", err)
	}
	must(west.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &id}))(t)
	if err := open(); code(t, err) != "DisabledException" || !strings.Contains(err.Error(), replica) {
		t.Error(err)
	}
	if _, err := westTenant.Decrypt(ctx, &kms.DecryptInput{CiphertextBlob: blob, KeyId: &primary}); code(t, err) != "NotFoundException" {
		t.Errorf("a key of another region: %v", err)
	}
	if _, err := westTenant.Decrypt(ctx, &kms.DecryptInput{CiphertextBlob: blob, KeyId: &w.id}); code(t, err) != "NotFoundException" {
		t.Errorf("a single-region key id in another region: %v", err)
	}
	if _, err := west.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &replica}); code(t, err) != "UnsupportedOperationException" {
		t.Errorf("rotating a replica: %v", err)
	}
}

func TestPrimaryWaitsForItsReplicas(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	w := newWorld(t, Options{Clock: func() time.Time { return now }})
	primary := must(w.CreateKey("", "", "", true))(t)
	replica := must(w.admin.ReplicateKey(w.ctx, &kms.ReplicateKeyInput{KeyId: &primary, ReplicaRegion: aws.String("us-east-1")}))(t).ReplicaKeyMetadata
	out := must(w.admin.ScheduleKeyDeletion(w.ctx, &kms.ScheduleKeyDeletionInput{KeyId: &primary, PendingWindowInDays: aws.Int32(10)}))(t)
	if out.KeyState != types.KeyStatePendingReplicaDeletion || out.DeletionDate != nil {
		t.Fatalf("%+v", out)
	}
	if m := w.describe(primary); *m.PendingDeletionWindowInDays != 10 {
		t.Errorf("%+v", m)
	}
	if err := w.Delete(*replica.Arn); err != nil {
		t.Fatal(err)
	}
	if m := w.describe(primary); m.KeyState != types.KeyStatePendingDeletion || !m.DeletionDate.Equal(now.AddDate(0, 0, 10)) {
		t.Errorf("%+v", m)
	}
}

func TestAliases(t *testing.T) {
	w := newWorld(t, Options{})
	other := must(w.CreateKey("", "", "", false))(t)
	must(w.admin.CreateAlias(w.ctx, &kms.CreateAliasInput{AliasName: aws.String("alias/second"), TargetKeyId: &w.id}))(t)
	list := must(w.admin.ListAliases(w.ctx, &kms.ListAliasesInput{}))(t).Aliases
	if len(list) != 2 || *list[0].AliasName != "alias/byokd" || *list[1].TargetKeyId != w.id || *list[1].AliasArn != "arn:aws:kms:eu-central-1:111122223333:alias/second" {
		t.Errorf("%+v", list)
	}
	must(w.admin.UpdateAlias(w.ctx, &kms.UpdateAliasInput{AliasName: aws.String("alias/second"), TargetKeyId: &other}))(t)
	if got := *w.describe("alias/second").Arn; got != other {
		t.Errorf("alias/second is %s", got)
	}
	if list := must(w.admin.ListAliases(w.ctx, &kms.ListAliasesInput{KeyId: &other}))(t).Aliases; len(list) != 1 {
		t.Errorf("%+v", list)
	}
	must(w.admin.DeleteAlias(w.ctx, &kms.DeleteAliasInput{AliasName: aws.String("alias/second")}))(t)
	if _, err := w.admin.DescribeKey(w.ctx, &kms.DescribeKeyInput{KeyId: aws.String("alias/second")}); code(t, err) != "NotFoundException" ||
		!strings.Contains(err.Error(), "Alias arn:aws:kms:eu-central-1:111122223333:alias/second is not found.") {
		t.Error(err)
	}
}

func TestListsArePaged(t *testing.T) {
	w := newWorld(t, Options{})
	for range 4 {
		must(w.CreateKey("", "", "", false))(t)
	}
	seen := map[string]bool{}
	pages := kms.NewListKeysPaginator(w.admin, &kms.ListKeysInput{Limit: aws.Int32(2)})
	n := 0
	for pages.HasMorePages() {
		n++
		for _, k := range must(pages.NextPage(w.ctx))(t).Keys {
			seen[*k.KeyArn] = true
		}
	}
	if len(seen) != 5 || n != 3 {
		t.Errorf("%d keys on %d pages", len(seen), n)
	}
	if _, err := w.admin.ListKeys(w.ctx, &kms.ListKeysInput{Marker: aws.String("nonsense")}); code(t, err) != "InvalidMarkerException" {
		t.Error(err)
	}
	west := clientIn(t, w.Local, "eu-west-1", "test", "test")
	if out := must(west.ListKeys(w.ctx, &kms.ListKeysInput{}))(t); len(out.Keys) != 0 {
		t.Errorf("another region shows %d keys", len(out.Keys))
	}
}

func TestTagsAndDescription(t *testing.T) {
	w := newWorld(t, Options{})
	tags := func() string {
		var out []string
		for _, tag := range must(w.admin.ListResourceTags(w.ctx, &kms.ListResourceTagsInput{KeyId: &w.arn}))(t).Tags {
			out = append(out, *tag.TagKey+"="+*tag.TagValue)
		}
		return strings.Join(out, " ")
	}
	put := func(k, v string) {
		must(w.admin.TagResource(w.ctx, &kms.TagResourceInput{KeyId: &w.arn, Tags: []types.Tag{{TagKey: &k, TagValue: &v}}}))(t)
	}
	put("team", "one")
	put("cost", "x")
	put("team", "two")
	if tags() != "team=two cost=x" {
		t.Error(tags())
	}
	must(w.admin.UntagResource(w.ctx, &kms.UntagResourceInput{KeyId: &w.arn, TagKeys: []string{"team"}}))(t)
	if tags() != "cost=x" {
		t.Error(tags())
	}
	must(w.admin.UpdateKeyDescription(w.ctx, &kms.UpdateKeyDescriptionInput{KeyId: &w.arn, Description: aws.String("new")}))(t)
	if got := *w.describe(w.arn).Description; got != "new" {
		t.Error(got)
	}
}

func TestGrants(t *testing.T) {
	w := newWorld(t, Options{})
	bare := must(w.CreateKey("", "", defaultPolicy(DefaultAccount), false))(t)
	blob := must(w.admin.Encrypt(w.ctx, &kms.EncryptInput{KeyId: &bare, Plaintext: []byte("x"), EncryptionContext: map[string]string{"a": "1", "b": "2"}}))(t).CiphertextBlob
	open := func() string {
		_, err := w.unwrap(bare, blob, map[string]string{"a": "1", "b": "2"})
		return code(t, err)
	}
	if got := open(); got != "AccessDeniedException" {
		t.Fatalf("without a grant: %q", got)
	}
	create := func(constraints *types.GrantConstraints) string {
		out := must(w.admin.CreateGrant(w.ctx, &kms.CreateGrantInput{KeyId: &bare, GranteePrincipal: aws.String(TenantRole), Name: aws.String("n"),
			Operations: []types.GrantOperation{types.GrantOperationDecrypt}, Constraints: constraints, RetiringPrincipal: aws.String(TenantRole)}))(t)
		if *out.GrantToken == "" || len(*out.GrantId) != 64 {
			t.Errorf("%+v", out)
		}
		return *out.GrantId
	}
	revoke := func(id string) {
		must(w.admin.RevokeGrant(w.ctx, &kms.RevokeGrantInput{KeyId: &bare, GrantId: &id}))(t)
	}
	for _, c := range []struct {
		constraints *types.GrantConstraints
		want        string
	}{
		{nil, ""},
		{&types.GrantConstraints{EncryptionContextSubset: map[string]string{"a": "1"}}, ""},
		{&types.GrantConstraints{EncryptionContextSubset: map[string]string{"a": "2"}}, "AccessDeniedException"},
		{&types.GrantConstraints{EncryptionContextEquals: map[string]string{"a": "1"}}, "AccessDeniedException"},
		{&types.GrantConstraints{EncryptionContextEquals: map[string]string{"a": "1", "b": "2"}}, ""},
	} {
		id := create(c.constraints)
		if got := open(); got != c.want {
			t.Errorf("%+v: %q, want %q", c.constraints, got, c.want)
		}
		list := must(w.admin.ListGrants(w.ctx, &kms.ListGrantsInput{KeyId: &bare}))(t).Grants
		if len(list) != 1 || *list[0].GrantId != id || *list[0].GranteePrincipal != TenantRole || list[0].Operations[0] != "Decrypt" {
			t.Errorf("%+v", list)
		}
		revoke(id)
	}
	if got := open(); got != "AccessDeniedException" {
		t.Errorf("after revoking: %q", got)
	}
	id := create(nil)
	must(w.tenant.RetireGrant(w.ctx, &kms.RetireGrantInput{KeyId: &bare, GrantId: &id}))(t)
	if got := open(); got != "AccessDeniedException" {
		t.Errorf("after retiring: %q", got)
	}
	if again := create(nil); again != create(nil) {
		t.Error("a repeated named request made a second grant")
	}
	// The documented policy lets the tenant make grants on its own key.
	must(w.tenant.CreateGrant(w.ctx, &kms.CreateGrantInput{KeyId: &w.arn, GranteePrincipal: aws.String(TenantRole), Operations: []types.GrantOperation{types.GrantOperationDecrypt}}))(t)
	must(w.tenant.ListGrants(w.ctx, &kms.ListGrantsInput{KeyId: &w.arn}))(t)
}

func TestDryRunTellsSuccessAndFailure(t *testing.T) {
	w := newWorld(t, Options{})
	blob, dry := w.wrap(w.arn, nil), aws.Bool(true)
	calls := map[string]func() error{
		"Encrypt": func() error {
			_, err := w.tenant.Encrypt(w.ctx, &kms.EncryptInput{KeyId: &w.arn, Plaintext: []byte("x"), DryRun: dry})
			return err
		},
		"Decrypt": func() error {
			_, err := w.tenant.Decrypt(w.ctx, &kms.DecryptInput{KeyId: &w.arn, CiphertextBlob: blob, DryRun: dry})
			return err
		},
		"ReEncrypt": func() error {
			_, err := w.tenant.ReEncrypt(w.ctx, &kms.ReEncryptInput{CiphertextBlob: blob, DestinationKeyId: &w.arn, DryRun: dry})
			return err
		},
		"GenerateDataKey": func() error {
			_, err := w.tenant.GenerateDataKey(w.ctx, &kms.GenerateDataKeyInput{KeyId: &w.arn, KeySpec: "AES_256", DryRun: dry})
			return err
		},
		"GenerateDataKeyWithoutPlaintext": func() error {
			_, err := w.tenant.GenerateDataKeyWithoutPlaintext(w.ctx, &kms.GenerateDataKeyWithoutPlaintextInput{KeyId: &w.arn, KeySpec: "AES_256", DryRun: dry})
			return err
		},
		"CreateGrant": func() error {
			_, err := w.tenant.CreateGrant(w.ctx, &kms.CreateGrantInput{KeyId: &w.arn, GranteePrincipal: aws.String(TenantRole), Operations: []types.GrantOperation{"Decrypt"}, DryRun: dry})
			return err
		},
	}
	for name, call := range calls {
		var success *types.DryRunOperationException
		if err := call(); !errors.As(err, &success) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if grants := must(w.admin.ListGrants(w.ctx, &kms.ListGrantsInput{KeyId: &w.arn}))(t).Grants; len(grants) != 0 {
		t.Error("a dry run made a grant")
	}
	if err := w.Disable(w.arn); err != nil {
		t.Fatal(err)
	}
	for name, call := range calls {
		if got := code(t, call()); got != "DisabledException" {
			t.Errorf("disabled %s: %s", name, got)
		}
	}
}

func TestCallerIdentity(t *testing.T) {
	l := start(t, Options{})
	for _, c := range []struct{ key, secret, arn, code string }{
		{AdminAccessKey, AdminSecret, AdminUser, ""},
		{TenantAccessKey, TenantSecret, "arn:aws:sts::111122223333:assumed-role/byokd-tenant/byokd", ""},
		{"nobody", "x", "", "InvalidClientTokenId"},
		{AdminAccessKey, "wrong", "", "SignatureDoesNotMatch"},
	} {
		client := sts.NewFromConfig(sdkConfig(t, DefaultRegion, c.key, c.secret), func(o *sts.Options) { o.BaseEndpoint = aws.String(l.URL()) })
		out, err := client.GetCallerIdentity(t.Context(), &sts.GetCallerIdentityInput{})
		if got := code(t, err); got != c.code {
			t.Errorf("%s: %v", c.key, err)
		} else if err == nil && (*out.Arn != c.arn || *out.Account != DefaultAccount || *out.UserId == "") {
			t.Errorf("%s: %+v", c.key, out)
		}
	}
	client := sts.NewFromConfig(sdkConfig(t, DefaultRegion, "test", "test"), func(o *sts.Options) { o.BaseEndpoint = aws.String(l.URL()) })
	if _, err := client.GetSessionToken(t.Context(), &sts.GetSessionTokenInput{}); code(t, err) != "InvalidAction" {
		t.Error(err)
	}
}
