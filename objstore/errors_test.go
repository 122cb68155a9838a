package objstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// TestErrorTable holds every row, wrapped as callers wrap.
func TestErrorTable(t *testing.T) {
	for _, row := range errorRows() {
		got := errorOf(fmt.Errorf("somewhere: %w", row.cause))
		if got.Status != row.status || got.Code != row.code || got.Message == "" {
			t.Errorf("%v: %d %s", row.cause, got.Status, got.Code)
		}
	}
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{
		{errors.New("something new"), http.StatusInternalServerError, "InternalError"},
		{&UpstreamError{Cause: errors.New("connection refused")}, 503, "ServiceUnavailable"},
		{&UpstreamError{Status: 404, Code: "NoSuchKey"}, 404, "NoSuchKey"},
		{&UpstreamError{Status: 404, Code: "NotFound"}, 404, "NoSuchKey"},
		{&UpstreamError{Status: 404, Code: "NoSuchUpload"}, 404, "NoSuchUpload"},
		{&UpstreamError{Status: 403, Code: "AccessDenied"}, 403, "AccessDenied"},
		{&UpstreamError{Status: 403, Code: "ExpiredToken"}, 403, "AccessDenied"},
		{&UpstreamError{Status: 401}, 403, "AccessDenied"},
		{&UpstreamError{Status: 412, Code: "PreconditionFailed"}, 412, "PreconditionFailed"},
		{&UpstreamError{Status: 409, Code: "ConditionalRequestConflict"}, 409, "ConditionalRequestConflict"},
		{&UpstreamError{Status: 400, Code: "RequestTimeout"}, 503, "SlowDown"},
		{&UpstreamError{Status: 503, Code: "SlowDown"}, 503, "SlowDown"},
		{fmt.Errorf("%w: %w", seal.ErrTampered, seal.ErrNotSealed), 422, "SealBroken"},
		{loadError(fmt.Errorf("%w: x", keyguard.ErrMisconfigured)), 422, "SealBroken"},
	} {
		if got := errorOf(c.err); got.Status != c.status || got.Code != c.code {
			t.Errorf("%v: %d %s, want %d %s", c.err, got.Status, got.Code, c.status, c.code)
		}
	}
	for _, err := range []error{seal.ErrTampered, seal.ErrTruncated, seal.ErrWrongKey, errBroken} {
		if !errorIsTampering(fmt.Errorf("x: %w", err)) {
			t.Errorf("%v is no tampering", err)
		}
	}
	if errorIsTampering(errForeign) || errorIsTampering(context.Canceled) {
		t.Error("too much is tampering")
	}
}

func TestETags(t *testing.T) {
	for upstream, client := range map[string]string{
		`"d41d8cd98f00b204e9800998ecf8427e"`:   `"d41d8cd98f00b204e9800998ecf8427e-0"`,
		`"d41d8cd98f00b204e9800998ecf8427e-3"`: `"d41d8cd98f00b204e9800998ecf8427e-3"`,
	} {
		if got := clientETag(upstream); got != client {
			t.Errorf("%s becomes %s", upstream, got)
		}
		if got := upstreamETag(client); got != upstream {
			t.Errorf("%s goes back to %s", client, got)
		}
	}
	for client, upstream := range map[string]string{"*": "*", "": "", "abc-0": "abc", `"a-0", "b-2"`: `"a", "b-2"`} {
		if got := upstreamETag(client); got != upstream {
			t.Errorf("%q goes back to %q", client, got)
		}
	}
	for etag, parts := range map[string]int{`"ab"`: 1, `"ab-1"`: 1, `"ab-10000"`: 10000, `"ab-x"`: 1, `"ab-0"`: 1} {
		if got := partsOf(etag); got != parts {
			t.Errorf("%s has %d parts", etag, got)
		}
	}
}
