//go:build linux

package test

import (
	"bufio"
	"bytes"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// soakVariable says how long TestSoak runs; without it a short form.
const (
	soakVariable = "BYOKD_SOAK_FOR"
	shortSoak    = 25 * time.Second

	longestPause = 3 * time.Second // between two freezes
)

// quantities are what must not grow, and what is not yet growth: collections and
// what a freeze met under way differ from one to the next.
var quantities = []struct {
	name  string
	unit  float64
	slack float64 // in units
	of    func(s *stack, page map[string]float64) float64
}{
	{"descriptors", 1, 4, func(_ *stack, page map[string]float64) float64 { return page["process_open_fds"] }},
	{"goroutines", 1, 8, func(_ *stack, page map[string]float64) float64 { return page["go_goroutines"] }},
	{"threads", 1, 8, func(s *stack, _ map[string]float64) float64 { return float64(len(s.threads())) }},
	{"heap, MiB", 1 << 20, 3, func(_ *stack, page map[string]float64) float64 { return page["go_memstats_heap_alloc_bytes"] }},
	{"resident, MiB", 1 << 20, 16, func(_ *stack, page map[string]float64) float64 { return page["process_resident_memory_bytes"] }},
	{"lower disk, MiB", 1 << 20, 4, func(s *stack, _ map[string]float64) float64 { return s.lowerBytes() }},
}

// threads are byokd's.
func (s *stack) threads() []os.DirEntry {
	threads, err := os.ReadDir("/proc/" + strconv.Itoa(s.workerPid()) + "/task")
	if err != nil {
		s.t.Error(err)
	}
	return threads
}

// lowerBytes is what the sealed files take.
func (s *stack) lowerBytes() (sum float64) {
	_ = filepath.WalkDir(s.lower, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it was removed meanwhile
		}
		if info, err := d.Info(); err == nil {
			sum += float64(info.Sys().(*syscall.Stat_t).Blocks) * 512
		}
		return nil
	})
	return sum
}

// scrape reads byokd's series that have no labels.
func (s *stack) scrape() map[string]float64 {
	s.t.Helper()
	code, body := s.get("/metrics")
	if code != http.StatusOK {
		s.t.Fatalf("/metrics answers %d", code)
	}
	page := map[string]float64{}
	for lines := bufio.NewScanner(bytes.NewReader(body)); lines.Scan(); {
		name, text, _ := strings.Cut(lines.Text(), " ")
		if value, err := strconv.ParseFloat(text, 64); err == nil {
			page[name] = value
		}
	}
	return page
}

// annoy opens connections of clients that mean ill or do nothing, the same number each
// time, and returns how they are given up.
func (s *stack) annoy() (leave func()) {
	var open []io.Closer
	for _, endpoint := range []string{s.s3, s.admin} {
		for i := range 30 {
			conn, err := net.Dial("tcp", strings.TrimPrefix(endpoint, "http://"))
			if err != nil {
				s.t.Error(err)
				break
			}
			text := []string{"", "GET /documents/stream HTTP/1.1\r\nHost: x\r\nX-Slow: ", "PUT /documents/o HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n", "\x16\x03\x01 no http at all\r\n\r\n"}[i%4]
			_, _ = io.WriteString(conn, text) // it may be refused at once
			open = append(open, conn)
		}
	}
	for range 4 { // and some who read the beginning of an object and no more
		reader := s.newClient("stalled")
		err := reader.tolerant(func() error {
			out, err := reader.s3.GetObject(s.t.Context(), &s3.GetObjectInput{Bucket: aws.String(bucketName), Key: aws.String("stream")})
			if err == nil {
				_, _ = io.ReadFull(out.Body, make([]byte, 1000)) // a freeze may break it
				open = append(open, out.Body)
			}
			return err
		})
		if err != nil {
			s.t.Error(err)
		}
	}
	return func() {
		for _, c := range open {
			c.Close()
		}
	}
}

// TestSoak runs mount and proxy flat out, beside clients that mean ill, through
// freeze after freeze: descriptors, goroutines, threads, memory and disk stay as
// they were after the first third of the time. They are looked at while frozen and
// erased, when the calls in hand wait and the collector has just run.
func TestSoak(t *testing.T) {
	length := shortSoak
	if text := os.Getenv(soakVariable); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil || length < shortSoak {
			t.Fatalf("%s=%s: say a duration from %v on", soakVariable, text, shortSoak)
		}
	}
	s := newStack(t, shipped)
	// The journal apart, which grows: all that is written here is written over.
	roles := append(readers(), "store", "overwrite", "bulk", "create", "rewrite")
	l := load{workers: s.workers(roles...), clients: s.clients()}
	const fewest = 9 // of which the last six are looked at
	seen := make([]trend, len(quantities))
	for began := time.Now(); time.Since(began) < length || len(seen[0]) < fewest; {
		leave := s.annoy()
		s.awaitProgress(l)
		s.key(kmstest.KeyCommand{Do: "disable"})
		s.awaitGate(keyguard.Frozen)
		s.awaitErased()
		page := s.scrape()
		for i, q := range quantities {
			seen[i] = append(seen[i], q.of(s, page)/q.unit)
		}
		s.key(kmstest.KeyCommand{Do: "enable"})
		s.awaitState(metrics.StateReady)
		leave()
		l.assertUnharmed(t, "after the thaw")
		// So long that freezes meet the load at every moment of its own cycle.
		s.awaitProgress(l)
		time.Sleep(time.Duration(rand.Int64N(int64(min(length/50, longestPause)))))
	}
	for i, q := range quantities {
		later := seen[i][len(seen[i])/3:]
		t.Logf("%s: %.0f at first, %.0f after a third, %.0f at last; gain %.1f, z %.1f in %d freezes", q.name, seen[i][0], later[0], later[len(later)-1], later.gain(), later.climbs(), len(later))
		if later.leaks(q.slack) {
			t.Errorf("%s: growing by %.1f: %.1f", q.name, later.gain(), later)
		}
	}
	s.retire(l.workers)
	s.retireClients(l.clients)
	s.once(task{Role: "verify", Claims: claims(l.workers)})
	s.verifyObjects(l.clients)
	s.stopDaemon()
	s.assertSealed()
}
