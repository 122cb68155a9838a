package objstore_test

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// TestAgainstModel does at random what clients do, in two buckets with and without compression, through freezes, and compares
// every answer with what a map says. The lengths are those at which segments, parts and requests begin and end.
func TestAgainstModel(t *testing.T) {
	for seed := range uint64(4) {
		for _, compress := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed %d, compress %v", seed, compress), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, worldOptions{compress: compress, keyObjects: 5})
				w.proxy.Shrink(9*segment, 4*segment, time.Minute)
				m := &model{world: w, rnd: rand.New(rand.NewPCG(seed, 1)), objects: map[objectPlace]modelObject{}}
				for range 60 {
					m.step()
				}
				m.compare()
			})
		}
	}
}

// objectPlace is where an object is.
type objectPlace struct{ bucket, key string }

// modelObject is what an object should be.
type modelObject struct {
	body []byte
	meta map[string]string
}

// model is what should be in the buckets of a world.
type model struct {
	*world
	rnd     *rand.Rand
	objects map[objectPlace]modelObject
}

func (m *model) place() *objectPlace {
	return &objectPlace{[]string{"documents", "backups"}[m.rnd.IntN(2)], fmt.Sprint("o", m.rnd.IntN(6))}
}

func (m *model) must(what string, err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatalf("%s: %v", what, err)
	}
}

// size is a length of at most some segments, often one at an edge.
func (m *model) size() int {
	switch m.rnd.IntN(4) {
	case 0:
		return m.rnd.IntN(3)
	case 1:
		return max(0, segment*m.rnd.IntN(6)+m.rnd.IntN(3)-1)
	case 2:
		return m.rnd.IntN(12 * segment)
	}
	return m.rnd.IntN(2 * segment)
}

// bytes are some that compress well, or not at all.
func (m *model) bytes(n int) []byte {
	b := pattern(max(n, len(canary)), m.rnd.IntN(1000))[:n]
	if m.rnd.IntN(2) == 0 {
		for i := range b {
			b[i] = byte(m.rnd.Uint32())
		}
	}
	return b
}

func (m *model) meta() map[string]string {
	return []map[string]string{{}, {"a": fmt.Sprint(m.rnd.IntN(100)), "b": "x y"}}[m.rnd.IntN(2)]
}

// checksum is an algorithm, or none.
func (m *model) checksum(of ...types.ChecksumAlgorithm) types.ChecksumAlgorithm {
	return append(of, "")[m.rnd.IntN(len(of)+1)]
}

func (m *model) step() {
	switch m.rnd.IntN(12) {
	case 0, 1:
		m.put()
	case 2, 3:
		m.upload()
	case 4:
		m.copy()
	case 5:
		p := m.place()
		_, err := m.client.DeleteObject(m.t.Context(), &s3.DeleteObjectInput{Bucket: &p.bucket, Key: &p.key})
		m.must("delete", err)
		delete(m.objects, *p)
	case 6:
		m.freeze()
		m.thaw()
	default:
		m.read()
	}
}

func (m *model) put() {
	p, o := m.place(), modelObject{m.bytes(m.size()), m.meta()}
	_, err := m.client.PutObject(m.t.Context(), &s3.PutObjectInput{Bucket: &p.bucket, Key: &p.key, Body: bytes.NewReader(o.body), Metadata: o.meta,
		ChecksumAlgorithm: m.checksum(types.ChecksumAlgorithmSha1, types.ChecksumAlgorithmCrc64nvme)})
	m.must("put", err)
	m.objects[*p] = o
}

// upload uploads in parts, of equal length but for the last or not, some of them copied.
func (m *model) upload() {
	p, o := m.place(), modelObject{meta: m.meta()}
	algorithm := m.checksum(types.ChecksumAlgorithmCrc32, types.ChecksumAlgorithmSha256, types.ChecksumAlgorithmCrc64nvme)
	created, err := m.client.CreateMultipartUpload(m.t.Context(), &s3.CreateMultipartUploadInput{Bucket: &p.bucket, Key: &p.key, Metadata: o.meta, ChecksumAlgorithm: algorithm})
	m.must("create", err)
	var parts []types.CompletedPart
	count, equal, odd, number := 1+m.rnd.IntN(5), segment*(1+m.rnd.IntN(3)), m.rnd.IntN(2) == 0, int32(0)
	for i := range count {
		number += 1 + int32(m.rnd.IntN(2)) // with gaps
		size := equal
		if odd || i == count-1 {
			size = 1 + m.rnd.IntN(equal)
		}
		part, body := m.part(p, created.UploadId, number, size, algorithm)
		parts, o.body = append(parts, part), append(o.body, body...)
	}
	_, err = m.client.CompleteMultipartUpload(m.t.Context(), &s3.CompleteMultipartUploadInput{Bucket: &p.bucket, Key: &p.key, UploadId: created.UploadId,
		MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}})
	m.must("complete", err)
	m.objects[*p] = o
}

// part uploads one part, or copies it from another object.
func (m *model) part(p *objectPlace, id *string, number int32, size int, algorithm types.ChecksumAlgorithm) (types.CompletedPart, []byte) {
	from := m.place()
	if source := m.objects[*from].body; m.rnd.IntN(3) == 0 && len(source) >= size {
		at := m.rnd.IntN(len(source) - size + 1)
		out, err := m.client.UploadPartCopy(m.t.Context(), &s3.UploadPartCopyInput{Bucket: &p.bucket, Key: &p.key, UploadId: id, PartNumber: &number,
			CopySource: aws.String(from.bucket + "/" + from.key), CopySourceRange: aws.String(fmt.Sprintf("bytes=%d-%d", at, at+size-1))})
		m.must("copy of a part", err)
		r := out.CopyPartResult
		return types.CompletedPart{PartNumber: &number, ETag: r.ETag, ChecksumCRC32: r.ChecksumCRC32, ChecksumSHA256: r.ChecksumSHA256, ChecksumCRC64NVME: r.ChecksumCRC64NVME}, source[at : at+size]
	}
	body := m.bytes(size)
	out, err := m.client.UploadPart(m.t.Context(), &s3.UploadPartInput{Bucket: &p.bucket, Key: &p.key, UploadId: id, PartNumber: &number, Body: bytes.NewReader(body), ChecksumAlgorithm: algorithm})
	m.must("part", err)
	return types.CompletedPart{PartNumber: &number, ETag: out.ETag, ChecksumCRC32: out.ChecksumCRC32, ChecksumSHA256: out.ChecksumSHA256, ChecksumCRC64NVME: out.ChecksumCRC64NVME}, body
}

func (m *model) copy() {
	from, to := m.place(), m.place()
	o, found := m.objects[*from]
	if !found || *from == *to {
		return
	}
	in := &s3.CopyObjectInput{Bucket: &to.bucket, Key: &to.key, CopySource: aws.String(from.bucket + "/" + from.key), ChecksumAlgorithm: m.checksum(types.ChecksumAlgorithmSha256)}
	if m.rnd.IntN(2) == 0 {
		o.meta = m.meta()
		in.MetadataDirective, in.Metadata = types.MetadataDirectiveReplace, o.meta
	}
	_, err := m.client.CopyObject(m.t.Context(), in)
	m.must("copy", err)
	m.objects[*to] = o
}

// read reads an object, or a range of it. The SDK compares the checksum, if it is told one.
func (m *model) read() {
	p := m.place()
	o, found := m.objects[*p]
	if !found {
		return
	}
	in := &s3.GetObjectInput{Bucket: &p.bucket, Key: &p.key, ChecksumMode: types.ChecksumModeEnabled}
	from, to := 0, len(o.body)
	if to > 0 && m.rnd.IntN(4) > 0 {
		from = m.rnd.IntN(to)
		to = from + 1 + m.rnd.IntN(to-from)
		in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", from, to-1))
	}
	out, err := m.client.GetObject(m.t.Context(), in)
	m.must("get", err)
	defer out.Body.Close()
	got, err := io.ReadAll(out.Body)
	m.must("read", err)
	if !bytes.Equal(got, o.body[from:to]) {
		m.t.Fatalf("%v: bytes %d to %d of %d are wrong (%d)", *p, from, to, len(o.body), len(got))
	}
	if !maps.Equal(out.Metadata, o.meta) {
		m.t.Fatalf("%v: metadata %v, want %v", *p, out.Metadata, o.meta)
	}
}

// compare looks at the lengths of all objects, and of their parts.
func (m *model) compare() {
	listed := 0
	for _, bucket := range []string{"documents", "backups"} {
		list, err := m.client.ListObjectsV2(m.t.Context(), &s3.ListObjectsV2Input{Bucket: &bucket})
		m.must("list", err)
		for _, e := range list.Contents {
			listed++
			head, err := m.client.HeadObject(m.t.Context(), &s3.HeadObjectInput{Bucket: &bucket, Key: e.Key})
			m.must("head", err)
			want := int64(len(m.objects[objectPlace{bucket, *e.Key}].body))
			if *e.Size != want || *head.ContentLength != want || *head.ETag != *e.ETag {
				m.t.Errorf("%s/%s has %d bytes; listed %d, head %d", bucket, *e.Key, want, *e.Size, *head.ContentLength)
			}
		}
	}
	if listed != len(m.objects) {
		m.t.Errorf("%d objects listed of %d", listed, len(m.objects))
	}
	m.noPlaintext()
}
