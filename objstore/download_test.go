package objstore_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// TestFreezeWipesWhatWasReadAhead: a client that does not read leaves batches behind
// that were opened for it. A freeze clears them, and they are opened again after the
// thaw; so are those of a copy, which takes place between two buckets.
func TestFreezeWipesWhatWasReadAhead(t *testing.T) {
	w := newWorld(t, worldOptions{})
	body := bytes.Repeat([]byte{0xA5}, 512*segment) // no byte of it looks like a cleared one
	w.put("big", body)
	response, err := http.DefaultClient.Do(w.request("GET", "/documents/big", nil, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	await(t, "that batches wait for the client", func() bool {
		batches, open := w.proxy.OpenedBytes("documents")
		return batches == 3 && open > 8*segment
	})
	w.freeze()
	await(t, "that the freeze clears them", func() bool { _, open := w.proxy.OpenedBytes("documents"); return open == 0 })
	w.thaw()
	got, err := io.ReadAll(response.Body)
	if err != nil || !bytes.Equal(got, body) {
		t.Fatalf("%d bytes of %d, equal %v, %v", len(got), len(body), bytes.Equal(got, body), err)
	}
	await(t, "that nothing is left of the download", func() bool { batches, _ := w.proxy.OpenedBytes("documents"); return batches == 0 })
}

// TestFreezesAmidDownloads freezes over and over under downloads and copies of all
// lengths around those of pieces, segments and batches: every byte is right.
func TestFreezesAmidDownloads(t *testing.T) {
	w := newWorld(t, worldOptions{})
	sizes := []int{1, segment - 64, segment - 63, segment, 4*segment - 1, 4 * segment, 4*segment + 1, 12*segment + 7, 64*segment + 1}
	for _, n := range sizes {
		w.put(key(n), pattern(n, n))
	}
	done := make(chan struct{})
	frozen := make(chan struct{})
	go func() {
		defer close(frozen)
		for {
			select {
			case <-done:
				return
			default:
				w.freeze()
				w.thaw()
			}
		}
	}()
	for range 6 {
		for _, n := range sizes {
			want := pattern(n, n)
			if got := w.mustGet(key(n), ""); !bytes.Equal(got, want) {
				t.Fatalf("%d bytes came wrong", n)
			}
			in := &s3.CopyObjectInput{Bucket: aws.String("backups"), Key: aws.String(key(n)), CopySource: aws.String("documents/" + key(n))}
			if _, err := w.client.CopyObject(t.Context(), in); err != nil {
				t.Fatal(err)
			}
			out, err := w.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: in.Bucket, Key: in.Key})
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(out.Body)
			out.Body.Close()
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes were copied wrong: %v", n, err)
			}
		}
	}
	close(done)
	<-frozen
}

func key(n int) string { return fmt.Sprintf("of-%d", n) }
