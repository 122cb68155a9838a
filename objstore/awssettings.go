package objstore

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// Forward implements Settings. The SDK finds the endpoint, signs, and tries again
// as for any request; method, query and body of the one it was told about are
// replaced before the signature, and the answer is taken as it is.
func (u *awsUpstream) Forward(ctx context.Context, req ForwardRequest) (*Forwarded, error) {
	f := &forwarding{req: req}
	swap := func(o *s3.Options) { o.APIOptions = append(o.APIOptions, f.install) }
	var err error
	if req.Key == "" {
		_, err = u.client.GetBucketTagging(ctx, &s3.GetBucketTaggingInput{Bucket: &u.bucket}, swap)
	} else {
		_, err = u.client.GetObjectTagging(ctx, &s3.GetObjectTaggingInput{Bucket: &u.bucket, Key: &req.Key}, swap)
	}
	if err != nil {
		return nil, failed(err)
	}
	if f.answer.Status < 300 {
		return &f.answer, nil
	}
	return nil, f.refusal()
}

// forwarding is one Forward under way.
type forwarding struct {
	req    ForwardRequest
	answer Forwarded
}

// install puts a forwarding into the SDK's way of a request.
func (f *forwarding) install(stack *middleware.Stack) error {
	request := middleware.FinalizeMiddlewareFunc("byokd:forward", f.replaceRequest)
	if err := stack.Finalize.Insert(request, "ResolveEndpointV2", middleware.After); err != nil {
		return err
	}
	// It takes every answer that is no XML for a failure; policies are JSON.
	if _, err := stack.Deserialize.Remove("S3:ProcessResponseFor200Error"); err != nil {
		return err
	}
	_, err := stack.Deserialize.Swap("OperationDeserializer", middleware.DeserializeMiddlewareFunc("OperationDeserializer", f.takeAnswer))
	return err
}

func (f *forwarding) replaceRequest(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
	r, ok := in.Request.(*smithyhttp.Request)
	if !ok {
		return middleware.FinalizeOutput{}, middleware.Metadata{}, fmt.Errorf("objstore: the SDK made a %T", in.Request)
	}
	if len(f.req.Body) > 0 {
		var err error
		if r, err = r.SetStream(bytes.NewReader(f.req.Body)); err != nil {
			return middleware.FinalizeOutput{}, middleware.Metadata{}, err
		}
		r.ContentLength = int64(len(f.req.Body))
	}
	r.Method = f.req.Method
	query := r.URL.Query()
	query.Del("tagging")
	for name, values := range f.req.Query {
		query[name] = values
	}
	r.URL.RawQuery = query.Encode()
	for name, values := range f.req.Header {
		r.Header[name] = values
	}
	in.Request = r
	return next.HandleFinalize(ctx, in)
}

func (f *forwarding) takeAnswer(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (middleware.DeserializeOutput, middleware.Metadata, error) {
	out, meta, err := next.HandleDeserialize(ctx, in)
	r, ok := out.RawResponse.(*smithyhttp.Response)
	if err != nil || !ok {
		return out, meta, err
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxSettings+1))
	if err == nil && len(body) > maxSettings {
		err = fmt.Errorf("objstore: the upstream's document has more than %d bytes", maxSettings)
	}
	if err != nil {
		return out, meta, err
	}
	f.answer = Forwarded{Status: r.StatusCode, Header: r.Header, Body: body}
	if r.StatusCode >= 500 && r.StatusCode != http.StatusNotImplemented { // the SDK tries these again
		return out, meta, &smithy.GenericAPIError{Code: f.refusal().Code, Message: f.refusal().Message, Fault: smithy.FaultServer}
	}
	if f.req.Key == "" {
		out.Result = &s3.GetBucketTaggingOutput{}
	} else {
		out.Result = &s3.GetObjectTaggingOutput{}
	}
	return out, meta, nil
}

// refusal reads an error document.
func (f *forwarding) refusal() *UpstreamError {
	doc := struct{ Code, Message string }{}
	if xml.Unmarshal(f.answer.Body, &doc) != nil || doc.Code == "" {
		doc.Code = http.StatusText(f.answer.Status)
	}
	return &UpstreamError{Status: f.answer.Status, Code: doc.Code, Message: doc.Message, RequestID: f.answer.Header.Get("X-Amz-Request-Id")}
}
