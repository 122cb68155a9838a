//go:build linux

package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"

	"github.com/byokd/byokd/metrics"
)

// hostileConnections are opened at each listener: more than either keeps.
const hostileConnections = 5000

// resident returns the resident memory and the open descriptors of byokd.
func (s *stack) resident() (memory int64, descriptors int) {
	s.t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.workerPid()))
	if err != nil {
		s.t.Fatal(err)
	}
	return s.memory("VmRSS:"), len(open)
}

// memory returns a field of the /proc/PID/status of the byokd that serves, in bytes.
func (s *stack) memory(field string) int64 {
	s.t.Helper()
	return residentOf(s.t, s.workerPid(), field)
}

func residentOf(t *testing.T, pid int, field string) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), field)
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// flood opens connections that send the same and no more. They are all open at once
// from the client's side, until the test ends.
func (s *stack) flood(endpoint string, count int, text string) {
	s.t.Helper()
	for range count {
		conn, err := net.Dial("tcp", strings.TrimPrefix(endpoint, "http://"))
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { conn.Close() })
		// The listener may have closed it already for another one.
		_, _ = io.WriteString(conn, text)
	}
}

// assertServes checks that honest clients of either listener and of the mount are answered.
func (s *stack) assertServes(when string) {
	s.t.Helper()
	s.assertObjects(when)
	for _, path := range []string{"/livez", "/readyz", "/metrics", "/v1/status"} {
		if code, _ := s.get(path); code != http.StatusOK {
			s.t.Errorf("%s: %s answers %d", when, path, code)
		}
	}
	if err := os.WriteFile(s.mount+"/honest", []byte(when), 0o600); err != nil {
		s.t.Errorf("%s: %v", when, err)
	}
}

// assertObjects puts an object and gets it.
func (s *stack) assertObjects(when string) {
	s.t.Helper()
	honest := s.newClient("honest")
	o := object{1 << 50, 100_000}
	if err := honest.put(s.t.Context(), "honest", o); err != nil {
		s.t.Errorf("%s: %v", when, err)
	}
	if err := honest.get(s.t.Context(), "honest", o, 0, o.size); err != nil {
		s.t.Errorf("%s: %v", when, err)
	}
}

// TestHostileClients: whoever opens thousands of connections, sends requests byte by
// byte or never to the end, or bodies and headers without one, takes neither memory
// nor descriptors from the others, who are answered all the while.
func TestHostileClients(t *testing.T) {
	s := newStack(t, shipped)
	s.assertServes("at first")
	rss, descriptors := s.resident()
	const (
		memory = 160 << 20 // for some thousand connections and their goroutines
		files  = 4096 + 256 + 500
	)
	bounded := func(when string) {
		t.Helper()
		nowRSS, nowFiles := s.resident()
		t.Logf("%s: %d MiB and %d descriptors more", when, (nowRSS-rss)>>20, nowFiles-descriptors)
		if nowRSS-rss > memory || nowFiles-descriptors > files {
			t.Errorf("%s: it grew too much", when)
		}
	}
	for _, attack := range []struct{ name, text string }{
		{"silent connections", ""},
		{"headers without an end", "GET /documents/honest HTTP/1.1\r\nHost: localhost\r\nX-Slow: "},
		{"bodies without an end", "PUT /documents/honest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n\r\nbeginning"},
	} {
		for name, endpoint := range map[string]string{"S3": s.s3, "admin": s.admin} {
			when := fmt.Sprintf("%d %s at the %s listener", hostileConnections/2, attack.name, name)
			s.flood(endpoint, hostileConnections/2, attack.text)
			s.assertServes(when)
			bounded(when)
		}
	}
	s.hugeRequests()
	bounded("after huge requests")
	s.assertServes("at last")
	s.stopDaemon()
}

// hugeRequests sends what is larger than any request has to be: each is refused
// before it was taken in.
func (s *stack) hugeRequests() {
	s.t.Helper()
	for name, endpoint := range map[string]string{"S3": s.s3, "admin": s.admin} {
		req, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, endpoint+"/", nil)
		if err != nil {
			s.t.Fatal(err)
		}
		req.Header.Set("X-Large", strings.Repeat("x", 1<<20))
		response, err := http.DefaultClient.Do(req)
		if err == nil { // it may also have closed the connection while we sent
			response.Body.Close()
			if response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				s.t.Errorf("%s: a header of 1 MiB: status %d", name, response.StatusCode)
			}
		}
	}
	// Signed, but endless: a document of 64 MiB.
	document := strings.Repeat("x", 64<<20)
	began := time.Now()
	_, err := s.s3Client().PutBucketPolicy(s.t.Context(), &s3.PutBucketPolicyInput{Bucket: aws.String(bucketName), Policy: &document})
	var api smithy.APIError
	if !errors.As(err, &api) || api.ErrorCode() != "MaxMessageLengthExceeded" {
		s.t.Errorf("a document of 64 MiB: %v", err)
	}
	s.t.Logf("a document of 64 MiB: refused after %v", time.Since(began))
	for _, path := range []string{"/v1/status", "/v1/events"} {
		response, err := http.Post(s.admin+path, "application/xml", strings.NewReader(document))
		if err == nil {
			response.Body.Close()
			if response.StatusCode != http.StatusMethodNotAllowed {
				s.t.Errorf("a large body at %s: status %d", path, response.StatusCode)
			}
		}
	}
	s.awaitState(metrics.StateReady)
}
