package awskms

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/byokd/byokd/keyguard"
)

// fuzzAnswer is what the fuzzed KMS says.
type fuzzAnswer struct {
	status int
	body   []byte
}

// FuzzAnswers: whatever comes back from the endpoint, nothing panics, only a
// success that names the key opens anything, and every failure has a state that
// is not Enabled.
func FuzzAnswers(f *testing.F) {
	const arn = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	for _, seed := range []fuzzAnswer{
		{200, []byte(`{"KeyId":"` + arn + `","Plaintext":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=","CiphertextBlob":"eA=="}`)},
		{200, []byte(`{"KeyId":"` + arn + `","Plaintext":"eA=="}`)},
		{200, []byte(`{"KeyMetadata":{"Arn":"` + arn + `","KeyState":"PendingDeletion","DeletionDate":1.8e9,"KeySpec":"SYMMETRIC_DEFAULT","KeyUsage":"ENCRYPT_DECRYPT"}}`)},
		{400, []byte(`{"__type":"DisabledException","message":"` + arn + ` is disabled."}`)},
		{400, []byte(`{"__type":"com.amazonaws.kms#KMSInvalidStateException","message":"pending deletion"}`)},
		{400, []byte(`{"__type":"AccessDeniedException","Message":"User: x is not authorized to perform: kms:Decrypt on resource: y"}`)},
		{500, []byte(`<html>`)}, {200, nil}, {302, nil}, {429, []byte(`{"__type":"ThrottlingException"}`)}, {200, []byte(`{"Plaintext":1}`)},
	} {
		f.Add(seed.status, seed.body)
	}
	var current atomic.Pointer[fuzzAnswer]
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		a := current.Load()
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
		w.WriteHeader(a.status)
		_, _ = w.Write(a.body)
	}))
	f.Cleanup(server.Close)
	client, err := New(aws.Config{Credentials: credentials.NewStaticCredentialsProvider("id", "secret", "")}, arn, Options{Endpoint: server.URL})
	if err != nil {
		f.Fatal(err)
	}
	b := keyguard.Binding{Cluster: "fuzz", Resource: "volume/x"}
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		if status < 200 || status > 599 || status == 204 || status == 304 {
			return // no body may follow, or it is no answer
		}
		current.Store(&fuzzAnswer{status, body})
		judge := func(call string, err error) {
			var k *keyguard.KMSError
			switch {
			case err == nil && status/100 != 2:
				t.Errorf("%s: success with status %d", call, status)
			case err != nil && !errors.As(err, &k):
				t.Errorf("%s: an error without a state: %v", call, err)
			case err != nil && keyguard.StateOf(err) == keyguard.Enabled:
				t.Errorf("%s: %v says that the key is enabled", call, err)
			}
		}
		_, err := client.Probe(t.Context(), []byte("probe"), b)
		judge("Probe", err)
		given := 0
		_, err = client.Unwrap(t.Context(), []byte("wrapped"), b, func(plain []byte) error { given = len(plain); return nil })
		judge("Unwrap", err)
		if err != nil && given > 0 {
			t.Errorf("Unwrap gives a key of %d bytes and fails: %v", given, err)
		}
		wrapped, _, err := client.GenerateDataKey(t.Context(), b, func(plain []byte) error { given = len(plain); return nil })
		judge("GenerateDataKey", err)
		if err == nil && (len(wrapped) == 0 || given != dataKeySize) {
			t.Errorf("GenerateDataKey gives %d wrapped bytes of a key of %d", len(wrapped), given)
		}
		_, _, err = client.GenerateProbe(t.Context(), b)
		judge("GenerateProbe", err)
		_, err = client.Describe(t.Context())
		judge("Describe", err)
	})
}
