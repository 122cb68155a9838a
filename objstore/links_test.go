package objstore_test

import (
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// link presigns a GET of a document, as the document store does for its users.
func (w *world) link(key, name string) string {
	w.t.Helper()
	signed, err := s3.NewPresignClient(w.client).PresignGetObject(w.t.Context(), &s3.GetObjectInput{Bucket: documents, Key: &key,
		ResponseContentDisposition: aws.String("inline; filename*=UTF-8''" + url.PathEscape(name))}, s3.WithPresignExpires(5*time.Minute))
	if err != nil {
		w.t.Fatal(err)
	}
	return signed.URL
}

// TestLinksOpenElsewhere opens presigned links with what knows nothing of S3: curl,
// also in ranges, and a browser.
func TestLinksOpenElsewhere(t *testing.T) {
	w := newWorld(t, worldOptions{})
	const page = "<!doctype html><title>Offer</title><p id=text>" + canary + "</p>"
	key := "store/Angebot für März 2026 (1).html"
	if _, err := w.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: documents, Key: &key, Body: strings.NewReader(page), ContentType: aws.String("text/html; charset=utf-8"), Metadata: map[string]string{"filename": "offer"}}); err != nil {
		t.Fatal(err)
	}
	link := w.link(key, "Angebot.html")
	t.Run("curl", func(t *testing.T) {
		needTool(t, "curl", "--version")
		dir := t.TempDir()
		if got := runTool(t, dir, dir, "curl", "--silent", "--show-error", "--fail", link); got != page {
			t.Errorf("curl got %q", got)
		}
		if got := runTool(t, dir, dir, "curl", "--silent", "--show-error", "--fail", "--range", "15-19", link); got != page[15:20] {
			t.Errorf("a range with curl: %q", got)
		}
		if got := runTool(t, dir, dir, "curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", link+"x"); got != "403" {
			t.Errorf("a changed link is answered %s", got)
		}
	})
	t.Run("browser", func(t *testing.T) {
		if os.Getenv("BYOKD_E2E") == "" {
			t.Skip("runs with make e2e")
		}
		browser := "chromium-headless-shell"
		needTool(t, browser, "--version")
		dir := t.TempDir()
		dom := runTool(t, dir, dir, browser, "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--user-data-dir="+dir+"/profile", "--dump-dom", link)
		if !strings.Contains(dom, canary) || !strings.Contains(dom, "<title>Offer</title>") {
			t.Errorf("the browser shows %q", dom)
		}
	})
}
