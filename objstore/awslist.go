package objstore

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// Keys may hold characters that XML cannot; listings are therefore asked for in
// URL encoding and decoded here.

// decoder undoes the encoding that a listing says it has.
func decoder(encoding types.EncodingType) func(*string) string {
	if encoding != types.EncodingTypeUrl {
		return aws.ToString
	}
	return func(s *string) string {
		plain, err := url.QueryUnescape(aws.ToString(s))
		if err != nil {
			return aws.ToString(s)
		}
		return plain
	}
}

func (u *awsUpstream) List(ctx context.Context, q ListQuery) (Page, error) {
	switch q.Kind {
	case ListV1:
		return u.listV1(ctx, q)
	case ListVersions:
		return u.listVersions(ctx, q)
	}
	return u.listV2(ctx, q)
}

func (u *awsUpstream) listV1(ctx context.Context, q ListQuery) (Page, error) {
	out, err := u.client.ListObjects(ctx, &s3.ListObjectsInput{
		Bucket: &u.bucket, Prefix: opt(q.Prefix), Delimiter: opt(q.Delimiter), Marker: opt(q.Marker),
		MaxKeys: &q.Limit, EncodingType: types.EncodingTypeUrl,
	})
	if err != nil {
		return Page{}, failed(err)
	}
	decode := decoder(out.EncodingType)
	return Page{
		Entries: objectEntries(out.Contents, decode), Prefixes: prefixesOf(out.CommonPrefixes, decode),
		Truncated: aws.ToBool(out.IsTruncated), NextMarker: decode(out.NextMarker),
	}, nil
}

func (u *awsUpstream) listV2(ctx context.Context, q ListQuery) (Page, error) {
	out, err := u.client.ListObjectsV2(ctx, &s3.ListObjectsV2Input{
		Bucket: &u.bucket, Prefix: opt(q.Prefix), Delimiter: opt(q.Delimiter), StartAfter: opt(q.Marker),
		ContinuationToken: opt(q.SubMarker), MaxKeys: &q.Limit, FetchOwner: &q.FetchOwner, EncodingType: types.EncodingTypeUrl,
	})
	if err != nil {
		return Page{}, failed(err)
	}
	decode := decoder(out.EncodingType)
	return Page{
		Entries: objectEntries(out.Contents, decode), Prefixes: prefixesOf(out.CommonPrefixes, decode),
		Truncated: aws.ToBool(out.IsTruncated), NextToken: aws.ToString(out.NextContinuationToken),
	}, nil
}

func (u *awsUpstream) listVersions(ctx context.Context, q ListQuery) (Page, error) {
	out, err := u.client.ListObjectVersions(ctx, &s3.ListObjectVersionsInput{
		Bucket: &u.bucket, Prefix: opt(q.Prefix), Delimiter: opt(q.Delimiter), KeyMarker: opt(q.Marker),
		VersionIdMarker: opt(q.SubMarker), MaxKeys: &q.Limit, EncodingType: types.EncodingTypeUrl,
	})
	if err != nil {
		return Page{}, failed(err)
	}
	decode := decoder(out.EncodingType)
	page := Page{
		Prefixes: prefixesOf(out.CommonPrefixes, decode), Truncated: aws.ToBool(out.IsTruncated),
		NextMarker: decode(out.NextKeyMarker), NextToken: aws.ToString(out.NextVersionIdMarker),
	}
	for _, v := range out.Versions {
		page.Entries = append(page.Entries, Entry{
			Key: decode(v.Key), Size: aws.ToInt64(v.Size), ETag: aws.ToString(v.ETag), LastModified: aws.ToTime(v.LastModified),
			StorageClass: string(v.StorageClass), Owner: listedOwner(v.Owner), VersionID: aws.ToString(v.VersionId), Latest: aws.ToBool(v.IsLatest),
		})
	}
	for _, m := range out.DeleteMarkers {
		page.Entries = append(page.Entries, Entry{
			Key: decode(m.Key), LastModified: aws.ToTime(m.LastModified), Owner: listedOwner(m.Owner),
			VersionID: aws.ToString(m.VersionId), Latest: aws.ToBool(m.IsLatest), DeleteMarker: true,
		})
	}
	// The SDK gives versions and markers apart; S3 lists them by key, newest first.
	slices.SortStableFunc(page.Entries, func(a, b Entry) int {
		if c := strings.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		if c := b.LastModified.Compare(a.LastModified); c != 0 {
			return c
		}
		switch { // within one second only this tells the newest
		case a.Latest == b.Latest:
			return 0
		case a.Latest:
			return -1
		}
		return 1
	})
	return page, nil
}

func objectEntries(objects []types.Object, decode func(*string) string) []Entry {
	entries := make([]Entry, len(objects))
	for i, o := range objects {
		entries[i] = Entry{
			Key: decode(o.Key), Size: aws.ToInt64(o.Size), ETag: aws.ToString(o.ETag), LastModified: aws.ToTime(o.LastModified),
			StorageClass: string(o.StorageClass), Owner: listedOwner(o.Owner),
		}
	}
	return entries
}

func prefixesOf(prefixes []types.CommonPrefix, decode func(*string) string) []string {
	out := make([]string, len(prefixes))
	for i, p := range prefixes {
		out[i] = decode(p.Prefix)
	}
	return out
}

func listedOwner(o *types.Owner) Owner {
	if o == nil {
		return Owner{}
	}
	return Owner{ID: aws.ToString(o.ID), Name: aws.ToString(o.DisplayName)}
}

func (u *awsUpstream) CreateUpload(ctx context.Context, key string, a Attributes) (UploadID, error) {
	in := &s3.CreateMultipartUploadInput{
		Bucket: &u.bucket, Key: &key,
		ContentType: opt(a.ContentType), CacheControl: opt(a.CacheControl), ContentDisposition: opt(a.ContentDisposition),
		ContentEncoding: opt(a.ContentEncoding), ContentLanguage: opt(a.ContentLanguage),
		StorageClass: types.StorageClass(a.StorageClass), ServerSideEncryption: types.ServerSideEncryption(a.SSE),
		SSEKMSKeyId: opt(a.SSEKeyID), ACL: types.ObjectCannedACL(a.ACL), Tagging: opt(a.Tagging), Metadata: a.Metadata,
		ChecksumAlgorithm: u.checksum,
	}
	out, err := u.client.CreateMultipartUpload(ctx, in, expiresAs(a.Expires))
	if err != nil {
		return "", failed(err)
	}
	return UploadID(aws.ToString(out.UploadId)), nil
}

func (u *awsUpstream) PutPart(ctx context.Context, key string, id UploadID, number int32, body io.Reader, size int64) (string, error) {
	out, err := u.client.UploadPart(ctx, &s3.UploadPartInput{
		Bucket: &u.bucket, Key: &key, UploadId: aws.String(string(id)), PartNumber: &number, Body: body, ContentLength: &size,
		ChecksumAlgorithm: u.checksum,
	}, streaming(body))
	if err != nil {
		return "", failed(err)
	}
	return aws.ToString(out.ETag), nil
}

func (u *awsUpstream) CompleteUpload(ctx context.Context, key string, id UploadID, parts []Part, c Conditions) (Stored, error) {
	list := make([]types.CompletedPart, len(parts))
	for i, p := range parts {
		list[i] = types.CompletedPart{PartNumber: aws.Int32(p.Number), ETag: aws.String(p.ETag)}
	}
	if u.checksum != "" {
		if err := u.nameChecksums(ctx, key, id, list); err != nil {
			return Stored{}, err
		}
	}
	out, err := u.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
		Bucket: &u.bucket, Key: &key, UploadId: aws.String(string(id)), IfMatch: opt(c.IfMatch), IfNoneMatch: opt(c.IfNoneMatch),
		MultipartUpload: &types.CompletedMultipartUpload{Parts: list},
	})
	if err != nil {
		return Stored{}, failed(err)
	}
	return Stored{ETag: aws.ToString(out.ETag), VersionID: aws.ToString(out.VersionId), SSE: string(out.ServerSideEncryption), SSEKeyID: aws.ToString(out.SSEKMSKeyId)}, nil
}

// nameChecksums adds the checksums of its parts to the list that completes an upload:
// S3 demands them of one that was begun with checksums, and knows them itself.
func (u *awsUpstream) nameChecksums(ctx context.Context, key string, id UploadID, list []types.CompletedPart) error {
	pages := s3.NewListPartsPaginator(u.client, &s3.ListPartsInput{Bucket: &u.bucket, Key: &key, UploadId: aws.String(string(id))})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return failed(err)
		}
		for _, p := range page.Parts {
			i, found := slices.BinarySearchFunc(list, aws.ToInt32(p.PartNumber), func(c types.CompletedPart, n int32) int { return int(*c.PartNumber - n) })
			if found {
				list[i].ChecksumCRC32 = p.ChecksumCRC32
			}
		}
	}
	return nil
}

func (u *awsUpstream) AbortUpload(ctx context.Context, key string, id UploadID) error {
	_, err := u.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &u.bucket, Key: &key, UploadId: aws.String(string(id))})
	return failed(err)
}

func (u *awsUpstream) ListParts(ctx context.Context, key string, id UploadID, after, limit int32) (PartPage, error) {
	in := &s3.ListPartsInput{Bucket: &u.bucket, Key: &key, UploadId: aws.String(string(id)), MaxParts: &limit}
	if after > 0 {
		in.PartNumberMarker = aws.String(strconv.Itoa(int(after)))
	}
	out, err := u.client.ListParts(ctx, in)
	if err != nil {
		return PartPage{}, failed(err)
	}
	page := PartPage{Truncated: aws.ToBool(out.IsTruncated), StorageClass: string(out.StorageClass)}
	if next := aws.ToString(out.NextPartNumberMarker); next != "" {
		n, err := strconv.ParseInt(next, 10, 32)
		if err != nil {
			return PartPage{}, &UpstreamError{Status: http.StatusBadGateway, Code: "InternalError", Message: "the upstream's part number marker is no number"}
		}
		page.NextAfter = int32(n)
	}
	for _, p := range out.Parts {
		page.Parts = append(page.Parts, Part{Number: aws.ToInt32(p.PartNumber), ETag: aws.ToString(p.ETag), Size: aws.ToInt64(p.Size), LastModified: aws.ToTime(p.LastModified)})
	}
	return page, nil
}

func (u *awsUpstream) ListUploads(ctx context.Context, q ListQuery) (UploadPage, error) {
	out, err := u.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{
		Bucket: &u.bucket, Prefix: opt(q.Prefix), Delimiter: opt(q.Delimiter), KeyMarker: opt(q.Marker),
		UploadIdMarker: opt(q.SubMarker), MaxUploads: &q.Limit, EncodingType: types.EncodingTypeUrl,
	})
	if err != nil {
		return UploadPage{}, failed(err)
	}
	decode := decoder(out.EncodingType)
	page := UploadPage{
		Prefixes: prefixesOf(out.CommonPrefixes, decode), Truncated: aws.ToBool(out.IsTruncated),
		NextMarker: decode(out.NextKeyMarker), NextIDMarker: aws.ToString(out.NextUploadIdMarker),
	}
	for _, m := range out.Uploads {
		page.Uploads = append(page.Uploads, UploadEntry{
			Key: decode(m.Key), ID: UploadID(aws.ToString(m.UploadId)), Initiated: aws.ToTime(m.Initiated),
			StorageClass: string(m.StorageClass), Owner: listedOwner(m.Owner),
		})
	}
	return page, nil
}
