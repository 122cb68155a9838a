package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// writeCertificate writes a self-signed certificate for 127.0.0.1 and its key into dir.
func writeCertificate(t *testing.T, dir string, serial int64, at time.Time) TLSConfig {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	files := TLSConfig{Certificate: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key")}
	for name, block := range map[string]*pem.Block{files.Certificate: {Type: "CERTIFICATE", Bytes: der}, files.Key: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// TestCertificateReload: a certificate that was replaced is served from the next handshake on; one that is
// broken, or half replaced, leaves the one before in force and says so.
func TestCertificateReload(t *testing.T) {
	dir := t.TempDir()
	files := writeCertificate(t, dir, 1, time.Unix(1000, 0))
	core, logs := observer.New(zap.InfoLevel)
	c, err := newCertificate(files, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	clock := time.Unix(2000, 0)
	c.now = func() time.Time { return clock }
	listener, err := tls.Listen("tcp", "127.0.0.1:0", c.config())
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.(*tls.Conn).Handshake()
			conn.Close()
		}
	}()
	serves := func(want int64) {
		t.Helper()
		clock = clock.Add(certificateEvery)
		conn, err := tls.Dial("tcp", listener.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); got != want {
			t.Errorf("serial %d, want %d", got, want)
		}
	}
	serves(1)
	writeCertificate(t, dir, 2, time.Unix(1001, 0))
	serves(2)
	if err := os.WriteFile(files.Certificate, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	serves(2)
	if logs.FilterMessageSnippet("the one before stays").Len() == 0 {
		t.Error("the broken certificate is not in the log")
	}
	writeCertificate(t, dir, 3, time.Unix(1002, 0))
	serves(3)
	if err := os.Remove(files.Key); err != nil {
		t.Fatal(err)
	}
	serves(3)
	if _, err := newCertificate(files, zap.NewNop()); err == nil || !strings.Contains(err.Error(), "tls.key") {
		t.Errorf("a missing key at the start: %v", err)
	}
}
