package objstore_test

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestRefusedUploadIsToldSo: a client that writes all of its upload before it
// looks for an answer gets the 503, and no reset connection.
func TestRefusedUploadIsToldSo(t *testing.T) {
	w := newWorld(t, worldOptions{hold: 50 * time.Millisecond})
	w.put("o", []byte("x"))
	body := pattern(12<<20, 1) // more than the sockets between take
	w.freeze()
	for i := range 3 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(w.server.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := w.request("PUT", "/documents/large", bytes.NewReader(body), int64(len(body))).Write(conn); err != nil {
			t.Fatalf("upload %d: %v", i, err)
		}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("upload %d: %v", i, err)
		}
		text, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(text), "SlowDown") {
			t.Fatalf("upload %d: %d %s, %v", i, response.StatusCode, text, err)
		}
	}
}
