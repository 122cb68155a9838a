package objstore

import (
	"context"
	"fmt"
	"io"
	"time"
)

// Upstream is one bucket of the S3 service below the proxy. Sizes and ETags here
// are those of sealed bytes. Methods are called concurrently; each ends early
// when its context does. Refusals of the service are returned as *UpstreamError.
// NewUpstream makes one from an AWS client.
type Upstream interface {
	Objects
	Uploads
	Lists
	Tags
	Settings
}

// Objects reads and writes whole objects.
type Objects interface {
	// Get opens an object or a range of it. The caller closes Object.Body.
	Get(ctx context.Context, req GetRequest) (*Object, error)
	Head(ctx context.Context, req GetRequest) (Info, error)
	// Put stores exactly size bytes of body. When body fails or ends early
	// nothing is stored. It is tried once, since body cannot be rewound.
	Put(ctx context.Context, req PutRequest, body io.Reader, size int64) (Stored, error)
	// Copy duplicates an object inside the bucket with new attributes.
	Copy(ctx context.Context, req CopyRequest) (Stored, error)
	Delete(ctx context.Context, ref Ref, ifMatch string) (Deleted, error)
	// DeleteMany deletes up to 1000 objects and returns one result for each.
	DeleteMany(ctx context.Context, refs []Ref) ([]DeleteResult, error)
}

// Uploads is the multipart half of the service.
type Uploads interface {
	CreateUpload(ctx context.Context, key string, a Attributes) (UploadID, error)
	// PutPart is tried once, like Put.
	PutPart(ctx context.Context, key string, id UploadID, number int32, body io.Reader, size int64) (etag string, err error)
	CompleteUpload(ctx context.Context, key string, id UploadID, parts []Part, c Conditions) (Stored, error)
	AbortUpload(ctx context.Context, key string, id UploadID) error
	ListParts(ctx context.Context, key string, id UploadID, after, limit int32) (PartPage, error)
	ListUploads(ctx context.Context, q ListQuery) (UploadPage, error)
}

// Lists enumerates objects.
type Lists interface {
	List(ctx context.Context, q ListQuery) (Page, error)
	// Versioning returns "", "Enabled" or "Suspended".
	Versioning(ctx context.Context) (string, error)
	// Check asks whether the bucket exists and may be used.
	Check(ctx context.Context) error
}

// Tags passes object tags through; they are clear upstream.
type Tags interface {
	GetTags(ctx context.Context, ref Ref) ([]Tag, string, error)
	PutTags(ctx context.Context, ref Ref, tags []Tag) (string, error)
	DeleteTags(ctx context.Context, ref Ref) (string, error)
}

// UploadID names a multipart upload; it is the upstream's own.
type UploadID string

// Ref names an object, or one version of it.
type Ref struct {
	Key       string
	VersionID string // empty: the current version
}

// Conditions are the preconditions of a request; zero values are absent. ETags
// are in upstream form, quoted or "*".
type Conditions struct {
	IfMatch           string
	IfNoneMatch       string
	IfModifiedSince   time.Time
	IfUnmodifiedSince time.Time
}

// Attributes travel with an object beside its bytes.
type Attributes struct {
	ContentType        string
	CacheControl       string
	ContentDisposition string
	ContentEncoding    string
	ContentLanguage    string
	Expires            string // as given; need be no date
	StorageClass       string
	SSE                string // x-amz-server-side-encryption of the upstream itself
	SSEKeyID           string
	ACL                string // canned ACL
	Tagging            string // URL encoded tag set
	Metadata           map[string]string
}

// GetRequest asks for an object or a range of its sealed bytes.
type GetRequest struct {
	Ref
	Conditions
	// From and To bound the sealed range: bytes From up to and without To. To 0
	// means up to the end; both 0 mean no Range at all.
	From, To int64
	// Part asks Head for a part of an object that was uploaded in parts; 0 means none.
	Part int
}

// ranged reports whether the request carries a Range header.
func (g GetRequest) ranged() bool { return g.From != 0 || g.To != 0 }

// Info is what the upstream says about an object.
type Info struct {
	Range string // of a part that was asked for: "bytes a-b/n"
	Attributes
	Size         int64 // of the whole sealed object, also for ranges
	ETag         string
	LastModified time.Time
	VersionID    string
	DeleteMarker bool
	TagCount     int32
	Restore      string
	ArchiveState string
}

// Object is an open read.
type Object struct {
	Info
	Body   io.ReadCloser
	Length int64 // bytes that Body yields
}

// PutRequest says where an object goes and under which conditions.
type PutRequest struct {
	Key string
	Attributes
	Conditions
}

// CopyRequest duplicates Source to Key with the given attributes, provided the
// source still has the ETag given in SourceETag.
type CopyRequest struct {
	Source     Ref
	SourceETag string
	Key        string
	Attributes
	Conditions
	KeepTags bool // copy the tags of the source instead of Attributes.Tagging
}

// Stored is the answer to a write.
type Stored struct {
	ETag         string
	VersionID    string
	LastModified time.Time // only after a copy
	SSE          string
	SSEKeyID     string
}

// Deleted is the answer to a delete.
type Deleted struct {
	VersionID    string
	DeleteMarker bool
}

// DeleteResult is one line of the answer to DeleteMany.
type DeleteResult struct {
	Ref
	DeleteMarker          bool
	DeleteMarkerVersionID string
	Code, Message         string // set when it failed
}

// Part is one uploaded part.
type Part struct {
	Number       int32
	ETag         string
	Size         int64 // sealed
	LastModified time.Time
}

// PartPage is one page of ListParts.
type PartPage struct {
	Parts        []Part
	Truncated    bool
	NextAfter    int32
	StorageClass string
}

// ListKind selects the listing operation; each pages with its own markers.
type ListKind uint8

// The listing operations.
const (
	ListV1 ListKind = iota
	ListV2
	ListVersions
	ListMultipart
)

// ListQuery asks for one page.
type ListQuery struct {
	Kind       ListKind
	Prefix     string
	Delimiter  string
	Marker     string // V1 marker, V2 start-after, versions and uploads key-marker
	SubMarker  string // V2 continuation-token, version-id-marker, upload-id-marker
	Limit      int32
	FetchOwner bool
}

// Entry is one listed object or version.
type Entry struct {
	Key          string
	Size         int64 // sealed
	ETag         string
	LastModified time.Time
	StorageClass string
	Owner        Owner
	VersionID    string
	Latest       bool
	DeleteMarker bool
	// Of a compressed object, whose plain length does not follow from Size; filled in
	// by the proxy.
	Compressed bool
	PlainSize  int64
}

// Owner is as the upstream names it.
type Owner struct{ ID, Name string }

// Page is one page of a listing.
type Page struct {
	Entries    []Entry
	Prefixes   []string
	Truncated  bool
	NextMarker string // V1, versions
	NextToken  string // V2 token, version id marker
}

// UploadEntry is one upload in progress.
type UploadEntry struct {
	Key          string
	ID           UploadID
	Initiated    time.Time
	StorageClass string
	Owner        Owner
}

// UploadPage is one page of ListUploads.
type UploadPage struct {
	Uploads      []UploadEntry
	Prefixes     []string
	Truncated    bool
	NextMarker   string
	NextIDMarker string
}

// Tag is one object tag.
type Tag struct{ Key, Value string }

// UpstreamError is a refusal by the service below, or the failure to reach it
// (Status 0).
type UpstreamError struct {
	Status    int
	Code      string
	Message   string
	RequestID string
	Cause     error
}

func (e *UpstreamError) Error() string {
	if e.Status == 0 {
		return fmt.Sprintf("upstream could not be reached: %v", e.Cause)
	}
	return fmt.Sprintf("upstream answered %d %s: %s (request %s)", e.Status, e.Code, e.Message, e.RequestID)
}

func (e *UpstreamError) Unwrap() error { return e.Cause }
