package main

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"golang.org/x/sys/unix"
)

// TestHoldForNothing: with holdFor 0s a request is answered at once while frozen.
func TestHoldForNothing(t *testing.T) {
	s := newSite(t)
	s.withoutVolume(t, map[string]string{"holdFor: 5m": "holdFor: 0s"})
	p := s.start(t)
	p.awaitState(t, exitOK)
	must(t, s.kms.Disable(s.arn))
	p.awaitState(t, exitFrozen)
	ctx, cancel := context.WithTimeout(t.Context(), defaultHoldFor/2)
	defer cancel()
	_, err := p.s3Client().HeadObject(ctx, &s3.HeadObjectInput{Bucket: aws.String("documents"), Key: aws.String("o")}, func(o *s3.Options) { o.RetryMaxAttempts = 1 })
	var response *smithyhttp.ResponseError
	if !errors.As(err, &response) || response.HTTPStatusCode() != http.StatusServiceUnavailable {
		t.Errorf("answered with %v", err)
	}
	p.signal(t, unix.SIGTERM)
	p.awaitEnd(t, exitOK)
}
