package objstore_test

import (
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"
)

// zeros is an endless body that costs nothing.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// live returns the bytes of the heap that are in use after a collection, and all
// bytes ever allocated.
func live() (inUse, ever uint64) {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc, m.TotalAlloc
}

// pausing measures the heap after half of a body went by.
type pausing struct {
	io.Reader
	left, at int64
	during   uint64
}

func (p *pausing) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if p.left -= int64(n); p.left <= p.at && p.during == 0 {
		p.during, _ = live()
	}
	return n, err
}

// TestMemory streams half a GiB in and out and looks at the heap in the midst of
// it: what one transfer holds must not depend on its length, nor may segments be
// allocated. The bound of 32 MiB holds for client, proxy and upstream together.
func TestMemory(t *testing.T) {
	const size, bound = 512 << 20, 32 << 20
	w := newWorld(t, worldOptions{})
	w.put("warm", pattern(1<<20, 1))
	w.mustGet("warm", "")

	w.up.Discard()
	before, ever := live()
	body := &pausing{Reader: io.LimitReader(zeros{}, size), left: size, at: size / 2}
	response, err := http.DefaultClient.Do(w.request("PUT", "/documents/large", body, size))
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatal(response, err)
	}
	response.Body.Close()
	_, after := live()
	t.Logf("put of %d MiB: %.1f MiB held in its midst, %.1f MiB allocated in all", size>>20, mib(body.during, before), mib(after, ever))
	if body.during > before+bound || after > ever+bound {
		t.Errorf("a put takes more memory than its bound")
	}
	if o := w.up.Object("acme-documents", "large"); o == nil || o.Size <= size {
		t.Fatal("the object did not arrive")
	}
}

// TestMemoryGet is the same for a download; the upstream holds the object, so it
// is smaller and only the difference counts.
func TestMemoryGet(t *testing.T) {
	const size, bound = 64 << 20, 32 << 20
	w := newWorld(t, worldOptions{})
	response, err := http.DefaultClient.Do(w.request("PUT", "/documents/large", io.LimitReader(zeros{}, size), size))
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatal(response, err)
	}
	response.Body.Close()
	before, ever := live()
	response, err = http.DefaultClient.Do(w.request("GET", "/documents/large", nil, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body := &pausing{Reader: response.Body, left: size, at: size / 2}
	if n, err := io.Copy(io.Discard, body); err != nil || n != size {
		t.Fatal(n, err)
	}
	_, after := live()
	t.Logf("get of %d MiB: %.1f MiB held in its midst, %.1f MiB allocated in all", size>>20, mib(body.during, before), mib(after, ever))
	if body.during > before+bound || after > ever+bound {
		t.Errorf("a get takes more memory than its bound")
	}
}

func mib(a, b uint64) float64 { return (float64(a) - float64(b)) / (1 << 20) }

// BenchmarkTransfer compares the way through the proxy with the way straight to
// the same upstream, one request at a time. Client, proxy and upstream share the
// processors, so that the proxied way does at least twice the work.
func BenchmarkTransfer(b *testing.B) {
	for _, size := range []int64{1 << 10, 1 << 20, 64 << 20} {
		for _, method := range []string{"PUT", "GET"} {
			for _, way := range []string{"straight", "proxied"} {
				b.Run(fmt.Sprintf("%s/%dKiB/%s", method, size>>10, way), func(b *testing.B) { transfer(b, method, way, size) })
			}
		}
	}
}

func transfer(b *testing.B, method, way string, size int64) {
	w := newWorld(b, worldOptions{})
	send := func(method string) {
		var body io.Reader
		if method == "PUT" {
			body = io.LimitReader(zeros{}, size)
		}
		r := w.request(method, "/documents/o", body, size)
		if way == "straight" {
			r.URL.Host, r.URL.Path = strings.TrimPrefix(w.up.URL(), "http://"), "/acme-documents/o"
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil || response.StatusCode != http.StatusOK {
			b.Fatal(response, err)
		}
		defer response.Body.Close()
		if n, err := io.Copy(io.Discard, response.Body); err != nil || method == "GET" && n != size {
			b.Fatal(n, err)
		}
	}
	if method == "PUT" {
		w.up.Discard()
	}
	send("PUT")
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		send(method)
	}
}
