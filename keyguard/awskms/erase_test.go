//go:build goexperiment.runtimesecret && linux

package awskms

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"golang.org/x/sys/unix"
)

// mask keeps what is searched for out of the searcher's own memory.
const mask = 0xA5

func masked(b []byte) []byte {
	out := make([]byte, len(b))
	for i := range b {
		out[i] = b[i] ^ mask
	}
	return out
}

// TestMain serves as KMS in a process of its own when asked to, since the
// server's copies of the key would be found as well.
func TestMain(m *testing.M) {
	if os.Getenv("BYOKD_TEST_KMS") != "" {
		serveKMS()
		return
	}
	os.Exit(m.Run())
}

// serveKMS makes a key, tells it masked, and gives it to everyone.
func serveKMS() {
	key := make([]byte, dataKeySize)
	rand.Read(key)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"KeyId":%q,"Plaintext":%q,"CiphertextBlob":"AQID"}`, testARN, base64.StdEncoding.EncodeToString(key))
	}))
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	fmt.Println(server.URL)
	fmt.Println(hex.EncodeToString(masked(key)))
	fmt.Println(hex.EncodeToString(masked([]byte(base64.StdEncoding.EncodeToString(key)))))
	fmt.Println(hex.EncodeToString(cert))
	io.Copy(io.Discard, os.Stdin) // until the parent ends
}

// copies counts how often any of the masked needles stands in our memory.
func copies(t *testing.T, needles ...[]byte) int {
	t.Helper()
	const window = 1 << 20
	buf, err := unix.Mmap(-1, 0, window, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(buf)
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	self := fmt.Sprintf("%p", &buf[0])
	total := 0
	for _, line := range strings.Split(string(maps), "\n") {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		var own uint64
		fmt.Sscanf(self, "0x%x", &own)
		for at := from; at < to; {
			if at < own+window && own < at+window { // our window is the only copy of what it shows
				at = max(at+4096, min(own+window, to))
				continue
			}
			n, _ := mem.ReadAt(buf[:min(window, to-at)], int64(at))
			if n == 0 {
				break
			}
			total += search(buf[:n], needles)
			if at+uint64(n) >= to {
				break
			}
			at += uint64(n) - 64 // a needle across the edge
		}
	}
	clear(buf)
	return total
}

func search(haystack []byte, needles [][]byte) int {
	found := 0
	for _, needle := range needles {
		first := needle[0] ^ mask
		for rest := haystack; ; {
			i := bytes.IndexByte(rest, first)
			if i < 0 || len(rest)-i < len(needle) {
				break
			}
			match := true
			for j := range needle {
				if rest[i+j]^mask != needle[j] {
					match = false
					break
				}
			}
			if match {
				found++
			}
			rest = rest[i+1:]
		}
	}
	return found
}

func TestPlaintextLeavesNoCopies(t *testing.T) {
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "BYOKD_TEST_KMS=1")
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer stdin.Close()
	lines := bufio.NewScanner(stdout)
	next := func() string {
		if !lines.Scan() {
			t.Fatal("the child is gone")
		}
		return lines.Text()
	}
	endpoint := next()
	var raw, encoded, cert []byte
	for _, p := range []*[]byte{&raw, &encoded, &cert} {
		if *p, err = hex.DecodeString(next()); err != nil {
			t.Fatal(err)
		}
	}

	cfg := configuration(t, "id", "secret")
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	cfg.HTTPClient = awshttp.NewBuildableClient().WithTransportOptions(func(tr *http.Transport) {
		tr.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	})
	c := newClient(t, cfg, testARN, endpoint)
	for range 20 {
		during := 0
		look := func([]byte) error {
			if during == 0 {
				during = copies(t, raw, encoded)
			}
			return nil
		}
		if _, err := c.Unwrap(context.Background(), []byte("w"), binding, look); err != nil {
			t.Fatal(err)
		}
		if during == 0 {
			t.Fatal("the search finds nothing even while the key is in use")
		}
		if _, _, err := c.GenerateDataKey(context.Background(), binding, func([]byte) error { return nil }); err != nil {
			t.Fatal(err)
		}
		if _, _, err := c.wrapPlain(context.Background(), c, []byte("w"), binding); err != nil { // a rewrap between regions
			t.Fatal(err)
		}
	}
	for range 3 {
		runtime.GC()
	}
	if n := copies(t, raw, encoded); n != 0 {
		t.Errorf("%d copies of the plaintext key are left", n)
	}
}
