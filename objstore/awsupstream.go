package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// upstreamConns is how many idle connections are kept to one upstream host: as
// many transfers as the documented memory bound of the daemon allows at once.
const upstreamConns = 128

// TuneClient sets what an S3 client below the proxy needs: checksums of sealed
// bytes only where S3 always demands them (each segment is authenticated anyway),
// and enough kept connections. Pass it to s3.NewFromConfig; options after it win.
func TuneClient(o *s3.Options) {
	o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
	o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	o.APIOptions = append(o.APIOptions, passThrough)
	if c, ok := o.HTTPClient.(*awshttp.BuildableClient); ok {
		o.HTTPClient = c.WithTransportOptions(func(t *http.Transport) {
			t.MaxIdleConnsPerHost = upstreamConns
			// No bound over all hosts: at that one, net/http closes the connection that is
			// idle the longest, which under a burst may be one whose answer (without a body)
			// was not handed on yet, and an upload that succeeded would be told as failed.
			t.MaxIdleConns = 0
			t.WriteBufferSize, t.ReadBufferSize = 64<<10, 64<<10
			// Sealed bytes do not compress, and a Range must stay one.
			t.DisableCompression = true
		})
	}
}

// SendChecksums makes a client that TuneClient has tuned send a checksum of the
// sealed bytes with each upload, as S3 demands of buckets with a default retention
// (Object Lock). It follows the bytes in a trailer, since they are sealed while they
// are sent; the SDK does that over TLS only, and not every store understands it.
func SendChecksums(o *s3.Options) {
	o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenSupported
}

// NewUpstream makes an Upstream of one bucket behind an AWS client. The client
// should have been made with TuneClient.
func NewUpstream(client *s3.Client, bucket string) Upstream {
	u := &awsUpstream{client: client, bucket: bucket}
	if client.Options().RequestChecksumCalculation == aws.RequestChecksumCalculationWhenSupported {
		u.checksum = types.ChecksumAlgorithmCrc32
	}
	return u
}

// awsUpstream is safe for concurrent use; it does not change.
type awsUpstream struct {
	client   *s3.Client
	bucket   string
	checksum types.ChecksumAlgorithm // sent with each upload; empty: none
}

// streaming are the options of a request whose body cannot be rewound: tried
// once, and not hashed before it is sent. TLS, where there is some, protects it;
// sealed bytes protect themselves. A body that wants to know of an answer that
// came before its end has a method answered: the SDK hands an answer on only when
// nobody reads the body any more.
func streaming(body io.Reader) func(*s3.Options) {
	return func(o *s3.Options) {
		o.RetryMaxAttempts = 1
		o.APIOptions = append(o.APIOptions, v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware)
		if b, ok := body.(interface{ answered() }); ok {
			o.HTTPClient = &answering{client: o.HTTPClient, body: b}
		}
	}
}

// answering tells a body that its request was answered.
type answering struct {
	client s3.HTTPClient
	body   interface{ answered() }
}

// Do implements s3.HTTPClient.
func (a *answering) Do(r *http.Request) (*http.Response, error) {
	response, err := a.client.Do(r)
	a.body.answered()
	return response, err
}

// opt returns nil for an empty string.
func opt(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func optTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// expiresAs sends an Expires as the client gave it: caches take what is no date for the past.
func expiresAs(value string) func(*s3.Options) {
	return func(o *s3.Options) {
		if value != "" {
			o.APIOptions = append(o.APIOptions, smithyhttp.SetHeaderValue("Expires", value))
		}
	}
}

// failed translates an SDK error.
func failed(err error) error {
	if err == nil {
		return nil
	}
	up := &UpstreamError{Cause: err}
	var response *smithyhttp.ResponseError
	if errors.As(err, &response) {
		up.Status = response.HTTPStatusCode()
		var named interface{ ServiceRequestID() string }
		if errors.As(err, &named) {
			up.RequestID = named.ServiceRequestID()
		}
	}
	var api smithy.APIError
	if errors.As(err, &api) {
		up.Code, up.Message = api.ErrorCode(), api.ErrorMessage()
	}
	switch {
	case up.Status == http.StatusNotModified:
		up.Code = "NotModified"
	case up.Status == http.StatusPreconditionFailed:
		up.Code, up.Message = "PreconditionFailed", "At least one of the pre-conditions you specified did not hold."
	case up.Status >= 500 && (up.Code == "" || up.Code == "UnknownError"):
		up.Code = "ServiceUnavailable"
	}
	return up
}

// Get implements Objects.
func (u *awsUpstream) Get(ctx context.Context, req GetRequest) (*Object, error) {
	in := &s3.GetObjectInput{
		Bucket: &u.bucket, Key: &req.Key, VersionId: opt(req.VersionID),
		IfMatch: opt(req.IfMatch), IfNoneMatch: opt(req.IfNoneMatch),
		IfModifiedSince: optTime(req.IfModifiedSince), IfUnmodifiedSince: optTime(req.IfUnmodifiedSince),
	}
	if req.ranged() {
		last := ""
		if req.To > 0 {
			last = strconv.FormatInt(req.To-1, 10)
		}
		in.Range = aws.String("bytes=" + strconv.FormatInt(req.From, 10) + "-" + last)
	}
	out, err := u.client.GetObject(ofOwn(ctx, req.Key), in)
	if err != nil {
		return nil, failed(err)
	}
	obj := &Object{Body: out.Body, Length: aws.ToInt64(out.ContentLength)}
	obj.Info = Info{
		Attributes: Attributes{
			ContentType: aws.ToString(out.ContentType), CacheControl: aws.ToString(out.CacheControl),
			ContentDisposition: aws.ToString(out.ContentDisposition), ContentEncoding: contentEncoding(aws.ToString(out.ContentEncoding)),
			ContentLanguage: aws.ToString(out.ContentLanguage), Expires: aws.ToString(out.ExpiresString),
			StorageClass: string(out.StorageClass), SSE: string(out.ServerSideEncryption), SSEKeyID: aws.ToString(out.SSEKMSKeyId),
			Metadata: out.Metadata,
		},
		Size: obj.Length, ETag: aws.ToString(out.ETag), LastModified: aws.ToTime(out.LastModified),
		VersionID: aws.ToString(out.VersionId), DeleteMarker: aws.ToBool(out.DeleteMarker),
		TagCount: aws.ToInt32(out.TagCount), Restore: aws.ToString(out.Restore),
	}
	if req.ranged() {
		if obj.Size, err = totalOf(aws.ToString(out.ContentRange), req.From); err != nil {
			out.Body.Close()
			return nil, err
		}
	}
	return obj, nil
}

// totalOf reads the length of the whole object from a Content-Range that has to
// begin where it was asked to.
func totalOf(contentRange string, from int64) (int64, error) {
	span, total, found := strings.Cut(strings.TrimPrefix(contentRange, "bytes "), "/")
	first, _, _ := strings.Cut(span, "-")
	n, err := strconv.ParseInt(total, 10, 64)
	if !found || err != nil || first != strconv.FormatInt(from, 10) {
		return 0, &UpstreamError{Status: http.StatusBadGateway, Code: "InternalError", Message: fmt.Sprintf("the upstream ignored a range (Content-Range %q)", contentRange)}
	}
	return n, nil
}

func (u *awsUpstream) Head(ctx context.Context, req GetRequest) (Info, error) {
	var part *int32
	if req.Part > 0 {
		part = aws.Int32(int32(req.Part))
	}
	out, err := u.client.HeadObject(ofOwn(ctx, req.Key), &s3.HeadObjectInput{
		PartNumber: part,
		Bucket:     &u.bucket, Key: &req.Key, VersionId: opt(req.VersionID),
		IfMatch: opt(req.IfMatch), IfNoneMatch: opt(req.IfNoneMatch),
		IfModifiedSince: optTime(req.IfModifiedSince), IfUnmodifiedSince: optTime(req.IfUnmodifiedSince),
	})
	if err != nil {
		return Info{}, failed(err)
	}
	return Info{
		Attributes: Attributes{
			ContentType: aws.ToString(out.ContentType), CacheControl: aws.ToString(out.CacheControl),
			ContentDisposition: aws.ToString(out.ContentDisposition), ContentEncoding: contentEncoding(aws.ToString(out.ContentEncoding)),
			ContentLanguage: aws.ToString(out.ContentLanguage), Expires: aws.ToString(out.ExpiresString),
			StorageClass: string(out.StorageClass), SSE: string(out.ServerSideEncryption), SSEKeyID: aws.ToString(out.SSEKMSKeyId),
			Metadata: out.Metadata,
		},
		Size: aws.ToInt64(out.ContentLength), ETag: aws.ToString(out.ETag), LastModified: aws.ToTime(out.LastModified),
		VersionID: aws.ToString(out.VersionId), DeleteMarker: aws.ToBool(out.DeleteMarker),
		TagCount: aws.ToInt32(out.TagCount), Restore: aws.ToString(out.Restore), ArchiveState: string(out.ArchiveStatus),
		Range: aws.ToString(out.ContentRange),
	}, nil
}

func (u *awsUpstream) Put(ctx context.Context, req PutRequest, body io.Reader, size int64) (Stored, error) {
	a := req.Attributes
	out, err := u.client.PutObject(ofOwn(ctx, req.Key), &s3.PutObjectInput{
		Bucket: &u.bucket, Key: &req.Key, Body: body, ContentLength: &size,
		ContentType: opt(a.ContentType), CacheControl: opt(a.CacheControl), ContentDisposition: opt(a.ContentDisposition),
		ContentEncoding: opt(a.ContentEncoding), ContentLanguage: opt(a.ContentLanguage),
		StorageClass: types.StorageClass(a.StorageClass), ServerSideEncryption: types.ServerSideEncryption(a.SSE),
		SSEKMSKeyId: opt(a.SSEKeyID), ACL: types.ObjectCannedACL(a.ACL), Tagging: opt(a.Tagging), Metadata: a.Metadata,
		IfMatch: opt(req.IfMatch), IfNoneMatch: opt(req.IfNoneMatch), ChecksumAlgorithm: u.checksum,
	}, streaming(body), expiresAs(a.Expires))
	if err != nil {
		return Stored{}, failed(err)
	}
	return Stored{ETag: aws.ToString(out.ETag), VersionID: aws.ToString(out.VersionId), SSE: string(out.ServerSideEncryption), SSEKeyID: aws.ToString(out.SSEKMSKeyId)}, nil
}

func (u *awsUpstream) Copy(ctx context.Context, req CopyRequest) (Stored, error) {
	a := req.Attributes
	source := u.bucket + "/" + escape(req.Source.Key, true)
	if req.Source.VersionID != "" {
		source += "?versionId=" + url.QueryEscape(req.Source.VersionID)
	}
	in := &s3.CopyObjectInput{
		Bucket: &u.bucket, Key: &req.Key, CopySource: &source, CopySourceIfMatch: opt(req.SourceETag),
		MetadataDirective: types.MetadataDirectiveReplace, TaggingDirective: types.TaggingDirectiveReplace,
		ContentType: opt(a.ContentType), CacheControl: opt(a.CacheControl), ContentDisposition: opt(a.ContentDisposition),
		ContentEncoding: opt(a.ContentEncoding), ContentLanguage: opt(a.ContentLanguage),
		StorageClass: types.StorageClass(a.StorageClass), ServerSideEncryption: types.ServerSideEncryption(a.SSE),
		SSEKMSKeyId: opt(a.SSEKeyID), ACL: types.ObjectCannedACL(a.ACL), Tagging: opt(a.Tagging), Metadata: a.Metadata,
		IfMatch: opt(req.IfMatch), IfNoneMatch: opt(req.IfNoneMatch),
	}
	if req.KeepTags {
		in.TaggingDirective, in.Tagging = types.TaggingDirectiveCopy, nil
	}
	out, err := u.client.CopyObject(ctx, in, expiresAs(a.Expires))
	if err != nil {
		return Stored{}, failed(err)
	}
	s := Stored{VersionID: aws.ToString(out.VersionId), SSE: string(out.ServerSideEncryption), SSEKeyID: aws.ToString(out.SSEKMSKeyId)}
	if r := out.CopyObjectResult; r != nil {
		s.ETag, s.LastModified = aws.ToString(r.ETag), aws.ToTime(r.LastModified)
	}
	return s, nil
}

func (u *awsUpstream) Delete(ctx context.Context, ref Ref, ifMatch string) (Deleted, error) {
	out, err := u.client.DeleteObject(ofOwn(ctx, ref.Key), &s3.DeleteObjectInput{Bucket: &u.bucket, Key: &ref.Key, VersionId: opt(ref.VersionID), IfMatch: opt(ifMatch)})
	if err != nil {
		return Deleted{}, failed(err)
	}
	return Deleted{VersionID: aws.ToString(out.VersionId), DeleteMarker: aws.ToBool(out.DeleteMarker)}, nil
}

func (u *awsUpstream) DeleteMany(ctx context.Context, refs []Ref) ([]DeleteResult, error) {
	ids := make([]types.ObjectIdentifier, len(refs))
	for i, r := range refs {
		ids[i] = types.ObjectIdentifier{Key: aws.String(r.Key), VersionId: opt(r.VersionID)}
	}
	out, err := u.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: &u.bucket, Delete: &types.Delete{Objects: ids, Quiet: aws.Bool(false)}})
	if err != nil {
		return nil, failed(err)
	}
	var results []DeleteResult
	for _, d := range out.Deleted {
		results = append(results, DeleteResult{
			Ref:          Ref{Key: aws.ToString(d.Key), VersionID: aws.ToString(d.VersionId)},
			DeleteMarker: aws.ToBool(d.DeleteMarker), DeleteMarkerVersionID: aws.ToString(d.DeleteMarkerVersionId),
		})
	}
	for _, e := range out.Errors {
		results = append(results, DeleteResult{
			Ref:  Ref{Key: aws.ToString(e.Key), VersionID: aws.ToString(e.VersionId)},
			Code: aws.ToString(e.Code), Message: aws.ToString(e.Message),
		})
	}
	return results, nil
}

// Check implements Lists.
func (u *awsUpstream) Check(ctx context.Context) error {
	_, err := u.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &u.bucket})
	return failed(err)
}

// Versioning implements Lists.
func (u *awsUpstream) Versioning(ctx context.Context) (string, error) {
	out, err := u.client.GetBucketVersioning(ctx, &s3.GetBucketVersioningInput{Bucket: &u.bucket})
	if err != nil {
		return "", failed(err)
	}
	return string(out.Status), nil
}

func (u *awsUpstream) GetTags(ctx context.Context, ref Ref) ([]Tag, string, error) {
	out, err := u.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: &u.bucket, Key: &ref.Key, VersionId: opt(ref.VersionID)})
	if err != nil {
		return nil, "", failed(err)
	}
	tags := make([]Tag, len(out.TagSet))
	for i, t := range out.TagSet {
		tags[i] = Tag{Key: aws.ToString(t.Key), Value: aws.ToString(t.Value)}
	}
	return tags, aws.ToString(out.VersionId), nil
}

func (u *awsUpstream) PutTags(ctx context.Context, ref Ref, tags []Tag) (string, error) {
	set := make([]types.Tag, len(tags))
	for i, t := range tags {
		set[i] = types.Tag{Key: aws.String(t.Key), Value: aws.String(t.Value)}
	}
	out, err := u.client.PutObjectTagging(ctx, &s3.PutObjectTaggingInput{Bucket: &u.bucket, Key: &ref.Key, VersionId: opt(ref.VersionID), Tagging: &types.Tagging{TagSet: set}})
	if err != nil {
		return "", failed(err)
	}
	return aws.ToString(out.VersionId), nil
}

func (u *awsUpstream) DeleteTags(ctx context.Context, ref Ref) (string, error) {
	out, err := u.client.DeleteObjectTagging(ctx, &s3.DeleteObjectTaggingInput{Bucket: &u.bucket, Key: &ref.Key, VersionId: opt(ref.VersionID)})
	if err != nil {
		return "", failed(err)
	}
	return aws.ToString(out.VersionId), nil
}
