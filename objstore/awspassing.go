package objstore

import (
	"bytes"
	"context"
	"encoding/xml"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"

	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// passedThrough are the headers of one client request that go through unchanged, and
// those of the upstream's answer. Safe for concurrent use.
type passedThrough struct {
	op   string
	sent http.Header // fixed

	mu      sync.Mutex
	got     http.Header // guarded by mu
	details []Detail    // guarded by mu; of the last answer that was an error
}

// passedHeaders says which headers of a client go up with which operations of the
// upstream; "" stands for all. They concern rights and rules, not bytes.
var passedHeaders = map[string][]string{
	"": {"Origin", "X-Amz-Expected-Bucket-Owner", "X-Amz-Request-Payer"},
	"PutObject": {
		"X-Amz-Grant-Read", "X-Amz-Grant-Full-Control", "X-Amz-Grant-Read-Acp", "X-Amz-Grant-Write-Acp",
		"X-Amz-Object-Lock-Mode", "X-Amz-Object-Lock-Retain-Until-Date", "X-Amz-Object-Lock-Legal-Hold",
		"X-Amz-Website-Redirect-Location", "X-Amz-Server-Side-Encryption-Bucket-Key-Enabled",
	},
	"CopyObject": {"X-Amz-Source-Expected-Bucket-Owner"},

	"AbortMultipartUpload": {"X-Amz-If-Match-Initiated-Time"},
	"DeleteObject":         {"X-Amz-Bypass-Governance-Retention", "X-Amz-Mfa"},
	"DeleteObjects":        {"X-Amz-Bypass-Governance-Retention", "X-Amz-Mfa"},
}

// passedBack are the headers of an answer that are the client's as they are.
var passedBack = []string{
	"X-Amz-Object-Lock-Mode", "X-Amz-Object-Lock-Retain-Until-Date", "X-Amz-Object-Lock-Legal-Hold",
	"X-Amz-Website-Redirect-Location", "X-Amz-Expiration", "X-Amz-Replication-Status", "X-Amz-Request-Charged",
	"X-Amz-Abort-Date", "X-Amz-Abort-Rule-Id", "X-Amz-Server-Side-Encryption-Bucket-Key-Enabled",
}

// passedOnError are those of an answer that is an error, passedDetails the elements
// of its document that concern the request and not sealed bytes.
var (
	passedOnError = []string{"X-Amz-Delete-Marker", "X-Amz-Version-Id", "Allow"}
	passedDetails = []string{
		"AccessTier", "ArgumentName", "ArgumentValue", "Condition", "Header", "Method", "PartNumber", "ResourceType",
		"StorageClass", "TagKey", "TagValue", "UploadId", "VersionId",
	}
)

// maxErrorDocument bounds what is read of an error document for its details.
const maxErrorDocument = 16 << 10

// createsLike are the operations that take the headers of PutObject.
var createsLike = []string{"CopyObject", "CreateMultipartUpload"}

type passingKey struct{}

// withPassing gives the upstream's client the headers that op passes through.
func withPassing(ctx context.Context, op Op, h http.Header) (context.Context, *passedThrough) {
	p := &passedThrough{op: string(op), sent: http.Header{}, got: http.Header{}}
	for _, names := range passedHeaders {
		for _, name := range names {
			if values := h.Values(name); len(values) > 0 {
				p.sent[name] = values
			}
		}
	}
	return context.WithValue(ctx, passingKey{}, p), p
}

// passedOf is what withPassing gave a context, or nil.
func passedOf(ctx context.Context) *passedThrough {
	p, _ := ctx.Value(passingKey{}).(*passedThrough)
	return p
}

// general are the headers that go up with all operations. p may be nil.
func (p *passedThrough) general() http.Header {
	h := http.Header{}
	for _, name := range passedHeaders[""] {
		if p != nil && len(p.sent[name]) > 0 {
			h[name] = p.sent[name]
		}
	}
	return h
}

// ofSource are the headers for requests about the source of a copy.
func ofSource(ctx context.Context) context.Context {
	p := passedOf(ctx)
	if p == nil {
		return ctx
	}
	source := &passedThrough{sent: http.Header{}, got: http.Header{}}
	if owner := p.sent["X-Amz-Source-Expected-Bucket-Owner"]; len(owner) > 0 {
		source.sent["X-Amz-Expected-Bucket-Owner"] = owner
	}
	return context.WithValue(ctx, passingKey{}, source)
}

// ofOwn keeps the headers of a client from requests about byokd's own objects.
func ofOwn(ctx context.Context, key string) context.Context {
	if !hidden(key) {
		return ctx
	}
	return context.WithValue(ctx, passingKey{}, (*passedThrough)(nil))
}

// send adds the headers that one request to the upstream takes.
func (p *passedThrough) send(operation string, h http.Header) {
	names := slices.Concat(passedHeaders[""], passedHeaders[operation])
	if slices.Contains(createsLike, operation) {
		names = append(names, passedHeaders["PutObject"]...)
	}
	for _, name := range names {
		if values := p.sent[name]; len(values) > 0 {
			h[name] = values
		}
	}
}

// receive notes what one answer of the upstream says.
func (p *passedThrough) receive(operation string, h http.Header) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, values := range h {
		cors := strings.HasPrefix(name, "Access-Control-") || name == "Vary" && p.sent.Get("Origin") != ""
		if cors || operation == p.op && slices.Contains(passedBack, name) {
			p.got[name] = values
		}
	}
}

// receiveError notes the details of a refusal and puts its document back.
func (p *passedThrough) receiveError(operation string, r *smithyhttp.Response) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxErrorDocument))
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(body), r.Body), r.Body}
	var doc struct {
		Elements []xmlDetail `xml:",any"`
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.details = nil
	if err == nil && xml.Unmarshal(body, &doc) == nil {
		for _, e := range doc.Elements {
			if slices.Contains(passedDetails, e.XMLName.Local) {
				p.details = append(p.details, Detail{e.XMLName.Local, e.Value})
			}
		}
	}
	for _, name := range passedOnError {
		if values := r.Header.Values(name); operation == p.op && len(values) > 0 {
			p.got[name] = values
		}
	}
}

// errorDetails are the details of the last refusal.
func (p *passedThrough) errorDetails() []Detail {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.details
}

// answer adds what was received to the answer to the client.
func (p *passedThrough) answer(h http.Header) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, values := range p.got {
		if h.Get(name) == "" {
			h[name] = values
		}
	}
}

// passThrough makes the client send and receive the headers of withPassing.
func passThrough(stack *middleware.Stack) error {
	send := middleware.BuildMiddlewareFunc("byokd:send", func(ctx context.Context, in middleware.BuildInput, next middleware.BuildHandler) (middleware.BuildOutput, middleware.Metadata, error) {
		p := passedOf(ctx)
		if r, ok := in.Request.(*smithyhttp.Request); ok && p != nil {
			p.send(awsmiddleware.GetOperationName(ctx), r.Header)
		}
		return next.HandleBuild(ctx, in)
	})
	receive := middleware.DeserializeMiddlewareFunc("byokd:receive", func(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (middleware.DeserializeOutput, middleware.Metadata, error) {
		out, meta, err := next.HandleDeserialize(ctx, in)
		p := passedOf(ctx)
		if r, ok := out.RawResponse.(*smithyhttp.Response); ok && p != nil {
			operation := awsmiddleware.GetOperationName(ctx)
			p.receive(operation, r.Header)
			if r.StatusCode >= http.StatusBadRequest {
				p.receiveError(operation, r)
			}
		}
		return out, meta, err
	})
	if err := stack.Build.Add(send, middleware.After); err != nil {
		return err
	}
	return stack.Deserialize.Add(receive, middleware.After)
}
