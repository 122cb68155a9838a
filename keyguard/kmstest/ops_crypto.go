package kmstest

import (
	"crypto/rand"
	"strconv"
)

type cryptoInput struct {
	KeyId               string
	Plaintext           []byte
	CiphertextBlob      []byte
	EncryptionContext   map[string]string
	EncryptionAlgorithm string
	GrantTokens         []string
	DryRun              bool

	KeySpec       string
	NumberOfBytes *int
	Recipient     *struct{}
}

type cryptoOutput struct {
	CiphertextBlob      []byte `json:",omitempty"`
	Plaintext           []byte `json:",omitempty"`
	KeyId               string `json:",omitempty"`
	EncryptionAlgorithm string `json:",omitempty"`
	KeyMaterialId       string `json:",omitempty"`
}

// contextLimit bounds the encryption context; KMS allows 8 KiB in its own serialisation.
const contextLimit = 8192

func checkContext(context map[string]string) *apiError {
	n := 0
	for k, v := range context {
		n += len(k) + len(v)
	}
	if n > contextLimit {
		return errValidation("EncryptionContext must not exceed %d bytes", contextLimit)
	}
	return nil
}

// cipherKey is the look-up and every check that comes before the bytes.
func (c *call) cipherKey(ref, action string, in *cryptoInput, context map[string]string) (*key, *apiError) {
	if in.Recipient != nil {
		return nil, errUnsupported("Recipient needs a Nitro enclave; this server has none.")
	}
	if aerr := checkContext(context); aerr != nil {
		return nil, aerr
	}
	k, aerr := c.key(ref, aliasAllowed, action, context, in.GrantTokens...)
	if aerr != nil {
		return nil, aerr
	}
	if k.Usage != "ENCRYPT_DECRYPT" {
		return nil, clientError("InvalidKeyUsageException", "%s key usage is %s which is not valid for %s.", k.ARN, k.Usage, action)
	}
	if k.Spec != symmetricDefault {
		return nil, clientError("InvalidKeyUsageException", "The request was rejected because the key spec %s of %s is not valid for %s on this server.", k.Spec, k.ARN, action)
	}
	if in.EncryptionAlgorithm != "" && in.EncryptionAlgorithm != symmetricDefault {
		return nil, clientError("InvalidKeyUsageException", "Algorithm %.40s and key spec %s are incompatible.", in.EncryptionAlgorithm, k.Spec)
	}
	return k, usable(k)
}

func encrypt(c *call, in *cryptoInput) (*cryptoOutput, *apiError) {
	if len(in.Plaintext) < 1 || len(in.Plaintext) > plaintextLimit {
		return nil, errValidation("1 validation error detected: Value at 'plaintext' failed to satisfy constraint: Member must have length between 1 and %d", plaintextLimit)
	}
	k, aerr := c.cipherKey(in.KeyId, "Encrypt", in, in.EncryptionContext)
	if aerr != nil {
		return nil, aerr
	}
	if in.DryRun {
		return nil, errDryRun()
	}
	blob := c.st.Families[k.ID].encrypt(k.ID, in.Plaintext, in.EncryptionContext)
	return &cryptoOutput{CiphertextBlob: blob, KeyId: k.ARN, EncryptionAlgorithm: symmetricDefault}, nil
}

// errHiddenKey is what KMS says when a ciphertext's own key cannot be used and
// the request did not name one: it does not tell whether the key exists.
func errHiddenKey(principal, action string) *apiError {
	return clientError("AccessDeniedException", "User: %s is not authorized to perform: kms:%s on the resource associated with this ciphertext because the resource does not exist in this Region, no resource-based policies allow access, or a resource-based policy explicitly denies access",
		principal, action)
}

// opened is a decrypted ciphertext and what it was made with.
type opened struct {
	key      *key
	material material
	plain    []byte
}

// open decrypts a blob. ref may be empty: then the ciphertext names its key.
func (c *call) open(blob []byte, ref, action string, in *cryptoInput, context map[string]string) (opened, *apiError) {
	if len(blob) < 1 || len(blob) > ciphertextLimit {
		return opened{}, errValidation("1 validation error detected: Value at 'ciphertextBlob' failed to satisfy constraint: Member must have length between 1 and %d", ciphertextLimit)
	}
	parsed, ok := parseCiphertext(blob)
	if ref == "" {
		if !ok {
			return opened{}, errInvalidCiphertext()
		}
		ref = keyARN(c.region, c.s.account, parsed.keyID)
		if _, found := c.st.Keys[ref]; !found {
			return opened{}, errHiddenKey(c.who.arn, action)
		}
	}
	k, aerr := c.cipherKey(ref, action, in, context)
	if aerr != nil {
		return opened{}, aerr
	}
	if !ok {
		return opened{}, errInvalidCiphertext()
	}
	if parsed.keyID != k.ID {
		return opened{}, errIncorrectKey()
	}
	plain, m, ok := c.st.Families[k.ID].decrypt(parsed, context)
	if !ok {
		return opened{}, errInvalidCiphertext()
	}
	return opened{key: k, material: m, plain: plain}, nil
}

func decrypt(c *call, in *cryptoInput) (*cryptoOutput, *apiError) {
	o, aerr := c.open(in.CiphertextBlob, in.KeyId, "Decrypt", in, in.EncryptionContext)
	if aerr != nil {
		return nil, aerr
	}
	if in.DryRun {
		return nil, errDryRun()
	}
	return &cryptoOutput{Plaintext: o.plain, KeyId: o.key.ARN, EncryptionAlgorithm: symmetricDefault, KeyMaterialId: o.material.ID}, nil
}

type reEncryptInput struct {
	CiphertextBlob                                            []byte
	SourceKeyId, DestinationKeyId                             string
	SourceEncryptionContext, DestinationEncryptionContext     map[string]string
	SourceEncryptionAlgorithm, DestinationEncryptionAlgorithm string
	GrantTokens                                               []string
	DryRun                                                    bool
}

type reEncryptOutput struct {
	CiphertextBlob                                            []byte
	SourceKeyId, KeyId                                        string
	SourceEncryptionAlgorithm, DestinationEncryptionAlgorithm string
	SourceKeyMaterialId, DestinationKeyMaterialId             string
}

func reEncrypt(c *call, in *reEncryptInput) (*reEncryptOutput, *apiError) {
	if in.DestinationKeyId == "" {
		return nil, errMissing("destinationKeyId")
	}
	c.event.EncryptionContext = in.SourceEncryptionContext
	source := &cryptoInput{GrantTokens: in.GrantTokens, EncryptionAlgorithm: in.SourceEncryptionAlgorithm}
	o, aerr := c.open(in.CiphertextBlob, in.SourceKeyId, "ReEncryptFrom", source, in.SourceEncryptionContext)
	if aerr != nil {
		return nil, aerr
	}
	destination := &cryptoInput{GrantTokens: in.GrantTokens, EncryptionAlgorithm: in.DestinationEncryptionAlgorithm}
	k, aerr := c.cipherKey(in.DestinationKeyId, "ReEncryptTo", destination, in.DestinationEncryptionContext)
	if aerr != nil {
		return nil, aerr
	}
	if in.DryRun {
		return nil, errDryRun()
	}
	f := c.st.Families[k.ID]
	return &reEncryptOutput{
		CiphertextBlob: f.encrypt(k.ID, o.plain, in.DestinationEncryptionContext),
		SourceKeyId:    o.key.ARN, KeyId: k.ARN,
		SourceEncryptionAlgorithm: symmetricDefault, DestinationEncryptionAlgorithm: symmetricDefault,
		SourceKeyMaterialId: o.material.ID, DestinationKeyMaterialId: f.current().ID,
	}, nil
}

// dataKeySize reads KeySpec and NumberOfBytes, of which exactly one is given.
func dataKeySize(in *cryptoInput) (int, *apiError) {
	switch {
	case in.KeySpec != "" && in.NumberOfBytes != nil, in.KeySpec == "" && in.NumberOfBytes == nil:
		return 0, errValidation("Please specify either number of bytes or key spec.")
	case in.NumberOfBytes != nil:
		if n := *in.NumberOfBytes; n >= 1 && n <= dataKeyLimit {
			return n, nil
		}
		return 0, errConstraint(strconv.Itoa(*in.NumberOfBytes), "numberOfBytes", "Member must have value between 1 and 1024")
	case in.KeySpec == "AES_256":
		return 32, nil
	case in.KeySpec == "AES_128":
		return 16, nil
	}
	return 0, errConstraint(limitString(in.KeySpec, 64), "keySpec", "Member must satisfy enum value set: [AES_256, AES_128]")
}

func generateDataKey(c *call, in *cryptoInput) (*cryptoOutput, *apiError) {
	return c.dataKey(in, "GenerateDataKey", true)
}

func generateDataKeyWithoutPlaintext(c *call, in *cryptoInput) (*cryptoOutput, *apiError) {
	return c.dataKey(in, "GenerateDataKeyWithoutPlaintext", false)
}

func (c *call) dataKey(in *cryptoInput, action string, reveal bool) (*cryptoOutput, *apiError) {
	n, aerr := dataKeySize(in)
	if aerr != nil {
		return nil, aerr
	}
	k, aerr := c.cipherKey(in.KeyId, action, in, in.EncryptionContext)
	if aerr != nil {
		return nil, aerr
	}
	if in.DryRun {
		return nil, errDryRun()
	}
	plain := make([]byte, n)
	rand.Read(plain)
	f := c.st.Families[k.ID]
	out := &cryptoOutput{CiphertextBlob: f.encrypt(k.ID, plain, in.EncryptionContext), KeyId: k.ARN, KeyMaterialId: f.current().ID}
	if reveal {
		out.Plaintext = plain
	}
	return out, nil
}

func generateRandom(c *call, in *cryptoInput) (*cryptoOutput, *apiError) {
	if aerr := c.account("GenerateRandom"); aerr != nil {
		return nil, aerr
	}
	if in.NumberOfBytes == nil || *in.NumberOfBytes < 1 || *in.NumberOfBytes > dataKeyLimit {
		return nil, errValidation("1 validation error detected: Value at 'numberOfBytes' failed to satisfy constraint: Member must have value between 1 and 1024")
	}
	plain := make([]byte, *in.NumberOfBytes)
	rand.Read(plain)
	return &cryptoOutput{Plaintext: plain}, nil
}
