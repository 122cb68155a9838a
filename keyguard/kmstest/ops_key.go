package kmstest

import (
	"slices"
	"strconv"
	"strings"
	"time"
)

type keyMetadata struct {
	AWSAccountId              string `json:",omitempty"`
	Arn                       string `json:",omitempty"`
	CreationDate              *epoch `json:",omitempty"`
	CurrentKeyMaterialId      string `json:",omitempty"`
	CustomerMasterKeySpec     string `json:",omitempty"`
	DeletionDate              *epoch `json:",omitempty"`
	Description               string
	Enabled                   bool
	EncryptionAlgorithms      []string `json:",omitempty"`
	KeyId                     string
	KeyManager                string   `json:",omitempty"`
	KeySpec                   string   `json:",omitempty"`
	KeyState                  string   `json:",omitempty"`
	KeyUsage                  string   `json:",omitempty"`
	MacAlgorithms             []string `json:",omitempty"`
	MultiRegion               bool
	MultiRegionConfiguration  *multiRegionDetails `json:",omitempty"`
	Origin                    string              `json:",omitempty"`
	PendingDeletionWindowDays int                 `json:"PendingDeletionWindowInDays,omitempty"`
	SigningAlgorithms         []string            `json:",omitempty"`
}

type multiRegionDetails struct {
	MultiRegionKeyType string
	PrimaryKey         regionalKey
	ReplicaKeys        []regionalKey
}

type regionalKey struct {
	Arn    string
	Region string
}

func (c *call) metadata(k *key) *keyMetadata {
	m := &keyMetadata{
		AWSAccountId: k.Account, Arn: k.ARN, KeyId: k.ID, Description: k.Description,
		CreationDate: epochPtr(k.Created), Enabled: k.State == stateEnabled, KeyState: k.State,
		KeyManager: "CUSTOMER", KeySpec: k.Spec, CustomerMasterKeySpec: k.Spec, KeyUsage: k.Usage,
		MultiRegion: k.MultiRegion, Origin: k.Origin,
	}
	if k.State == statePendingReplicaDeletion {
		m.PendingDeletionWindowDays = k.PendingDays
	}
	if k.Deletion != nil {
		m.DeletionDate = epochPtr(*k.Deletion)
	}
	m.EncryptionAlgorithms, m.SigningAlgorithms, m.MacAlgorithms = algorithms(k.Spec, k.Usage)
	if k.Spec == symmetricDefault && k.State != statePendingImport {
		m.CurrentKeyMaterialId = c.st.Families[k.ID].current().ID
	}
	if k.MultiRegion {
		m.MultiRegionConfiguration = c.multiRegion(k)
	}
	return m
}

func (c *call) multiRegion(k *key) *multiRegionDetails {
	primary := c.st.Families[k.ID].PrimaryRegion
	d := &multiRegionDetails{MultiRegionKeyType: "REPLICA", ReplicaKeys: []regionalKey{},
		PrimaryKey: regionalKey{Arn: keyARN(primary, k.Account, k.ID), Region: primary}}
	if k.Region == primary {
		d.MultiRegionKeyType = "PRIMARY"
	} else {
		d.ReplicaKeys = append(d.ReplicaKeys, regionalKey{Arn: k.ARN, Region: k.Region})
	}
	for _, other := range c.st.siblings(k) {
		if other.Region != primary {
			d.ReplicaKeys = append(d.ReplicaKeys, regionalKey{Arn: other.ARN, Region: other.Region})
		}
	}
	return d
}

const symmetricDefault = "SYMMETRIC_DEFAULT"

// algorithms lists what DescribeKey shows for a key spec and usage.
func algorithms(spec, usage string) (encryption, signing, mac []string) {
	switch {
	case spec == symmetricDefault:
		return []string{symmetricDefault}, nil, nil
	case usage == "ENCRYPT_DECRYPT":
		return []string{"RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256"}, nil, nil
	case usage == "GENERATE_VERIFY_MAC":
		return nil, nil, []string{"HMAC_SHA_" + strings.TrimPrefix(spec, "HMAC_")}
	case strings.HasPrefix(spec, "RSA_"):
		return nil, []string{"RSASSA_PKCS1_V1_5_SHA_256", "RSASSA_PSS_SHA_256"}, nil
	}
	return nil, []string{"ECDSA_SHA_256"}, nil
}

// specUsages lists the key specs that can be created and their usages, the default first.
func specUsages(spec string) []string {
	switch spec {
	case symmetricDefault:
		return []string{"ENCRYPT_DECRYPT"}
	case "RSA_2048", "RSA_3072", "RSA_4096":
		return []string{"ENCRYPT_DECRYPT", "SIGN_VERIFY"}
	case "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521":
		return []string{"SIGN_VERIFY"}
	case "HMAC_256", "HMAC_384", "HMAC_512":
		return []string{"GENERATE_VERIFY_MAC"}
	}
	return nil
}

type createKeyInput struct {
	Description                    string
	KeySpec, CustomerMasterKeySpec string
	KeyUsage                       string
	MultiRegion                    bool
	Origin                         string
	Policy                         string
	Tags                           []tag
	BypassPolicyLockoutSafetyCheck bool
}

type metadataOutput struct{ KeyMetadata *keyMetadata }

func createKey(c *call, in *createKeyInput) (*metadataOutput, *apiError) {
	if aerr := c.account("CreateKey"); aerr != nil {
		return nil, aerr
	}
	if in.Origin == "" {
		in.Origin = "AWS_KMS"
	}
	if in.Origin != "AWS_KMS" && in.Origin != "EXTERNAL" {
		return nil, errUnsupported("Origin %s needs a custom key store; this server has none.", in.Origin)
	}
	if in.KeySpec == "" {
		in.KeySpec = in.CustomerMasterKeySpec
	}
	if in.KeySpec == "" {
		in.KeySpec = symmetricDefault
	}
	usages := specUsages(in.KeySpec)
	if usages == nil {
		return nil, errUnsupported("The key spec %s is not supported by this server.", in.KeySpec)
	}
	if in.KeyUsage == "" {
		in.KeyUsage = usages[0]
	}
	if !slices.Contains(usages, in.KeyUsage) {
		return nil, errValidation("KeyUsage %s is not compatible with KeySpec %s", in.KeyUsage, in.KeySpec)
	}
	if aerr := checkDescription(in.Description); aerr != nil {
		return nil, aerr
	}
	if in.Policy == "" {
		in.Policy = defaultPolicy(c.s.account)
	} else if aerr := c.checkPolicy(in.Policy, in.BypassPolicyLockoutSafetyCheck); aerr != nil {
		return nil, aerr
	}
	if aerr := checkTags(in.Tags); aerr != nil {
		return nil, aerr
	}
	k := c.addKey(in)
	c.event.Key = k.ARN
	return &metadataOutput{KeyMetadata: c.metadata(k)}, nil
}

// addKey makes a key and its family in the call's copy of the state.
func (c *call) addKey(in *createKeyInput) *key {
	k := &key{
		ID: newKeyID(in.MultiRegion), Region: c.region, Account: c.s.account, Description: in.Description,
		State: stateEnabled, Created: c.now, MultiRegion: in.MultiRegion,
		Spec: in.KeySpec, Usage: in.KeyUsage, Origin: in.Origin, Policy: in.Policy, Tags: in.Tags,
	}
	if in.Origin == "EXTERNAL" {
		k.State = statePendingImport
	}
	k.ARN = keyARN(k.Region, k.Account, k.ID)
	c.st.Keys[k.ARN] = k
	c.st.Families[k.ID] = &family{PrimaryRegion: k.Region, Materials: []material{newMaterial(c.now)}}
	return k
}

func checkDescription(s string) *apiError {
	if len(s) > 8192 {
		return errConstraint(s[:64]+"…", "description", "Member must have length less than or equal to 8192")
	}
	return nil
}

type keyInput struct {
	KeyId       string
	GrantTokens []string
}

func describeKey(c *call, in *keyInput) (*metadataOutput, *apiError) {
	k, aerr := c.key(in.KeyId, aliasAllowed, "DescribeKey", nil, in.GrantTokens...)
	if aerr != nil {
		return nil, aerr
	}
	return &metadataOutput{KeyMetadata: c.metadata(k)}, nil
}

type listInput struct {
	KeyId   string
	Limit   int
	Marker  string
	GrantId string

	GranteePrincipal string
}

type listedKey struct{ KeyId, KeyArn string }

type listKeysOutput struct {
	Keys       []listedKey
	NextMarker string `json:",omitempty"`
	Truncated  bool
}

func listKeys(c *call, in *listInput) (*listKeysOutput, *apiError) {
	if aerr := c.account("ListKeys"); aerr != nil {
		return nil, aerr
	}
	keys, next, aerr := page(c.st.sortedKeys(c.region), func(k *key) string { return k.ID }, in.Limit, in.Marker, 1000)
	if aerr != nil {
		return nil, aerr
	}
	out := &listKeysOutput{Keys: []listedKey{}, NextMarker: next, Truncated: next != ""}
	for _, k := range keys {
		out.Keys = append(out.Keys, listedKey{KeyId: k.ID, KeyArn: k.ARN})
	}
	return out, nil
}

func enableKey(c *call, in *keyInput) (*nothing, *apiError) {
	return nil, c.switchKey(in.KeyId, "EnableKey", stateEnabled)
}

func disableKey(c *call, in *keyInput) (*nothing, *apiError) {
	return nil, c.switchKey(in.KeyId, "DisableKey", stateDisabled)
}

func (c *call) switchKey(ref, action, to string) *apiError {
	k, aerr := c.key(ref, keyOnly, action, nil)
	if aerr != nil {
		return aerr
	}
	if k.State != stateEnabled && k.State != stateDisabled {
		return badState(k)
	}
	k.State = to
	return nil
}

type scheduleInput struct {
	KeyId               string
	PendingWindowInDays *int
}

type scheduleOutput struct {
	DeletionDate        *epoch `json:",omitempty"`
	KeyId               string
	KeyState            string
	PendingWindowInDays int
}

func scheduleKeyDeletion(c *call, in *scheduleInput) (*scheduleOutput, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "ScheduleKeyDeletion", nil)
	if aerr != nil {
		return nil, aerr
	}
	days := 30
	if in.PendingWindowInDays != nil {
		days = *in.PendingWindowInDays
	}
	if days < 7 || days > 30 {
		return nil, errConstraint(strconv.Itoa(days), "pendingWindowInDays", "Member must have value between 7 and 30")
	}
	if k.State == statePendingDeletion || k.State == statePendingReplicaDeletion || k.State == stateCreating || k.State == stateUpdating {
		return nil, badState(k)
	}
	c.st.schedule(k, c.now.AddDate(0, 0, days), days)
	out := &scheduleOutput{KeyId: k.ARN, KeyState: k.State, PendingWindowInDays: days}
	if k.Deletion != nil {
		out.DeletionDate = epochPtr(*k.Deletion)
	}
	return out, nil
}

// schedule puts a key into its waiting period. A primary that still has
// replicas waits for them first, without a date.
func (st *state) schedule(k *key, at time.Time, days int) {
	k.PendingDays = days
	if k.MultiRegion && st.primary(k) && len(st.siblings(k)) > 0 {
		k.State = statePendingReplicaDeletion
		return
	}
	k.State, k.Deletion = statePendingDeletion, &at
}

// cancel ends the waiting period and leaves the key Disabled, as AWS does.
func (k *key) cancel() {
	k.State, k.Deletion, k.PendingDays = stateDisabled, nil, 0
}

type keyIDOutput struct{ KeyId string }

func cancelKeyDeletion(c *call, in *keyInput) (*keyIDOutput, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "CancelKeyDeletion", nil)
	if aerr != nil {
		return nil, aerr
	}
	if k.State != statePendingDeletion && k.State != statePendingReplicaDeletion {
		return nil, errInvalidState(k.ARN, "is not pending deletion")
	}
	k.cancel()
	return &keyIDOutput{KeyId: k.ARN}, nil
}

type describeInput struct{ KeyId, Description string }

func updateKeyDescription(c *call, in *describeInput) (*nothing, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "UpdateKeyDescription", nil)
	if aerr != nil {
		return nil, aerr
	}
	if aerr := checkDescription(in.Description); aerr != nil {
		return nil, aerr
	}
	if k.State == statePendingDeletion {
		return nil, badState(k)
	}
	k.Description = in.Description
	return nil, nil
}

type replicateInput struct {
	KeyId                          string
	ReplicaRegion                  string
	Description                    string
	Policy                         string
	Tags                           []tag
	BypassPolicyLockoutSafetyCheck bool
}

type replicateOutput struct {
	ReplicaKeyMetadata *keyMetadata
	ReplicaPolicy      string
	ReplicaTags        []tag
}

func replicateKey(c *call, in *replicateInput) (*replicateOutput, *apiError) {
	k, aerr := c.key(in.KeyId, keyOnly, "ReplicateKey", nil)
	if aerr != nil {
		return nil, aerr
	}
	if !k.MultiRegion || !c.st.primary(k) {
		return nil, errUnsupported("%s is not a multi-Region primary key.", k.ARN)
	}
	if aerr := usable(k); aerr != nil {
		return nil, aerr
	}
	if !regionPattern.MatchString(in.ReplicaRegion) || in.ReplicaRegion == k.Region {
		return nil, errValidation("ReplicaRegion %.40q is not a Region other than the primary's", in.ReplicaRegion)
	}
	arn := keyARN(in.ReplicaRegion, k.Account, k.ID)
	if _, ok := c.st.Keys[arn]; ok {
		return nil, clientError("AlreadyExistsException", "%s already exists", arn)
	}
	if in.Policy == "" {
		in.Policy = defaultPolicy(c.s.account)
	} else if aerr := c.checkPolicy(in.Policy, in.BypassPolicyLockoutSafetyCheck); aerr != nil {
		return nil, aerr
	}
	if aerr := checkTags(in.Tags); aerr != nil {
		return nil, aerr
	}
	replica := &key{ID: k.ID, ARN: arn, Region: in.ReplicaRegion, Account: k.Account, Description: in.Description,
		State: stateEnabled, Created: c.now, MultiRegion: true, Spec: k.Spec, Usage: k.Usage, Origin: k.Origin,
		Policy: in.Policy, Tags: in.Tags}
	if c.s.replicaDelay > 0 {
		at := c.now.Add(c.s.replicaDelay)
		replica.State, replica.Ready = stateCreating, &at
	}
	c.st.Keys[arn] = replica
	return &replicateOutput{ReplicaKeyMetadata: c.metadata(replica), ReplicaPolicy: replica.Policy, ReplicaTags: replica.Tags}, nil
}
