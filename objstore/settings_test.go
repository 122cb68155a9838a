package objstore_test

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// TestRightsGoUpWithTheObjectOnly sends the headers that concern rights and locks,
// and looks at which requests to the upstream carry them: the one that stores the
// object, and none about the keyring, which a lock would make unchangeable.
func TestRightsGoUpWithTheObjectOnly(t *testing.T) {
	w := newWorld(t, worldOptions{checksums: true}) // without which S3 takes no lock
	w.up.Lock("acme-documents")
	var mu sync.Mutex
	seen := map[string]http.Header{} // by method and key
	w.up.Inject(&s3test.Fault{Match: func(r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		seen[r.Method+" "+strings.TrimPrefix(r.URL.Path, "/acme-documents/")] = r.Header.Clone()
		return false
	}})
	_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("locked"), Body: strings.NewReader("x"),
		ObjectLockLegalHoldStatus: types.ObjectLockLegalHoldStatusOn, GrantRead: aws.String("id=auditor"), ExpectedBucketOwner: aws.String("111122223333")})
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	up := seen["PUT locked"]
	for name, want := range map[string]string{"X-Amz-Object-Lock-Legal-Hold": "ON", "X-Amz-Grant-Read": "id=auditor", "X-Amz-Expected-Bucket-Owner": "111122223333"} {
		if up.Get(name) != want {
			t.Errorf("%s went up as %q", name, up.Get(name))
		}
		for request, h := range seen {
			if strings.HasSuffix(request, objstore.KeyringObject) && h.Get(name) != "" {
				t.Errorf("%s carries %s", request, name)
			}
		}
	}
	if _, found := seen["PUT "+objstore.KeyringObject]; !found {
		t.Errorf("the keyring was not written: %v", seen)
	}
	if up.Get("Authorization") == "" || !strings.Contains(up.Get("Authorization"), "x-amz-object-lock-legal-hold") {
		t.Error("the headers are not signed")
	}
}
