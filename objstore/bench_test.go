//go:build linux

package objstore_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/objstore"
)

var streamSizes = []int64{1 << 10, 1 << 20, 64 << 20}

// BenchmarkSealStream seals a body as a PutObject does, without HTTP.
func BenchmarkSealStream(b *testing.B) {
	w := newWorld(b, worldOptions{keyObjects: 1 << 40})
	for _, size := range streamSizes {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if err := w.proxy.SealTo(b.Context(), io.Discard, "documents", zeros{}, size); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// oneObject is an upstream that holds one object in memory.
type oneObject struct {
	objstore.Upstream
	data []byte
}

func (o oneObject) Get(context.Context, objstore.GetRequest) (*objstore.Object, error) {
	size := int64(len(o.data))
	return &objstore.Object{Info: objstore.Info{Size: size, ETag: `"0123456789abcdef0123456789abcdef"`}, Body: io.NopCloser(bytes.NewReader(o.data)), Length: size}, nil
}

// BenchmarkOpenStream opens an object as a GetObject does, without HTTP.
func BenchmarkOpenStream(b *testing.B) {
	for _, size := range streamSizes {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			var sealed bytes.Buffer
			w := newWorld(b, worldOptions{})
			if err := w.proxy.SealTo(b.Context(), &sealed, "documents", zeros{}, size); err != nil {
				b.Fatal(err)
			}
			reader, err := objstore.New(objstore.Options{Credentials: objstore.StaticCredentials{"a": "b"},
				Buckets: map[string]objstore.Bucket{"documents": {Upstream: oneObject{data: sealed.Bytes()}, Guard: w.guard, Binding: documentsBinding}}})
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if err := reader.OpenTo(b.Context(), io.Discard, "documents", "o"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// signedRequest is one as the SDK for Go signs it.
func signedRequest(w *world) *http.Request {
	r := w.request(http.MethodGet, "/documents/some/key/of/usual/length?x-id=GetObject", nil, 0)
	r.Host = r.URL.Host
	return r
}

// BenchmarkSigV4 verifies the signature of a request.
func BenchmarkSigV4(b *testing.B) {
	w := newWorld(b, worldOptions{})
	r := signedRequest(w)
	b.ReportAllocs()
	for b.Loop() {
		if err := w.proxy.Authenticate(r); err != nil {
			b.Fatal(err)
		}
	}
}

// chunkedRequest is a request with a body of signed chunks of 64 KiB, and the body.
func chunkedRequest(t testing.TB, w *world, size int) (*http.Request, []byte) {
	t.Helper()
	r := w.request(http.MethodPut, "/documents/o", nil, 0)
	r.Header.Set("X-Amz-Decoded-Content-Length", strconv.Itoa(size))
	w.sign(r, "STREAMING-AWS4-HMAC-SHA256-PAYLOAD")
	r.Host = r.URL.Host
	now, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil {
		t.Fatal(err)
	}
	return r, chunked(pattern(size, 1), r, now)
}

// BenchmarkChunks takes the framing off a body of signed chunks, each of which is
// hashed.
func BenchmarkChunks(b *testing.B) {
	const size = 4 << 20
	w := newWorld(b, worldOptions{})
	r, framed := chunkedRequest(b, w, size)
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		r.Body = io.NopCloser(bytes.NewReader(framed))
		if n, err := w.proxy.Unchunk(io.Discard, r); err != nil || n != size {
			b.Fatal(n, err)
		}
	}
}

// TestAllocationBudgets: what a request allocates at the edges of the proxy is
// bounded, and of a body it is for the request and a chunk, not for each byte.
func TestAllocationBudgets(t *testing.T) {
	w := newWorld(t, worldOptions{})
	signed := signedRequest(w)
	unchunk := func(size int) func() {
		r, framed := chunkedRequest(t, w, size)
		return func() {
			r.Body = io.NopCloser(bytes.NewReader(framed))
			if n, err := w.proxy.Unchunk(io.Discard, r); err != nil || n != int64(size) {
				t.Fatal(n, err)
			}
		}
	}
	for _, c := range []struct {
		name   string
		budget float64
		run    func()
	}{
		{"verifying a signature", 90, func() {
			if err := w.proxy.Authenticate(signed); err != nil {
				t.Fatal(err)
			}
		}},
		{"a body of 1 chunk", 130, unchunk(64 << 10)},
		{"a body of 64 chunks", 130 + 63*20, unchunk(4 << 20)},
	} {
		n := testing.AllocsPerRun(50, c.run)
		t.Logf("%s: %v allocations", c.name, n)
		if n > c.budget {
			t.Errorf("%s: %v allocations, at most %v are meant", c.name, n, c.budget)
		}
	}
}

// BenchmarkSmallObjects puts and gets objects of 1 KiB from 8 clients at once,
// through the proxy and straight to the same upstream. Client, proxy and upstream
// are one process; what byokd itself costs is the difference of the processor times,
// which does not depend on what else the machine does: byokd-objects/core-s.
func BenchmarkSmallObjects(b *testing.B) {
	w := newWorld(b, worldOptions{})
	body := pattern(1<<10, 1)
	clients := map[string]*s3.Client{"proxied": w.client, "straight": w.up.Client(objstore.TuneClient)}
	buckets := map[string]string{"proxied": "documents", "straight": "acme-documents"}
	var serial atomic.Int64
	put := func(ctx context.Context, way string) error {
		key := fmt.Sprint(way, serial.Add(1)%1000)
		_, err := clients[way].PutObject(ctx, &s3.PutObjectInput{Bucket: aws.String(buckets[way]), Key: &key, Body: bytes.NewReader(body)})
		return err
	}
	get := func(ctx context.Context, way string) error {
		out, err := clients[way].GetObject(ctx, &s3.GetObjectInput{Bucket: aws.String(buckets[way]), Key: aws.String(way + "1")})
		if err != nil {
			return err
		}
		defer out.Body.Close()
		n, err := io.Copy(io.Discard, out.Body)
		if err == nil && n != int64(len(body)) {
			err = fmt.Errorf("%d bytes", n)
		}
		return err
	}
	for name, op := range map[string]func(context.Context, string) error{"PUT": put, "GET": get} {
		straight := 0.0
		for _, way := range []string{"straight", "proxied"} {
			serial.Store(0) // so that object 1 is there
			if err := put(b.Context(), way); err != nil {
				b.Fatal(err)
			}
			b.Run(name+"/"+way, func(b *testing.B) {
				b.ReportAllocs()
				b.SetParallelism(4)
				before := processorTime(b)
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := op(b.Context(), way); err != nil {
							b.Fatal(err)
						}
					}
				})
				each := (processorTime(b) - before) / float64(b.N)
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "objects/s")
				if way == "straight" {
					straight = each
					return
				}
				b.ReportMetric(1/(each-straight), "byokd-objects/core-s")
			})
		}
	}
}

// processorTime is what this process has used so far, in seconds.
func processorTime(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}
