package objstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// keyring parses the keyring that is upstream; nil without one.
func (w *world) keyring() *seal.Keyring {
	w.t.Helper()
	o := w.up.Object("acme-documents", objstore.KeyringObject)
	if o == nil {
		return nil
	}
	ring, err := seal.ParseKeyring(o.Data)
	if err != nil {
		w.t.Fatal(err)
	}
	return &ring
}

// mustHaveKeys fails the test unless the keyring lists every data key that an
// object upstream names.
func (w *world) mustHaveKeys(keys ...string) {
	w.t.Helper()
	listed := map[seal.KeyID]bool{}
	for _, e := range w.keyring().Keys {
		listed[e.ID] = true
	}
	for _, key := range keys {
		h, err := seal.ParseObjectHeader(w.up.Object("acme-documents", key).Data)
		if err != nil {
			w.t.Fatal(err)
		}
		if !listed[h.Key] {
			w.t.Errorf("the data key of %s is not in the keyring", key)
		}
	}
}

func isKeyring(method string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return r.Method == method && strings.HasSuffix(r.URL.Path, "/"+objstore.KeyringObject)
	}
}

func TestKeyringIsHidden(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("visible", []byte("x"))
	if w.keyring() == nil {
		t.Fatal("there is no keyring")
	}
	ctx, key := t.Context(), aws.String(objstore.KeyringObject)
	for _, prefix := range []string{"", ".", ".byokd/", objstore.KeyringObject} {
		v1, err := w.client.ListObjects(ctx, &s3.ListObjectsInput{Bucket: documents, Prefix: &prefix})
		if err != nil {
			t.Fatal(err)
		}
		v2, err := w.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: documents, Prefix: &prefix, Delimiter: aws.String("/")})
		if err != nil {
			t.Fatal(err)
		}
		want := 0
		if prefix == "" {
			want = 1
		}
		if len(v1.Contents) != want || len(v2.Contents) != want || len(v2.CommonPrefixes) != 0 || int(*v2.KeyCount) != want {
			t.Errorf("prefix %q shows %d, %d objects and %d prefixes", prefix, len(v1.Contents), len(v2.Contents), len(v2.CommonPrefixes))
		}
	}
	refused := map[string]func() error{
		"get": func() error {
			_, err := w.client.GetObject(ctx, &s3.GetObjectInput{Bucket: documents, Key: key})
			return err
		},
		"head": func() error {
			_, err := w.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: documents, Key: key})
			return err
		},
		"put": func() error {
			_, err := w.client.PutObject(ctx, &s3.PutObjectInput{Bucket: documents, Key: key, Body: strings.NewReader("x")})
			return err
		},
		"delete": func() error {
			_, err := w.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: documents, Key: key})
			return err
		},
		"tags": func() error {
			_, err := w.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: documents, Key: key})
			return err
		},
		"copy from": func() error {
			_, err := w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: documents, Key: aws.String("c"), CopySource: aws.String("documents/" + *key)})
			return err
		},
		"copy to": func() error {
			_, err := w.client.CopyObject(ctx, &s3.CopyObjectInput{Bucket: documents, Key: key, CopySource: aws.String("documents/visible")})
			return err
		},
		"upload": func() error {
			_, err := w.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: documents, Key: key})
			return err
		},
	}
	for name, call := range refused {
		if err := call(); err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("%s: %v", name, err)
		}
	}
	many, err := w.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: []types.ObjectIdentifier{{Key: key}}}})
	if err != nil || len(many.Errors) != 1 || w.keyring() == nil {
		t.Errorf("deleting many: %v, %+v", err, many)
	}
}

// TestKeysThatLeadElsewhere: no operation reaches the keyring or another bucket through a
// key that only a store on a filesystem would resolve.
func TestKeysThatLeadElsewhere(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("visible", []byte("x"))
	before := w.up.Calls("GET") + w.up.Calls("PUT") + w.up.Calls("HEAD") + w.up.Calls("DELETE") + w.up.Calls("POST")
	for key, status := range map[string]int{"a/../" + objstore.KeyringObject: http.StatusForbidden, "./" + objstore.KeyringObject: http.StatusForbidden, "../acme-backups/x": http.StatusBadRequest} {
		for _, method := range []string{"GET", "HEAD", "PUT", "DELETE", "POST"} {
			path := "/documents/" + key
			if method == "POST" {
				path += "?uploads"
			}
			response, err := http.DefaultClient.Do(w.request(method, path, nil, 0))
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != status {
				t.Errorf("%s %s: %d", method, key, response.StatusCode)
			}
		}
		_, err := w.client.CopyObject(t.Context(), &s3.CopyObjectInput{Bucket: documents, Key: aws.String("c"), CopySource: aws.String("documents/" + key)})
		wantCode(t, err, status, "")
		many, err := w.client.DeleteObjects(t.Context(), &s3.DeleteObjectsInput{Bucket: documents, Delete: &types.Delete{Objects: []types.ObjectIdentifier{{Key: &key}}}})
		if err != nil || len(many.Errors) != 1 {
			t.Errorf("deleting %s among others: %+v %v", key, many, err)
		}
	}
	if after := w.up.Calls("GET") + w.up.Calls("PUT") + w.up.Calls("HEAD") + w.up.Calls("DELETE") + w.up.Calls("POST"); after != before {
		t.Errorf("%d requests reached the upstream", after-before)
	}
}

// TestKeyringOfTwoDaemons: two proxies make data keys at the same time, while
// writes of the keyring fail before and after the fact. No key is lost.
func TestKeyringOfTwoDaemons(t *testing.T) {
	w := newWorld(t, worldOptions{keyObjects: 1})
	kms2 := &memoryKMSView{w.kms}
	second := w.another(startGuard(t, kms2), func(o *objstore.Options) { o.KeyObjects = 1 })
	w.up.Inject(&s3test.Fault{Match: isKeyring("PUT"), Times: 2, Status: 500, Code: "InternalError", Persist: true})
	w.up.Inject(&s3test.Fault{Match: isKeyring("PUT"), Times: 2, Status: 503, Code: "SlowDown"})
	const each = 15
	var writers sync.WaitGroup
	var keys []string
	for i, client := range []*s3.Client{w.client, second} {
		for n := range each {
			keys = append(keys, fmt.Sprintf("%d/%d", i, n))
		}
		writers.Go(func() {
			for n := range each {
				_, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String(fmt.Sprintf("%d/%d", i, n)), Body: strings.NewReader("x")})
				if err != nil {
					t.Errorf("put by %d: %v", i, err)
				}
			}
		})
	}
	writers.Wait()
	w.mustHaveKeys(keys...)
	if n := len(w.keyring().Keys); n < 2*each-1 {
		t.Errorf("%d keys for %d objects of a key each", n, 2*each)
	}
	for _, key := range keys {
		if got := w.mustGet(key, ""); string(got) != "x" {
			t.Errorf("%s reads %q", key, got)
		}
	}
}

// memoryKMSView is the same KMS key, asked by another guard.
type memoryKMSView struct{ *memoryKMS }

// TestKeyringIsRejoined: a proxy that starts within the period of the newest data
// key takes that one, so that restarts do not fill the keyring.
func TestKeyringIsRejoined(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("a", []byte("x"))
	for i := range 3 {
		client := w.another(startGuard(t, &memoryKMSView{w.kms}))
		if _, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String(fmt.Sprint(i)), Body: strings.NewReader("x")}); err != nil {
			t.Fatal(err)
		}
	}
	if ring := w.keyring(); len(ring.Keys) != 1 || ring.Generation != 1 {
		t.Errorf("%d data keys in generation %d after restarts", len(ring.Keys), ring.Generation)
	}
}

// TestKeyringDamage: a keyring that was put back, changed, replaced or removed is
// refused by who knows better; what was sealed before stays readable.
func TestKeyringDamage(t *testing.T) {
	w := newWorld(t, worldOptions{keyObjects: 1})
	w.put("a", []byte("first"))
	old := w.up.Object("acme-documents", objstore.KeyringObject)
	w.put("b", []byte("second"))
	w.put("c", []byte("third"))
	newest := w.up.Object("acme-documents", objstore.KeyringObject)
	put := func(client *s3.Client) error {
		_, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("d"), Body: strings.NewReader("x")})
		return err
	}
	damaged := func(change func(d []byte) []byte) *s3test.Stored {
		o := *newest
		o.Data, o.ETag = change(bytes.Clone(o.Data)), `"00000000000000000000000000000001"`
		return &o
	}
	for name, o := range map[string]*s3test.Stored{
		"put back": old,
		"bit":      damaged(func(d []byte) []byte { d[len(d)-5] ^= 1; return d }),
		"form":     damaged(func(d []byte) []byte { i := bytes.LastIndex(d, []byte(" 0=")); d[i+10] ^= 2; return d }),
		"cut":      damaged(func(d []byte) []byte { return d[:len(d)/2] }),
		"empty":    damaged(func([]byte) []byte { return nil }),
		"foreign":  damaged(func([]byte) []byte { return []byte("hello") }),
		"future":   damaged(func(d []byte) []byte { return bytes.Replace(d, []byte("keyring 1"), []byte("keyring 2"), 1) }),
	} {
		w.up.Replace("acme-documents", objstore.KeyringObject, o)
		if err := put(w.client); err == nil || !strings.Contains(err.Error(), "KeyringBroken") {
			t.Errorf("%s: the proxy that knew it better says %v", name, err)
		}
		if name != "put back" { // which nobody who comes anew can tell
			if err := put(w.another(startGuard(t, &memoryKMSView{w.kms}))); err == nil || !strings.Contains(err.Error(), "KeyringBroken") {
				t.Errorf("%s: a proxy that starts says %v", name, err)
			}
		}
		for key, want := range map[string]string{"a": "first", "c": "third"} {
			if got := w.mustGet(key, ""); string(got) != want {
				t.Errorf("%s: %s reads %q", name, key, got)
			}
		}
	}
	w.up.Replace("acme-documents", objstore.KeyringObject, newest)
	if err := put(w.client); err != nil {
		t.Errorf("with the newest one again: %v", err)
	}
	w.mustHaveKeys("a", "b", "c", "d")
}

// TestKeyringNeedsConditions: an upstream that ignores conditional writes is
// refused at the first write, each time.
func TestKeyringNeedsConditions(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.up.IgnoreConditions()
	for range 2 {
		_, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("o"), Body: strings.NewReader("x")})
		wantCode(t, err, http.StatusInternalServerError, "KeyringBroken")
		if w.keyring() != nil || w.up.Object("acme-documents", "o") != nil {
			t.Error("something was written")
		}
	}
}

// rewrapWorld is a world of objects under several data keys, with a second KMS key
// to move to.
type rewrapWorld struct {
	*world
	to     *memoryKMS
	bodies map[string][]byte
	etags  map[string]string
}

func newRewrapWorld(t *testing.T) *rewrapWorld {
	w := &rewrapWorld{world: newWorld(t, worldOptions{keyObjects: 3}), bodies: map[string][]byte{}, etags: map[string]string{}}
	w.to = newMemoryKMSCalled("arn:aws:kms:eu-central-1:111122223333:key/99999999-2222-4333-8444-555555555555")
	for i := range 7 {
		key, body := fmt.Sprintf("o/%d", i), pattern(1000*i, i)
		if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: &key, Body: bytes.NewReader(body), Metadata: map[string]string{"n": fmt.Sprint(i)}}); err != nil {
			t.Fatal(err)
		}
		w.bodies[key] = body
	}
	w.bodies["m"] = w.upload("m", 2*segment, 2*segment, 2*segment, 5)
	for key := range w.bodies {
		w.etags[key] = w.up.Object("acme-documents", key).ETag
	}
	return w
}

func (w *rewrapWorld) options() objstore.RewrapOptions {
	return objstore.RewrapOptions{Upstream: w.upstream(), Binding: documentsBinding, From: w.kms, To: w.to, ReEncrypt: w.kms.reEncrypt(w.to)}
}

// readable fails the test unless every object reads as it was written, through a
// proxy under the given key that has seen nothing yet.
func (w *rewrapWorld) readable(kms keyguard.KMS) {
	w.t.Helper()
	client := w.another(startGuard(w.t, kms))
	for key, want := range w.bodies {
		out, err := client.GetObject(w.t.Context(), &s3.GetObjectInput{Bucket: documents, Key: aws.String(key)})
		if err != nil {
			w.t.Errorf("%s: %v", key, err)
			continue
		}
		got, err := io.ReadAll(out.Body)
		if err != nil || !bytes.Equal(got, want) || len(out.Metadata) != 1 {
			w.t.Errorf("%s: %d bytes of %d, metadata %v, %v", key, len(got), len(want), out.Metadata, err)
		}
		out.Body.Close()
		if now := w.up.Object("acme-documents", key).ETag; now != w.etags[key] {
			w.t.Errorf("%s has another ETag now", key)
		}
	}
}

// allUnderNext reports whether the next KMS key alone opens all that is known of.
func allUnderNext(r *objstore.RewrapReport) bool {
	return len(r.Waiting) == 0 && len(r.Unreadable) == 0
}

func TestRewrap(t *testing.T) {
	w := newRewrapWorld(t)
	status, err := objstore.RewrapStatus(t.Context(), w.options())
	if err != nil || len(status.Waiting) != len(w.keyring().Keys)+1 || allUnderNext(status) {
		t.Fatalf("before: %+v, %v", status, err)
	}
	var last objstore.RewrapProgress
	o := w.options()
	o.Progress = func(p objstore.RewrapProgress) { last = p }
	report, err := objstore.Rewrap(t.Context(), o)
	if err != nil || !allUnderNext(report) || report.Rewrapped != report.Keys || last.Rewrapped != report.Keys || len(report.KMS) != 2 {
		t.Fatalf("%+v, %v, last progress %+v", report, err, last)
	}
	w.readable(&memoryKMSView{w.kms})
	w.readable(&memoryKMSView{w.to})

	// A daemon under the former key goes on, and what it makes is caught up with.
	for i := range 6 {
		key := fmt.Sprintf("late/%d", i)
		w.put(key, []byte("x"))
	}
	o.DropOld, o.Scan = true, true
	if report, err = objstore.Rewrap(t.Context(), o); err != nil || !allUnderNext(report) || report.Rewrapped == 0 || report.Dropped != report.Keys || len(report.KMS) != 1 {
		t.Fatalf("%+v, %v", report, err)
	}
	if report.Objects != 14 || report.Found != 0 || report.Unsealed != 0 {
		t.Errorf("scan: %+v", report)
	}
	w.kms.set(keyguard.Disabled)
	w.readable(&memoryKMSView{w.to})
	w.kms.set(keyguard.Enabled)
	awaitGate(t, w.guard, keyguard.Status.Ready)
	_, err = w.another(startGuard(t, &memoryKMSView{w.kms})).PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("d"), Body: strings.NewReader("x")})
	wantCode(t, err, http.StatusUnprocessableEntity, "SealedUnderOtherKey")
	if again, err := objstore.Rewrap(t.Context(), objstore.RewrapOptions{Upstream: w.upstream(), Binding: documentsBinding, To: w.to}); err != nil || again.Rewrapped != 0 || again.Generation != report.Generation {
		t.Errorf("once more: %+v, %v", again, err)
	}
}

// TestRewrapCrashes stops a rewrap at each of its steps, and before and after the
// fact of each write; the bucket stays readable under the old key, and the next
// run completes.
func TestRewrapCrashes(t *testing.T) {
	boom := errors.New("boom")
	for step := 1; ; step++ {
		w := newRewrapWorld(t)
		o := w.options()
		o.DropOld = step%2 == 0
		left := step
		ctx, cancel := context.WithCancelCause(t.Context())
		crash := func(*http.Request) bool {
			if left--; left == 0 {
				cancel(boom)
			}
			return false
		}
		reEncrypt := o.ReEncrypt
		o.ReEncrypt = func(c context.Context, wrapped []byte, b keyguard.Binding) ([]byte, error) {
			if crash(nil); ctx.Err() != nil {
				return nil, boom
			}
			return reEncrypt(c, wrapped, b)
		}
		w.up.Inject(&s3test.Fault{Match: crash})
		_, err := objstore.Rewrap(ctx, o)
		cancel(nil)
		w.up.Heal()
		if left > 0 {
			if err != nil || step < 5 {
				t.Fatalf("step %d: %v", step, err)
			}
			return
		}
		if !(o.DropOld && len(w.keyring().KMS()) == 1) {
			w.readable(&memoryKMSView{w.kms})
		}
		if report, err := objstore.Rewrap(t.Context(), w.options()); err != nil || !allUnderNext(report) {
			t.Fatalf("after a crash in step %d: %+v, %v", step, report, err)
		}
		w.readable(&memoryKMSView{w.to})
	}
}

// TestRewrapFaults: the upstream fails every k-th request, before or after the
// fact; the rewrap goes on, or fails clearly, and never loses a key.
func TestRewrapFaults(t *testing.T) {
	for k := 2; k <= 4; k++ {
		for _, persist := range []bool{false, true} {
			w := newRewrapWorld(t)
			n := 0
			w.up.Inject(&s3test.Fault{Match: func(*http.Request) bool { n++; return n%k == 0 }, Status: 503, Code: "SlowDown", Persist: persist})
			report, err := objstore.Rewrap(t.Context(), w.options())
			w.up.Heal()
			if err != nil || !allUnderNext(report) {
				t.Errorf("every %d-th, persist %t: %+v, %v", k, persist, report, err)
			}
			w.readable(&memoryKMSView{w.to})
		}
	}
}

// TestRewrapScan: a keyring that was lost is made anew from the objects' headers.
func TestRewrapScan(t *testing.T) {
	w := newRewrapWorld(t)
	w.up.Replace("acme-documents", "plain", &s3test.Stored{Data: []byte("plain object"), ETag: `"0123456789abcdef0123456789abcdef"`, Header: http.Header{}})
	foreign := w.up.Object("acme-documents", "o/3")
	copy(foreign.Data[128:], "arn:aws:kms:eu-central-1:111122223333:key/00000000")
	w.up.Remove("acme-documents", objstore.KeyringObject)
	o := w.options()
	o.Scan = true
	status, err := objstore.RewrapStatus(t.Context(), o)
	if err != nil || len(status.Waiting) < 3 || status.Unsealed != 1 || w.keyring() != nil {
		t.Fatalf("%+v, %v", status, err)
	}
	report, err := objstore.Rewrap(t.Context(), o)
	if err != nil || !allUnderNext(report) || report.Found != len(status.Waiting) || report.Objects != 9 {
		t.Fatalf("%+v, %v", report, err)
	}
	w.readable(&memoryKMSView{w.to})

	foreign.ETag = `"0123456789abcdef0123456789abcde1"`
	for i := range 16 {
		foreign.Data[40+i] ^= 0x55
	}
	w.up.Replace("acme-documents", "foreign", foreign)
	if report, err = objstore.Rewrap(t.Context(), o); err != nil || allUnderNext(report) || len(report.Unreadable) != 1 {
		t.Errorf("a key that nobody has: %+v, %v", report, err)
	}
}

// TestRewrapVerifies: a form that does not open to the same key is never written.
func TestRewrapVerifies(t *testing.T) {
	w := newRewrapWorld(t)
	o := w.options()
	o.ReEncrypt = func(ctx context.Context, _ []byte, b keyguard.Binding) ([]byte, error) {
		wrapped, _, err := w.to.GenerateDataKey(ctx, b, func([]byte) error { return nil })
		return wrapped, err
	}
	before := w.keyring().Generation
	if _, err := objstore.Rewrap(t.Context(), o); !errors.Is(err, seal.ErrWrongKey) {
		t.Errorf("another key's form: %v", err)
	}
	if w.keyring().Generation != before {
		t.Error("the keyring was written")
	}
}
