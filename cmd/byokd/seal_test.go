package main

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/byokd/byokd/objstore/s3test"
)

// seal runs the command and expects its exit code.
func (s *bucketSite) seal(t *testing.T, code int, args ...string) string {
	t.Helper()
	var out, messages strings.Builder
	if got := run(t.Context(), append([]string{"seal", "--config", s.config, "--bucket", "documents"}, args...), nil, &out, &messages); got != code {
		t.Errorf("byokd seal %v ends with %d, want %d\n%s", args, got, code, &messages)
	}
	return messages.String()
}

func TestSeal(t *testing.T) {
	s := newBucketSite(t)
	s.fill(t, map[string][]byte{"sealed": []byte("sealed")})
	bodies := map[string][]byte{"sealed": []byte("sealed")}
	for i := range 5 {
		key := fmt.Sprintf("old/%d", i)
		bodies[key] = bytes.Repeat([]byte{byte('a' + i)}, i*50000)
		s.up.Replace("sealed-documents", key, &s3test.Stored{Data: bodies[key], ETag: fmt.Sprintf(`"%032d"`, i), Header: http.Header{}})
	}
	if messages := s.seal(t, exitOK, "--dry-run"); !strings.Contains(messages, "6 objects seen, 1 sealed before, 5 plain (488.3 KiB), nothing written") {
		t.Errorf("dry run: %s", messages)
	}
	s.decrypt(t, exitDamaged, "s3://documents/old/3", "--config", s.config)
	if messages := s.seal(t, exitOK); !strings.Contains(messages, "5 sealed now") {
		t.Errorf("seal: %s", messages)
	}
	for key, want := range bodies {
		if got, _ := s.decrypt(t, exitOK, "s3://documents/"+key, "--config", s.config); got != string(want) {
			t.Errorf("%s: %d bytes of %d", key, len(got), len(want))
		}
	}
	if messages := s.seal(t, exitOK); !strings.Contains(messages, "6 sealed before, 0 plain") {
		t.Errorf("again: %s", messages)
	}
	o := s.up.Object("sealed-documents", "old/2")
	o.Data[9] ^= 1
	s.up.Replace("sealed-documents", "old/2", o)
	s.seal(t, exitDamaged)
	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	if messages := s.seal(t, exitFrozen); !strings.Contains(messages, "External encryption key is not ready") {
		t.Errorf("a disabled key: %s", messages)
	}
}
