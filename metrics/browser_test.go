package metrics

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
)

// browser is a headless Chromium with one page, driven over a pipe (the DevTools protocol).
type browser struct {
	t       *testing.T
	in      *os.File
	out     *bufio.Reader
	session string
	id      int
}

// browserPatience bounds every wait for the browser on a busy machine.
const browserPatience = time.Minute

func newBrowser(t *testing.T) *browser {
	t.Helper()
	program := ""
	for _, name := range []string{"chromium-headless-shell", "chromium"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "browser") {
			t.Fatal("BYOKD_REQUIRE names browser, but there is no Chromium")
		}
		t.Skip("no Chromium (Debian: chromium-headless-shell)")
	}
	theirIn, ourOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ourIn, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
		"--hide-scrollbars", "--remote-debugging-pipe", "--user-data-dir="+t.TempDir(), "about:blank")
	cmd.ExtraFiles = []*os.File{theirIn, theirOut} // descriptors 3 and 4
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirIn.Close()
	theirOut.Close()
	b := &browser{t: t, in: ourOut, out: bufio.NewReader(ourIn)}
	t.Cleanup(func() {
		ourOut.Close() // ends it
		ended := time.AfterFunc(browserPatience, func() { cmd.Process.Kill() })
		cmd.Wait()
		ended.Stop()
		ourIn.Close()
	})
	target := b.call("Target.createTarget", map[string]any{"url": "about:blank"})["targetId"]
	b.session = b.call("Target.attachToTarget", map[string]any{"targetId": target, "flatten": true})["sessionId"].(string)
	b.call("Page.enable", nil)
	return b
}

// call does one thing and returns its result.
func (b *browser) call(method string, params map[string]any) map[string]any {
	b.t.Helper()
	b.id++
	message := map[string]any{"id": b.id, "method": method, "params": params}
	if b.session != "" {
		message["sessionId"] = b.session
	}
	text, err := json.Marshal(message)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.in.Write(append(text, 0)); err != nil {
		b.t.Fatalf("Chromium has ended: %v", err)
	}
	for {
		text, err := b.out.ReadBytes(0)
		if err != nil {
			b.t.Fatalf("Chromium has ended: %v", err)
		}
		var answer struct {
			ID     int
			Error  *struct{ Message string }
			Result map[string]any
		}
		if err := json.Unmarshal(bytes.TrimRight(text, "\x00"), &answer); err != nil {
			b.t.Fatal(err)
		}
		if answer.ID != b.id {
			continue // an event
		}
		if answer.Error != nil {
			b.t.Fatalf("%s: %s", method, answer.Error.Message)
		}
		return answer.Result
	}
}

// evaluate runs an expression in the page.
func (b *browser) evaluate(expression string) any {
	b.t.Helper()
	result := b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true})
	if fault := result["exceptionDetails"]; fault != nil {
		b.t.Fatalf("%s: %v", expression, fault)
	}
	return result["result"].(map[string]any)["value"]
}

// await waits until an expression is true in the page.
func (b *browser) await(expression string) {
	b.t.Helper()
	for deadline := time.Now().Add(browserPatience); ; time.Sleep(50 * time.Millisecond) {
		if b.evaluate(expression) == true {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("never true: %s\nthe page: %v: %v", expression, b.evaluate("document.title + ', ' + document.body.className"), b.evaluate("document.body.innerText"))
		}
	}
}

func (b *browser) open(url string) {
	b.t.Helper()
	b.call("Page.navigate", map[string]any{"url": url})
	b.await("document.readyState === 'complete' && location.href !== 'about:blank'")
}

// size makes the window that of a desk or a phone.
func (b *browser) size(width, height int, phone bool) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone})
}

func (b *browser) scheme(name string) {
	b.t.Helper()
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": name}}})
}

// picture writes a screenshot into docs, with -update.
func (b *browser) picture(name string) {
	b.t.Helper()
	if !*update {
		return
	}
	shot, err := base64.StdEncoding.DecodeString(b.call("Page.captureScreenshot", map[string]any{"format": "png"})["data"].(string))
	if err != nil {
		b.t.Fatal(err)
	}
	picture, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		b.t.Fatal(err)
	}
	var small bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&small, paletted(picture)); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile("../docs/pictures/"+name+".png", small.Bytes(), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// paletted keeps the 256 most frequent colours of a picture, which is all that a page of text needs.
func paletted(picture image.Image) *image.Paletted {
	counts := map[color.Color]int{}
	at := picture.Bounds()
	for y := at.Min.Y; y < at.Max.Y; y++ {
		for x := at.Min.X; x < at.Max.X; x++ {
			counts[picture.At(x, y)]++
		}
	}
	colours := slices.SortedFunc(maps.Keys(counts), func(a, b color.Color) int { return counts[b] - counts[a] })
	small := image.NewPaletted(at, colours[:min(256, len(colours))])
	draw.Draw(small, at, picture, at.Min, draw.Src)
	return small
}

// contrast is the least contrast between text and what is behind it, over all text of the page, with its text.
const contrast = `(() => {
  const rgb = (c) => (c.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  let least = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.nodeValue.trim()) || e.closest('noscript, svg, script')) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, e.outerHTML.slice(0, 120)];
  }
  return least;
})()`

// furnished is a system with everything that the panel can show.
func furnished(t *testing.T) *system {
	t.Helper()
	s := newSystem(t, "documents", "backups")
	s.panel.RunsAs("arn:aws:iam::444455556666:role/byokd-tenant")
	s.disk.Describe(Fact{"Format", "1: AES-256-GCM in blocks of 4 KiB, names AES-SIV"}, Fact{"Cache", "writeback"})
	for _, change := range []struct {
		gate keyguard.GateState
		key  keyguard.KeyState
		ago  time.Duration
	}{{keyguard.Starting, keyguard.Unknown, 5 * time.Hour}, {keyguard.Open, keyguard.Enabled, 4*time.Hour + 50*time.Minute},
		{keyguard.Frozen, keyguard.Disabled, 3 * time.Hour}, {keyguard.Open, keyguard.Enabled, 2 * time.Hour},
		{keyguard.Degraded, keyguard.Unreachable, time.Hour}, {keyguard.Open, keyguard.Enabled, 50 * time.Minute}} {
		s.guard.mu.Lock()
		status := s.guard.status
		status.Gate, status.Key, status.Since = change.gate, change.key, time.Now().Add(-change.ago)
		s.guard.mu.Unlock()
		s.panel.record(status)
	}
	s.disk.Serving()
	for _, bucket := range s.buckets {
		bucket.Describe(Fact{"Format", "AES-256-GCM in segments of 64 KiB"}, Fact{"User metadata", "sealed"})
		bucket.Serving()
	}
	return s
}

func (s *system) freeze() {
	s.guard.mu.Lock()
	s.guard.status.DeletionDate = time.Now().Add(7 * 24 * time.Hour)
	s.guard.status.LastSuccess, s.guard.status.LeaseUntil = time.Now().Add(-2*time.Second), time.Time{}
	s.guard.status.Waiting, s.guard.status.Erased, s.guard.status.RequestID = 42, true, "5f0c1f6c-5a41-4b7e-9a7e-0d1f4c6b8e21"
	s.guard.mu.Unlock()
	s.guard.set(keyguard.Frozen, keyguard.PendingDeletion, keyguard.ReasonPendingDeletion)
}

func (s *system) thaw() {
	s.guard.mu.Lock()
	s.guard.status.DeletionDate, s.guard.status.Waiting, s.guard.status.Erased, s.guard.status.RequestID = time.Time{}, 0, false, ""
	s.guard.status.LastSuccess, s.guard.status.LeaseUntil, s.guard.status.Bound = time.Now(), time.Now().Add(time.Minute), 2*time.Second
	s.guard.mu.Unlock()
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
}

// The panel follows the state, survives a daemon that is started anew, and can be read by everybody.
func TestPanelInABrowser(t *testing.T) {
	b := newBrowser(t)
	s := furnished(t)
	s.thaw()
	b.size(1024, 1460, false)
	b.scheme("light")
	b.open(s.server.URL + "/")
	b.await("document.getElementById('link').textContent === 'live'")
	b.await("document.querySelector('#summary h2').textContent === 'External encryption key is ready' && !document.title.includes('frozen')")

	s.fs.Done("write", 64<<20, 3*time.Millisecond, 0)
	s.objects.Done(objstore.Event{Op: "GetObject", Bucket: "documents", Status: 200, Out: 1 << 20, Took: 8 * time.Millisecond})
	b.await("/[1-9][0-9.]* MiB\\/s/.test(document.querySelector('tbody tr').innerText)")
	b.picture("panel-ready")

	// What is selected stays selected while the page goes on.
	b.evaluate("getSelection().selectAllChildren(document.querySelector('article code'))")
	s.freeze()
	b.await("document.title.startsWith('frozen') && document.querySelector('.command code').textContent.includes('cancel-key-deletion')")
	b.await("/in 6 d 23 h/.test(document.querySelector('article').innerText) && /Blocked operations\\s*42/.test(document.querySelector('article').innerText)")
	if selected := b.evaluate("String(getSelection())"); selected != "arn:aws:kms:eu-central-1:111122223333:key/primary" {
		t.Errorf("the selection is lost: %q", selected)
	}
	before := b.evaluate("document.querySelector('[data-ago]').textContent")
	b.await(fmt.Sprintf("document.querySelector('[data-ago]').textContent !== %q", before)) // it counts by itself
	for _, scheme := range []string{"light", "dark"} {
		b.scheme(scheme)
		if least := b.evaluate(contrast).([]any); least[0].(float64) < 4.5 {
			t.Errorf("%s: contrast %.2f : 1 of %v", scheme, least[0], least[1])
		}
	}
	b.evaluate("getSelection().empty()")
	b.picture("panel-frozen")
	b.size(390, 844, true)
	if wide := b.evaluate("document.documentElement.scrollWidth > innerWidth"); wide == true {
		t.Errorf("on a phone the page is wider than the screen: %v", b.evaluate("document.documentElement.scrollWidth"))
	}
	b.picture("panel-phone")
	s.thaw()
	b.await("document.querySelector('#summary h2').textContent === 'External encryption key is ready'")
	if n := b.evaluate("performance.getEntriesByType('resource').filter((e) => new URL(e.name).origin !== location.origin && !e.name.startsWith('data:')).length"); n != 0.0 {
		t.Errorf("the page asked others: %v", b.evaluate("performance.getEntriesByType('resource').map((e) => e.name)"))
	}
}

// TestPanelNoticesSilence: a connection that dies without an error is not called live, and is left for a new one.
func TestPanelNoticesSilence(t *testing.T) {
	b := newBrowser(t)
	s := furnished(t)
	var mute atomic.Bool
	quiet := http.NewServeMux()
	quiet.Handle("/", s.server.Config.Handler)
	quiet.HandleFunc("/v1/events", func(w http.ResponseWriter, r *http.Request) {
		if mute.Load() { // it begins, and says nothing
			w.Header().Set("Content-Type", "text/event-stream")
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return
		}
		s.server.Config.Handler.ServeHTTP(w, r)
	})
	server := httptest.NewServer(quiet)
	defer server.Close()
	// Ten times as impatient, so that the test need not be patient.
	b.call("Page.addScriptToEvaluateOnNewDocument", map[string]any{"source": "const wait = setTimeout; setTimeout = (f, ms) => wait(f, ms / 10);"})
	mute.Store(true)
	b.open(server.URL + "/")
	b.await("document.body.classList.contains('stale') && document.getElementById('link').textContent.includes('no answer')")
	mute.Store(false)
	b.await("document.getElementById('link').textContent === 'live' && !document.body.classList.contains('stale')")
	server.CloseClientConnections()
}

func TestPanelFindsARestartedDaemon(t *testing.T) {
	b := newBrowser(t)
	s := furnished(t)
	s.thaw()
	serve := func(address string) (string, func()) {
		t.Helper()
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		server := &http.Server{Handler: s.server.Config.Handler, BaseContext: func(net.Listener) context.Context { return ctx }}
		ended := make(chan struct{})
		go func() { defer close(ended); server.Serve(l) }()
		return l.Addr().String(), func() { cancel(); server.Close(); <-ended }
	}
	address, stop := serve("127.0.0.1:0")
	b.open("http://" + address + "/")
	b.await("document.getElementById('link').textContent === 'live'")
	stop()
	b.await("document.body.classList.contains('stale')")
	s.freeze()
	_, stop = serve(address)
	defer stop()
	b.await("document.getElementById('link').textContent === 'live' && document.title.startsWith('frozen')")
}

func TestPanelWithoutScriptInABrowser(t *testing.T) {
	b := newBrowser(t)
	s := furnished(t)
	s.freeze()
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": true})
	b.call("Page.navigate", map[string]any{"url": s.server.URL + "/"})
	for deadline := time.Now().Add(browserPatience); ; time.Sleep(50 * time.Millisecond) {
		text, _ := b.evaluate("document.body ? document.body.innerText : ''").(string)
		if strings.Contains(text, "External encryption key is not ready") && strings.Contains(text, "cancel-key-deletion") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the page says %q", text)
		}
	}
}
