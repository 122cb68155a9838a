package objstore_test

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// calls returns how many keys were made and how many unwrapped, probes left out.
func (k *memoryKMS) calls() (created, unwraps int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.created, k.unwraps
}

// inWorkers runs work for 0 to n-1 in eight goroutines.
func inWorkers(n int, work func(i int)) {
	var next atomic.Int64
	var workers sync.WaitGroup
	for range 8 {
		workers.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				work(i)
			}
		})
	}
	workers.Wait()
}

// TestKMSCallsOf10000Objects writes 10,000 objects with metadata over five periods
// of a data key, and reads them back through a byokd that has just started: calls
// of KMS are counted by periods, not by objects.
func TestKMSCallsOf10000Objects(t *testing.T) {
	const objects, periods = 10_000, 5
	// A period ends after so many uses here, not after an hour; an object with
	// metadata is two.
	w := newWorld(t, worldOptions{keyObjects: 2 * objects / periods})
	body := []byte("a small document")
	inWorkers(objects, func(i int) {
		key := fmt.Sprint(i)
		if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: &key, Body: bytes.NewReader(body), Metadata: map[string]string{"n": key}}); err != nil {
			t.Error(err)
		}
	})
	created, unwraps := w.kms.calls()
	if created != periods+1 || unwraps != 0 {
		t.Errorf("writing: %d keys made, %d unwrapped; want one for each of %d periods and one for the keyring", created, unwraps, periods)
	}
	reader := w.another(startGuard(t, &memoryKMSView{w.kms}))
	inWorkers(objects, func(i int) {
		key := fmt.Sprint(i)
		out, err := reader.GetObject(t.Context(), &s3.GetObjectInput{Bucket: documents, Key: &key})
		if err != nil {
			t.Error(err)
			return
		}
		defer out.Body.Close()
		if got, err := io.ReadAll(out.Body); err != nil || !bytes.Equal(got, body) || out.Metadata["n"] != key {
			t.Errorf("%s reads %q, %v", key, got, err)
		}
	})
	_, read := w.kms.calls()
	t.Logf("KMS calls of %d objects in %d key periods: %d to write them, %d to read them back", objects, periods, created, read)
	if read > periods+1 {
		t.Errorf("reading: %d calls", read)
	}
}

// TestReplacedMetadataIsSealed: the copy onto itself by which clients change
// metadata seals it as a first write does, empty values and names included.
func TestReplacedMetadataIsSealed(t *testing.T) {
	w := newWorld(t, worldOptions{})
	w.put("d", []byte("x"))
	for _, meta := range []map[string]string{{"name": canary + ".pdf", "empty": "", "process": canary}, {"empty": ""}, {}} {
		_, err := w.client.CopyObject(t.Context(), &s3.CopyObjectInput{Bucket: documents, Key: aws.String("d"), CopySource: aws.String("documents/d"),
			MetadataDirective: types.MetadataDirectiveReplace, Metadata: meta})
		if err != nil {
			t.Fatal(err)
		}
		head, err := w.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: documents, Key: aws.String("d")})
		if err != nil || len(head.Metadata) != len(meta) {
			t.Fatalf("%v, %v", head, err)
		}
		for name, value := range meta {
			if got, present := head.Metadata[name]; !present || got != value {
				t.Errorf("%s is %q", name, got)
			}
		}
		if got := w.mustGet("d", ""); string(got) != "x" {
			t.Errorf("it reads %q", got)
		}
		w.noPlaintext()
	}
}
