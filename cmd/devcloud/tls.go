package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/keyguard/kmstest"
)

// certificateLife is long for one that signs itself: nothing of what it protects is worth much.
const certificateLife = 365 * 24 * time.Hour

// certificateFile holds certificate and key, in the state directory.
func certificateFile(dir string) string { return filepath.Join(dir, "tls.pem") }

func (a *app) certificateCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "certificate --dir DIR",
		Short: "Print the certificate of --tls-listen, for those who have to trust it",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			if dir == "" {
				return usageError{errors.New("certificate needs --dir DIR, the state directory of devcloud serve")}
			}
			pair, err := tls.LoadX509KeyPair(certificateFile(dir), certificateFile(dir))
			if err != nil {
				return fmt.Errorf("there is no certificate yet (start devcloud serve with --tls-listen): %w", err)
			}
			return pem.Encode(a.stdout, &pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "state directory of devcloud serve (required)")
	return cmd
}

// certificate is the one of an earlier run where that has the same names and lasts, else a new one.
func certificate(dir string, names []string, now time.Time) (tls.Certificate, error) {
	file := certificateFile(dir)
	pair, err := tls.LoadX509KeyPair(file, file)
	if err == nil && slices.Equal(pair.Leaf.DNSNames, names) && now.Add(certificateLife/2).Before(pair.Leaf.NotAfter) {
		return pair, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return tls.Certificate{}, fmt.Errorf("%s: %w", file, err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), DNSNames: names, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certificateLife),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA: true, BasicConstraintsValid: true,
	}
	signed, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: signed}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return tls.Certificate{}, err
	}
	if err := durable.WriteFile(file, text, 0o600); err != nil {
		return tls.Certificate{}, err
	}
	return tls.LoadX509KeyPair(file, file)
}

// remote is what others than this machine may ask: AWS, and nothing that takes keys away or shows who asked for what.
func remote(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if kmstest.IsControl(r) || isPage(r) {
			http.Error(w, "the page and the control interface answer on loopback only", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}
