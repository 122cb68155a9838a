package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// check runs `byokd check` and returns its report, of JSON, and all it said.
func (s *bucketSite) check(t *testing.T, code int, args ...string) (report bucketCheckReport, said string) {
	t.Helper()
	var out, messages strings.Builder
	if got := run(t.Context(), append([]string{"check"}, args...), nil, &out, &messages); got != code {
		t.Errorf("byokd check %v ends with %d, want %d\n%s%s", args, got, code, &out, &messages)
	}
	if strings.HasPrefix(out.String(), "{") {
		if err := json.Unmarshal([]byte(out.String()), &report); err != nil {
			t.Fatal(err)
		}
	}
	return report, out.String() + messages.String()
}

// TestCheckBucket: every object is read, each damage is told with key, place, reason and next step, and
// nothing is written.
func TestCheckBucket(t *testing.T) {
	s := newBucketSite(t)
	large := bytes.Repeat([]byte("0123456789abcdef"), 3*seal.SegmentSize/16)
	s.fill(t, map[string][]byte{"dir/large": large, "dir/small": []byte("small"), "empty": nil, "key": []byte("key")})
	byConfig := []string{"s3://documents", "--config", s.config}
	writes := func() int {
		return s.up.Calls(http.MethodPut) + s.up.Calls(http.MethodPost) + s.up.Calls(http.MethodDelete)
	}
	before := writes()

	report, _ := s.check(t, exitOK, append(byConfig, "-o", "json")...)
	if !report.Sound || !report.Complete || report.Objects != 4 || report.Bytes != int64(len(large))+8 || report.Faults == nil {
		t.Errorf("%+v", report)
	}
	if _, said := s.check(t, exitOK, "s3://sealed-documents/dir/", "--key", s.arn, "--kms-endpoint", s.endpoint, "--endpoint", s.up.URL()); !strings.Contains(said, "2 objects") || !strings.Contains(said, "s3://sealed-documents/dir/ is sound") {
		t.Error(said)
	}
	if _, said := s.check(t, exitOK, "s3://documents/absent/", "--config", s.config); !strings.Contains(said, "nothing was looked at") || strings.Contains(said, "sound") {
		t.Error(said)
	}
	s.check(t, exitUsage, "s3://", "--config", s.config)
	s.check(t, exitConfig, "s3://unknown", "--config", s.config)

	change := func(key string, change func(*s3test.Stored)) {
		o := s.up.Object("sealed-documents", key)
		change(o)
		s.up.Replace("sealed-documents", key, o)
	}
	change("dir/large", func(o *s3test.Stored) { o.Data[len(o.Data)-1] ^= 1 })
	change("key", func(o *s3test.Stored) { o.Data[400] ^= 1 }) // in the header
	change("empty", func(o *s3test.Stored) { o.Data = []byte("written around byokd") })
	report, _ = s.check(t, exitDamaged, append(byConfig, "-o", "json")...)
	got := map[string]objectFault{}
	for _, f := range report.Faults {
		got[f.Key] = f
		if f.Detail == "" || f.Next == "" {
			t.Errorf("an incomplete fault: %+v", f)
		}
	}
	if f := got["dir/large"]; f.Reason != objstore.CheckDamaged || f.Part != 1 || f.Segment == nil || *f.Segment != 2 || f.Offset != 2*seal.SegmentSize {
		t.Errorf("%+v", f)
	}
	if f := got["empty"]; f.Reason != objstore.CheckNotSealed {
		t.Errorf("%+v", f)
	}
	if f := got["key"]; f.Reason != objstore.CheckDamaged || f.Segment != nil {
		t.Errorf("%+v", f)
	}
	if len(got) != 3 || report.Sound || !report.Complete || report.Objects != 4 || report.FaultCount != int64(len(got)) {
		t.Errorf("%+v", report)
	}
	if _, said := s.check(t, exitDamaged, byConfig...); !strings.Contains(said, `"dir/large": part 1, segment 2, plain offset 131072: damaged`) || !strings.Contains(said, "3 of 4 objects are not sound") {
		t.Error(said)
	}
	if n := writes() - before; n != 0 {
		t.Errorf("check has written %d times", n)
	}

	// A key of somebody else opens nothing, and it is said which one would.
	other, err := s.kms.CreateKey("", "", "", false)
	if err != nil {
		t.Fatal(err)
	}
	report, _ = s.check(t, exitDamaged, "s3://sealed-documents/dir/small", "--key", other, "--kms-endpoint", s.endpoint, "--endpoint", s.up.URL(), "-o", "json")
	if len(report.Faults) != 1 || report.Faults[0].Reason != objstore.CheckWrongKey || !strings.Contains(report.Faults[0].Detail, s.arn) {
		t.Errorf("with another key: %+v", report)
	}

	if err := s.kms.Disable(s.arn); err != nil {
		t.Fatal(err)
	}
	if _, said := s.check(t, exitFrozen, byConfig...); !strings.Contains(said, "enable-key") {
		t.Error(said)
	}
}
