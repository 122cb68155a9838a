package objstore_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/byokd/byokd/objstore/s3test"
)

// stallLimit is above what a busy machine makes of a byte's way over loopback.
const stallLimit = time.Second

// TestStalledUploads: a client that stops sending is answered after the limit, and so
// is one that sends a byte now and then; nothing is stored, the log says why.
func TestStalledUploads(t *testing.T) {
	w := newWorld(t, worldOptions{stall: stallLimit})
	for name, rest := range map[string]io.Reader{"silent": nil, "dripping": dripping{}} {
		body := newGated(make([]byte, 40*segment), 20*segment)
		var source io.Reader = body
		if rest != nil {
			source = io.MultiReader(bytes.NewReader(make([]byte, 20*segment)), rest)
		}
		response, err := http.DefaultClient.Do(w.request("PUT", "/documents/"+name, source, 40*segment))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		text, _ := io.ReadAll(response.Body)
		response.Body.Close()
		close(body.release)
		if response.StatusCode != http.StatusBadRequest || !strings.Contains(string(text), "<Code>RequestTimeout</Code>") {
			t.Errorf("%s: %s %s", name, response.Status, text)
		}
		if w.up.Object("acme-documents", name) != nil {
			t.Errorf("%s: the upload became an object", name)
		}
		entries := w.log.FilterMessage("a client stalled and was given up").FilterFieldKey("key").All()
		if len(entries) == 0 || entries[len(entries)-1].ContextMap()["key"] != name {
			t.Errorf("%s: the log does not tell: %v", name, w.log.All())
		}
	}
}

// dripping is an endless body of one byte now and then.
type dripping struct{}

func (dripping) Read(p []byte) (int, error) {
	time.Sleep(stallLimit / 20) // the pace of a client is what is tested
	p[0] = 0
	return 1, nil
}

// TestStalledDownload: a client that stops reading finds its connection closed, and
// nothing of the download is left in memory.
func TestStalledDownload(t *testing.T) {
	w := newWorld(t, worldOptions{stall: stallLimit})
	w.put("big", pattern(1024*segment, 1))
	response, err := http.DefaultClient.Do(w.request("GET", "/documents/big", nil, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	await(t, "that the log tells of the stalled client", func() bool { return w.log.FilterMessage("a client stalled and was given up").Len() == 1 })
	if n, err := io.Copy(io.Discard, response.Body); err == nil {
		t.Errorf("the download ended well, with %d bytes", n)
	}
	await(t, "that its batches are given back", func() bool { n, _ := w.proxy.OpenedBytes("documents"); return n == 0 })
}

// TestFrozenClientsDoNotStall: the time of a freeze does not count, neither for a
// client that waits for us nor for one that we waited for when the freeze began.
func TestFrozenClientsDoNotStall(t *testing.T) {
	w := newWorld(t, worldOptions{stall: stallLimit})
	want := pattern(256*segment, 1)
	w.put("big", want)
	stall := &s3test.Fault{Match: func(r *http.Request) bool { return r.Method == "GET" && strings.HasSuffix(r.URL.Path, "/big") }, Times: 1, StallAt: 8 * segment, Release: make(chan struct{})}
	w.up.Inject(stall)
	download, err := http.DefaultClient.Do(w.request("GET", "/documents/big", nil, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer download.Body.Close()
	body := newGated(pattern(40*segment, 2), 20*segment)
	answered := make(chan *http.Response, 1)
	go func() {
		response, err := http.DefaultClient.Do(w.request("PUT", "/documents/up", body, 40*segment))
		if err != nil {
			t.Error(err)
		}
		answered <- response
	}()
	<-body.reached
	w.freeze()
	close(stall.Release)
	<-time.After(3 * stallLimit) // what must not be counted
	close(body.release)
	w.thaw()
	if got, err := io.ReadAll(download.Body); err != nil || !bytes.Equal(got, want) {
		t.Errorf("download: %d bytes, %v", len(got), err)
	}
	response := <-answered
	if response == nil || response.StatusCode != http.StatusOK {
		t.Fatalf("upload: %v", response)
	}
	response.Body.Close()
	if n := w.log.FilterMessage("a client stalled and was given up").Len(); n != 0 {
		t.Errorf("%d clients were given up", n)
	}
}
