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

// BenchmarkSigV4 verifies the signature of a request as the SDK for Go signs it.
func BenchmarkSigV4(b *testing.B) {
	w := newWorld(b, worldOptions{})
	r := w.request(http.MethodGet, "/documents/some/key/of/usual/length?x-id=GetObject", nil, 0)
	r.Host = r.URL.Host
	b.ReportAllocs()
	for b.Loop() {
		if err := w.proxy.Authenticate(r); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkChunks takes the framing off a body of signed chunks of 64 KiB, each of
// which is hashed.
func BenchmarkChunks(b *testing.B) {
	const size = 4 << 20
	w := newWorld(b, worldOptions{})
	r := w.request(http.MethodPut, "/documents/o", nil, 0)
	r.Header.Set("X-Amz-Decoded-Content-Length", strconv.Itoa(size))
	w.sign(r, "STREAMING-AWS4-HMAC-SHA256-PAYLOAD")
	r.Host = r.URL.Host
	now, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil {
		b.Fatal(err)
	}
	framed := chunked(pattern(size, 1), r, now)
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		r.Body = io.NopCloser(bytes.NewReader(framed))
		if n, err := w.proxy.Unchunk(io.Discard, r); err != nil || n != size {
			b.Fatal(n, err)
		}
	}
}

// BenchmarkSmallObjects puts and gets objects of 1 KiB from 8 clients at once,
// through the proxy and straight to the same upstream. Client, proxy and upstream
// share the processors: what byokd itself costs is the difference.
func BenchmarkSmallObjects(b *testing.B) {
	w := newWorld(b, worldOptions{})
	body := pattern(1<<10, 1)
	clients := map[string]*s3.Client{"proxied": w.client, "straight": w.up.Client(objstore.TuneClient)}
	buckets := map[string]string{"proxied": "documents", "straight": "acme-documents"}
	for _, way := range []string{"straight", "proxied"} {
		client, bucket := clients[way], aws.String(buckets[way])
		b.Run("PUT/"+way, func(b *testing.B) {
			b.ReportAllocs()
			var serial atomic.Int64
			b.SetParallelism(4)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					key := fmt.Sprint(way, serial.Add(1)%1000)
					if _, err := client.PutObject(b.Context(), &s3.PutObjectInput{Bucket: bucket, Key: &key, Body: bytes.NewReader(body)}); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "objects/s")
		})
		b.Run("GET/"+way, func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(4)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					out, err := client.GetObject(b.Context(), &s3.GetObjectInput{Bucket: bucket, Key: aws.String(way + "1")})
					if err != nil {
						b.Fatal(err)
					}
					if n, err := io.Copy(io.Discard, out.Body); err != nil || n != int64(len(body)) {
						b.Fatal(n, err)
					}
					out.Body.Close()
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "objects/s")
		})
	}
}
