// Command minio uses byokd through minio-go, as many programs in Go do. It fails
// when anything is not as on S3. A module of its own keeps its dependencies out of
// byokd's.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

const bucket = "documents"

func main() {
	endpoint, err := url.Parse(os.Args[1])
	must(err)
	client, err := minio.New(endpoint.Host, &minio.Options{Creds: credentials.NewStaticV4("byokd", "byokd-secret", ""), Region: "eu-central-1", BucketLookup: minio.BucketLookupPath})
	must(err)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	exists, err := client.BucketExists(ctx, bucket)
	must(err)
	check(exists, "the bucket exists")
	for _, size := range []int{0, 1, 65536, 1 << 20, 17 << 20} {
		roundTrip(ctx, client, size)
	}
	copied, err := client.CopyObject(ctx, minio.CopyDestOptions{Bucket: "backups", Object: "minio/copy"}, minio.CopySrcOptions{Bucket: bucket, Object: "minio/1048576"})
	must(err)
	check(copied.ETag != "", "the copy has an ETag")
	composed, err := client.ComposeObject(ctx, minio.CopyDestOptions{Bucket: bucket, Object: "minio/composed"},
		minio.CopySrcOptions{Bucket: bucket, Object: "minio/17825792"}, minio.CopySrcOptions{Bucket: bucket, Object: "minio/1048576"})
	must(err)
	check(composed.Size == 18<<20 || composed.Size == 0, "the composed object")
	stat, err := client.StatObject(ctx, bucket, "minio/composed", minio.StatObjectOptions{})
	must(err)
	check(stat.Size == 18<<20, fmt.Sprint("the size of the composed object: ", stat.Size))
	link, err := client.PresignedGetObject(ctx, bucket, "minio/65536", time.Minute, nil)
	must(err)
	answer, err := http.Get(link.String())
	must(err)
	body, err := io.ReadAll(answer.Body)
	must(err)
	check(answer.StatusCode == http.StatusOK && bytes.Equal(body, content(65536)), "the link opens")
	listed := 0
	for o := range client.ListObjects(ctx, bucket, minio.ListObjectsOptions{Prefix: "minio/", Recursive: true}) {
		must(o.Err)
		listed++
		must(client.RemoveObject(ctx, bucket, o.Key, minio.RemoveObjectOptions{}))
	}
	check(listed == 6, fmt.Sprint("listed ", listed))
	fmt.Println("minio-go: all as on S3")
}

func roundTrip(ctx context.Context, client *minio.Client, size int) {
	key, want := fmt.Sprint("minio/", size), content(size)
	_, err := client.PutObject(ctx, bucket, key, bytes.NewReader(want), int64(size), minio.PutObjectOptions{PartSize: 5 << 20, UserMetadata: map[string]string{"title": "x"}})
	must(err)
	o, err := client.GetObject(ctx, bucket, key, minio.GetObjectOptions{})
	must(err)
	got, err := io.ReadAll(o)
	must(err)
	info, err := client.StatObject(ctx, bucket, key, minio.StatObjectOptions{})
	must(err)
	check(bytes.Equal(got, want) && info.Size == int64(size) && info.UserMetadata["Title"] == "x", fmt.Sprintf("%s comes back: %d bytes, %+v", key, len(got), info))
}

func content(size int) []byte {
	b := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(size >> 16)})
	_, _ = r.Read(b) // never fails
	return b
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func check(holds bool, what string) {
	if !holds {
		log.Fatal(what, ": not as on S3")
	}
}
