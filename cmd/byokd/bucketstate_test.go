package main

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"go.uber.org/zap"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
	"github.com/byokd/byokd/objstore"
	"github.com/byokd/byokd/objstore/s3test"
)

// A bucket whose upstream is not there is not called ready because its key is: the status says so with the command that
// shows it, exit code 21, and the metrics count it. It stays in service, as the key is well.
func TestStatusTellsOfTheUpstream(t *testing.T) {
	up := s3test.New("another-bucket")
	t.Cleanup(up.Close)
	s := newSite(t)
	s.withoutVolume(t, map[string]string{"http://127.0.0.1:9": up.URL()})
	p := s.start(t)
	p.awaitState(t, exitOK)
	_, endpoint := p.addresses()
	client := s3.New(s3.Options{BaseEndpoint: aws.String(endpoint), UsePathStyle: true, Region: "eu-central-1",
		Credentials: credentials.NewStaticCredentialsProvider("id", "secret", "")})
	if _, err := client.ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: aws.String("documents")}); err == nil {
		t.Fatal("a bucket that is not there was listed")
	}
	table := p.awaitState(t, exitImpaired)
	for _, want := range []string{"The bucket documents serves, but is not well\n", "There is no bucket sealed-documents",
		"\nNext step: Check name, region and permissions of the bucket", "aws --endpoint-url " + up.URL() + " s3api list-objects-v2 --bucket sealed-documents"} {
		if !strings.Contains(table, want) {
			t.Errorf("%q is missing in:\n%s", want, table)
		}
	}
	if code, body := p.probe(t, "/readyz"); code != http.StatusOK {
		t.Errorf("readyz %d: %s", code, body)
	}
	if _, body := p.probe(t, "/metrics"); !strings.Contains(body, `byokd_s3_upstream_failures_total{bucket="documents"} 1`) {
		t.Error("byokd_s3_upstream_failures_total does not count it")
	}
}

// openGuard is a guard whose key is well.
type openGuard struct{}

func (openGuard) Status() keyguard.Status {
	return keyguard.Status{Name: "primary", Gate: keyguard.Open, Key: keyguard.Enabled}
}
func (openGuard) Changed() <-chan struct{} { return nil }

// A bucket is not well for a minute after the last request that its upstream has failed, whatever comes in between.
func TestBucketStateLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		panel := metrics.NewPanel("v1", "acme", "guaranteed")
		b := &bucketState{resource: panel.AddResource("documents", metrics.KindBucket, "s3://documents", openGuard{}), log: zap.NewNop(),
			upstream: UpstreamConfig{Bucket: "sealed", Region: "eu-central-1"}}
		refused := objstore.Event{Op: objstore.OpPutObject, Bucket: "documents", Status: http.StatusForbidden, Code: "AccessDenied", UpstreamFailed: true}
		unreachable := objstore.Event{Op: objstore.OpGetObject, Bucket: "documents", Status: http.StatusServiceUnavailable, Code: "ServiceUnavailable", UpstreamFailed: true}
		expect := func(when string, state metrics.State, words string) {
			t.Helper()
			synctest.Wait()
			if r := panel.Report(); r.State != state || !strings.Contains(r.Cause, words) {
				t.Errorf("%s: %s, %q", when, r.State, r.Cause)
			}
		}
		b.upstreamFailed(refused)
		expect("before its key is there", metrics.StateWaiting, "")
		b.serving()
		expect("served", metrics.StateReady, "")
		b.upstreamFailed(refused)
		expect("refused", metrics.StateImpaired, "S3 refuses PutObject in the bucket sealed to byokd")
		b.upstreamFailed(unreachable)
		expect("at the same moment", metrics.StateImpaired, "S3 refuses PutObject")
		time.Sleep(causeLasts)
		b.upstreamFailed(unreachable)
		expect("then unreachable", metrics.StateImpaired, "cannot be reached")
		time.Sleep(upstreamFailureLasts - time.Second)
		expect("for a minute", metrics.StateImpaired, "cannot be reached")
		b.upstreamFailed(refused)
		time.Sleep(upstreamFailureLasts - time.Second)
		expect("for a minute after the last", metrics.StateImpaired, "S3 refuses PutObject")
		time.Sleep(2 * time.Second)
		expect("after that", metrics.StateReady, "")
		b.upstreamFailed(unreachable)
		expect("again", metrics.StateImpaired, "cannot be reached")
		time.Sleep(2 * upstreamFailureLasts) // no timer may be left in the bubble
	})
}
