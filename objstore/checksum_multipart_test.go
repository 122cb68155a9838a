package objstore_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
)

// TestChecksumsOfUploadsInParts completes an upload with right and wrong checksums of
// its parts and of the whole: what is wrong is refused before there is an object.
func TestChecksumsOfUploadsInParts(t *testing.T) {
	w := newWorld(t, worldOptions{})
	bodies := [][]byte{pattern(5<<20, 1), pattern(5<<20+4321, 2), pattern(99, 3)} // the second is sealed anew
	whole := bytes.Join(bodies, nil)
	crc := base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE(whole)))
	upload := func(algorithm types.ChecksumAlgorithm, kind types.ChecksumType) *s3.CompleteMultipartUploadInput {
		t.Helper()
		created, err := w.client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: documents, Key: aws.String("o"), ChecksumAlgorithm: algorithm, ChecksumType: kind})
		if err != nil {
			t.Fatal(err)
		}
		in := &s3.CompleteMultipartUploadInput{Bucket: documents, Key: aws.String("o"), UploadId: created.UploadId, ChecksumType: kind, MultipartUpload: &types.CompletedMultipartUpload{}}
		for i, body := range bodies {
			out, err := w.client.UploadPart(t.Context(), &s3.UploadPartInput{Bucket: documents, Key: in.Key, UploadId: in.UploadId, PartNumber: aws.Int32(int32(i + 1)), Body: bytes.NewReader(body), ChecksumAlgorithm: algorithm})
			if err != nil {
				t.Fatal(err)
			}
			in.MultipartUpload.Parts = append(in.MultipartUpload.Parts, types.CompletedPart{PartNumber: aws.Int32(int32(i + 1)), ETag: out.ETag, ChecksumCRC32: out.ChecksumCRC32, ChecksumSHA256: out.ChecksumSHA256})
		}
		listed, err := w.client.ListParts(t.Context(), &s3.ListPartsInput{Bucket: documents, Key: in.Key, UploadId: in.UploadId})
		if err != nil || len(listed.Parts) != len(bodies) {
			t.Fatal(listed, err)
		}
		for i, p := range listed.Parts {
			if *p.ETag != *in.MultipartUpload.Parts[i].ETag {
				t.Errorf("part %d is listed with ETag %s and was %s", i+1, *p.ETag, *in.MultipartUpload.Parts[i].ETag)
			}
		}
		return in
	}
	refused := func(in *s3.CompleteMultipartUploadInput, code string) {
		t.Helper()
		_, err := w.client.CompleteMultipartUpload(t.Context(), in)
		var api smithy.APIError
		if !errors.As(err, &api) || api.ErrorCode() != code || w.up.Object("acme-documents", "o") != nil {
			t.Errorf("%v instead of %s", err, code)
		}
	}
	in := upload(types.ChecksumAlgorithmCrc32, types.ChecksumTypeFullObject)
	right := in.MultipartUpload.Parts[0].ChecksumCRC32
	in.MultipartUpload.Parts[0].ChecksumCRC32 = in.MultipartUpload.Parts[1].ChecksumCRC32
	refused(in, "InvalidPart")
	in.MultipartUpload.Parts[0].ChecksumCRC32, in.ChecksumCRC32 = right, right
	refused(in, "BadDigest")
	in.ChecksumCRC32 = &crc
	out, err := w.client.CompleteMultipartUpload(t.Context(), in)
	if err != nil || aws.ToString(out.ChecksumCRC32) != crc || out.ChecksumType != types.ChecksumTypeFullObject {
		t.Fatalf("%+v %v %v", out, err, w.log.All())
	}
	if got := w.mustGet("o", ""); !bytes.Equal(got, whole) {
		t.Error("wrong bytes")
	}
	w.up.Remove("acme-documents", "o")

	in = upload(types.ChecksumAlgorithmSha256, types.ChecksumTypeComposite)
	sums := sha256.New()
	for _, body := range bodies {
		sum := sha256.Sum256(body)
		sums.Write(sum[:])
	}
	composite := base64.StdEncoding.EncodeToString(sums.Sum(nil)) + "-3"
	in.ChecksumSHA256 = aws.String(base64.StdEncoding.EncodeToString(sums.Sum(nil)) + "-2")
	refused(in, "BadDigest")
	in.ChecksumSHA256 = nil
	if out, err = w.client.CompleteMultipartUpload(t.Context(), in); err != nil || aws.ToString(out.ChecksumSHA256) != composite {
		t.Fatalf("%+v %v %v", out, err, w.log.All())
	}
	w.noPlaintext()
}

// TestCopyWithAnotherChecksum: a copy that asks for a checksum which its source does
// not have gets it, be it onto itself, and also where the source came in parts.
func TestCopyWithAnotherChecksum(t *testing.T) {
	w := newWorld(t, worldOptions{})
	bodies := map[string][]byte{"empty": nil, "short": pattern(10, 1), "long": pattern(9*segment+1, 2), "parts": nil}
	for name, body := range bodies {
		if name != "parts" {
			w.put(name, body)
		}
	}
	created, err := w.client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: documents, Key: aws.String("parts")})
	if err != nil {
		t.Fatal(err)
	}
	done := &types.CompletedMultipartUpload{}
	for i, body := range [][]byte{pattern(5<<20, 1), pattern(7, 2)} {
		bodies["parts"] = append(bodies["parts"], body...)
		number := aws.Int32(int32(i + 1))
		out, err := w.client.UploadPart(t.Context(), &s3.UploadPartInput{Bucket: documents, Key: aws.String("parts"), UploadId: created.UploadId, PartNumber: number, Body: bytes.NewReader(body)})
		if err != nil {
			t.Fatal(err)
		}
		done.Parts = append(done.Parts, types.CompletedPart{PartNumber: number, ETag: out.ETag})
	}
	if _, err := w.client.CompleteMultipartUpload(t.Context(), &s3.CompleteMultipartUploadInput{Bucket: documents, Key: aws.String("parts"), UploadId: created.UploadId, MultipartUpload: done}); err != nil {
		t.Fatal(err)
	}
	for name, body := range bodies {
		for _, to := range []string{name + "-copy", name} {
			in := &s3.CopyObjectInput{Bucket: documents, Key: aws.String(to), CopySource: aws.String("documents/" + name), ChecksumAlgorithm: types.ChecksumAlgorithmSha256}
			if _, err := w.client.CopyObject(t.Context(), in); err != nil {
				t.Fatalf("%s to %s: %v", name, to, err)
			}
			if len(body) > 0 { // which is read by range, too
				w.checksumsKept(t, to, body, types.ChecksumAlgorithmSha256)
			}
		}
	}
	w.noPlaintext()
}
