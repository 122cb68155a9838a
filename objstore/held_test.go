package objstore_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore/s3test"
)

// stallGet has the upstream stop in the midst of the bytes of the next GetObject of a key.
func (w *world) stallGet(key string, at int64) *s3test.Fault {
	f := &s3test.Fault{Match: func(r *http.Request) bool { return r.Method == "GET" && strings.HasSuffix(r.URL.Path, "/"+key) }, Times: 1, StallAt: at, Release: make(chan struct{})}
	w.up.Inject(f)
	return f
}

// TestHeldAnswerIsBare takes the key away between the opening of an object's metadata and of its first bytes: the request
// that is then given up says nothing of the object.
func TestHeldAnswerIsBare(t *testing.T) {
	w := newWorld(t, worldOptions{hold: 500 * time.Millisecond})
	if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: aws.String("o"), Body: bytes.NewReader(pattern(2*segment, 1)),
		CacheControl: aws.String("max-age=31536000"), Metadata: map[string]string{"name": canary}}); err != nil {
		t.Fatal(err)
	}
	stall := w.stallGet("o", 2000) // the header of the object is there, its first segment is not
	answered := make(chan *http.Response, 1)
	go func() {
		response, err := http.DefaultClient.Do(w.request("GET", "/documents/o", nil, 0))
		if err != nil {
			t.Error(err)
		}
		answered <- response
	}()
	await(t, "the read of the object", func() bool { return w.up.Calls("GET") > 0 })
	w.freeze()
	close(stall.Release)
	response := <-answered
	if response == nil {
		return
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusServiceUnavailable {
		t.Fatalf("answered %s", response.Status)
	}
	for name, values := range response.Header {
		if strings.Contains(strings.Join(values, ""), canary) {
			t.Errorf("frozen, and yet %s: %s", name, values)
		}
	}
	if v := response.Header.Get("Cache-Control"); v != "" {
		t.Errorf("an error may be kept for %s", v)
	}
}

// TestSlowUpstreamIsNoFreeze has an upstream that does not give the bucket's keyring while the key is there: the answer does
// not blame the key, the log tells, and the observer learns that the upstream has failed.
func TestSlowUpstreamIsNoFreeze(t *testing.T) {
	w := newWorld(t, worldOptions{hold: 300 * time.Millisecond})
	w.proxy.Hurry(300 * time.Millisecond)
	stall := &s3test.Fault{Match: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/.byokd/keyring") }, StallAt: 1, Release: make(chan struct{})}
	w.up.Inject(stall)
	defer close(stall.Release)
	response, err := http.DefaultClient.Do(w.request("PUT", "/documents/o", strings.NewReader("x"), 1))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	if response.StatusCode != http.StatusServiceUnavailable || strings.Contains(string(text), "key is") {
		t.Errorf("%s: %s", response.Status, text)
	}
	e, _ := w.events.find("PutObject")
	if !e.UpstreamFailed {
		t.Errorf("the observer was told %+v", e)
	}
	if w.log.FilterMessage("request failed").Len() == 0 {
		t.Error("the log is silent")
	}
}

// TestNotHeldAtAll answers at once while frozen where HoldFor says so, and otherwise serves as ever: also what takes
// calls of KMS and of the upstream.
func TestNotHeldAtAll(t *testing.T) {
	w := newWorld(t, worldOptions{hold: -1})
	slow := &s3test.Fault{Match: func(r *http.Request) bool {
		return strings.HasSuffix(r.URL.Path, "/.byokd/keyring") && r.Method == "GET"
	}, Times: 1, StallAt: 1, Release: make(chan struct{})}
	w.up.Inject(slow)
	time.AfterFunc(100*time.Millisecond, func() { close(slow.Release) })
	w.put("o", []byte("x"))
	w.freeze()
	began := time.Now()
	response, err := http.DefaultClient.Do(w.request("GET", "/documents/o", nil, 0))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusServiceUnavailable || time.Since(began) > 10*time.Second {
		t.Errorf("%s after %v", response.Status, time.Since(began))
	}
	w.thaw()
	awaitGate(t, w.guard, keyguard.Status.Ready)
	w.mustGet("o", "")
}

// TestStopAnswersTheHeld stops the server while requests wait for a frozen key, at their start and on their way: they are
// told to come again, and hold up the stop no longer.
func TestStopAnswersTheHeld(t *testing.T) {
	for name, midway := range map[string]bool{"at the start": false, "on its way": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, worldOptions{hold: time.Hour})
			w.put("o", pattern(2*segment, 1))
			var stall *s3test.Fault
			if midway {
				stall = w.stallGet("o", 2000)
			} else {
				w.freeze()
			}
			answered := make(chan string, 1)
			go func() {
				response, err := http.DefaultClient.Do(w.request("GET", "/documents/o", nil, 0))
				if err != nil {
					answered <- err.Error()
					return
				}
				response.Body.Close()
				answered <- response.Status
			}()
			if midway {
				await(t, "the read of the object", func() bool { return w.up.Calls("GET") > 0 })
				w.freeze()
				close(stall.Release)
			} else {
				await(t, "the request to wait", func() bool { return w.events.holding() == 1 })
			}
			limit, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := w.server.Config.Shutdown(limit); err != nil {
				t.Error("the stop: ", err)
			}
			select {
			case got := <-answered:
				if got != "503 Service Unavailable" && got != "503 Slow Down" {
					t.Error("answered ", got)
				}
			case <-limit.Done():
				t.Error("not answered")
			}
		})
	}
}
