package objstore_test

import (
	"bufio"
	"bytes"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
)

// TestThousandHangingRequests holds 1000 requests while the key is away, half of
// them uploads whose bodies wait in the sockets, and looks at what that costs. After
// the thaw every read is answered, and every upload that was sent to its end.
func TestThousandHangingRequests(t *testing.T) {
	const count, bound = 1000, 48 << 10 // bytes of heap and stacks each, client and proxy together
	w := newWorld(t, worldOptions{})
	w.put("o", []byte("held"))
	address := strings.TrimPrefix(w.server.URL, "http://")
	body := pattern(64<<10, 1)
	w.freeze()
	before := inUse()
	conns := make([]net.Conn, count)
	for i := range conns {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns[i] = conn
		r := w.request("GET", "/documents/o", nil, 0)
		if i%2 == 1 {
			r = w.request("PUT", "/documents/same", bytes.NewReader(body), int64(len(body)))
		}
		if err := r.Write(conn); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "that all requests wait", func() bool { return w.events.holding() == count })
	each := (inUse() - before) / count
	t.Logf("%d requests hang at %d KiB each", count, each>>10)
	if each > bound {
		t.Errorf("a hanging request takes %d bytes", each)
	}
	w.thaw()
	for i, conn := range conns {
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatalf("request %d: %v %v", i, response, err)
		}
		response.Body.Close()
	}
	if got := w.mustGet("same", ""); !bytes.Equal(got, body) {
		t.Error("an upload that hung is wrong")
	}
}

// inUse is the memory of heap and stacks after a collection.
func inUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
