//go:build linux

package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// numbered is a stream of consecutive numbers, from which every place can be told.
type numbered struct{ at, end int64 }

// Read implements io.Reader.
func (n *numbered) Read(b []byte) (int, error) {
	if n.at == n.end {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), n.end-n.at)]
	var word [8]byte
	for i := 0; i < len(b); {
		binary.BigEndian.PutUint64(word[:], uint64(n.at)/8)
		k := copy(b[i:], word[n.at%8:])
		i += k
		n.at += int64(k)
	}
	return len(b), nil
}

// TestFiveGiB stores an object of the size that S3 takes at once, which sealed is
// more than S3 takes at once, reads it whole and in ranges, and looks at the
// daemon's memory.
func TestFiveGiB(t *testing.T) {
	if os.Getenv("BYOKD_E2E") == "" {
		t.Skip("runs with make e2e")
	}
	const size = 5 << 30
	c := newConformance(t, false)
	client := s3.New(s3.Options{Region: "eu-central-1", BaseEndpoint: &c.s3, UsePathStyle: true, HTTPClient: awshttp.NewBuildableClient(),
		Credentials: credentials.NewStaticCredentialsProvider(kmstest.TenantAccessKey, kmstest.TenantSecret, ""), RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired})
	ctx, bucket, key := t.Context(), aws.String("test-bucket-1"), aws.String("large")
	if _, err := client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: bucket}); err != nil {
		t.Fatal(err)
	}
	idle := peakMemory(t, c.workerPid())
	presigned, err := s3.NewPresignClient(client).PresignPutObject(ctx, &s3.PutObjectInput{Bucket: bucket, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := putStream(presigned.URL, &numbered{end: size}, size); err != nil {
		t.Fatal(err)
	}
	t.Logf("put at %.0f MiB/s", size/(1<<20)/time.Since(began).Seconds())
	began = time.Now()
	out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: key})
	if err != nil || *out.ContentLength != size {
		t.Fatalf("%+v %v", out, err)
	}
	compare(t, out.Body, 0, size)
	t.Logf("get at %.0f MiB/s", size/(1<<20)/time.Since(began).Seconds())
	for _, from := range []int64{0, 1<<30 - 3, 3 << 30, size - 9} {
		to := min(from+100_000, size) - 1
		out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: bucket, Key: key, Range: aws.String(fmt.Sprintf("bytes=%d-%d", from, to))})
		if err != nil {
			t.Fatal(err)
		}
		compare(t, out.Body, from, to+1)
	}
	peak := peakMemory(t, c.workerPid())
	t.Logf("the daemon took %d MiB idle and %d MiB at its peak", idle>>20, peak>>20)
	if peak-idle > 32<<20 {
		t.Errorf("an object of 5 GiB took %d MiB", (peak-idle)>>20)
	}
}

// putStream uploads without an SDK between, which would read the body twice.
func putStream(url string, body io.Reader, size int64) error {
	req, err := http.NewRequest(http.MethodPut, url, body)
	if err != nil {
		return err
	}
	req.ContentLength = size
	response, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(response.Body, 4096))
		return errors.Join(fmt.Errorf("%s: %s", response.Status, text), err)
	}
	return nil
}

func compare(t *testing.T, body io.ReadCloser, from, to int64) {
	t.Helper()
	defer body.Close()
	want := &numbered{at: from, end: to}
	got, expected := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := from; at < to; {
		n, err := io.ReadFull(body, got[:min(int64(len(got)), to-at)])
		if err != nil {
			t.Fatalf("at %d: %v", at, err)
		}
		if _, err := io.ReadFull(want, expected[:n]); err != nil || !bytes.Equal(got[:n], expected[:n]) {
			t.Fatalf("wrong bytes between %d and %d (%v)", at, at+int64(n), err)
		}
		at += int64(n)
	}
	if n, err := body.Read(got[:1]); n > 0 || err != io.EOF {
		t.Fatalf("more than announced: %d %v", n, err)
	}
}

// peakMemory is the most resident memory that a process had.
func peakMemory(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	var kb int64
	if _, err := fmt.Sscan(rest, &kb); err != nil {
		t.Fatal(err)
	}
	return kb << 10
}
