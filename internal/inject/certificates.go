package inject

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"time"
)

// Life of the certificates. The steps of a renewal of the authority:
//
//  1. at authorityLife/2, a new authority is added to those that API servers trust; serving goes on as it was
//  2. settle later, when every API server and replica has it, the server's certificate is made anew, by it
//  3. the old authority is trusted until it ends, serverLife or more after its last signature
//
// With a year and 60 days there is always half a year left to notice that renewal fails.
const (
	authorityLife = 365 * 24 * time.Hour
	serverLife    = 60 * 24 * time.Hour
	backdate      = 10 * time.Minute // for clocks that are behind
	// settle is what a new authority waits before it signs: 10 s until every replica has read the Secret, seconds until every API
	// server has the webhook configuration, and a wide margin, since nothing is in a hurry.
	settle = 5 * time.Minute
)

// Keys of the Secret.
const (
	secretServer       = "tls.crt"
	secretServerKey    = "tls.key"
	secretAuthorities  = "ca.crt" // all that are trusted, the newest first
	secretAuthorityKey = "ca.key" // of the newest
)

// authority is a certificate authority of ours.
type authority struct {
	certificate *x509.Certificate
	key         crypto.Signer // nil for all but the newest
}

// certificates are the content of the Secret.
type certificates struct {
	authorities []authority // the newest first; never empty
	server      *tls.Certificate
}

// errNoCertificates says that the Secret is empty, as the chart makes it.
var errNoCertificates = errors.New("the Secret holds no certificates")

// parseCertificates reads the Secret.
func parseCertificates(data map[string][]byte) (*certificates, error) {
	if len(data[secretAuthorities]) == 0 && len(data[secretServer]) == 0 {
		return nil, errNoCertificates
	}
	c := &certificates{}
	for rest := data[secretAuthorities]; len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, fmt.Errorf("%s is not PEM", secretAuthorities)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", secretAuthorities, err)
		}
		c.authorities = append(c.authorities, authority{certificate: certificate})
	}
	if len(c.authorities) == 0 {
		return nil, fmt.Errorf("%s is empty", secretAuthorities)
	}
	pair, err := tls.X509KeyPair(data[secretServer], data[secretServerKey])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", secretServer, err)
	}
	c.server = &pair
	newest := &c.authorities[0]
	signing, err := tls.X509KeyPair(encodeCertificate(newest.certificate.Raw), data[secretAuthorityKey])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", secretAuthorityKey, err)
	}
	newest.key = signing.PrivateKey.(crypto.Signer)
	return c, nil
}

// secret is what parseCertificates reads.
func (c *certificates) secret() (map[string][]byte, error) {
	authorityKey, err := encodeKey(c.authorities[0].key)
	if err != nil {
		return nil, err
	}
	serverKey, err := encodeKey(c.server.PrivateKey)
	if err != nil {
		return nil, err
	}
	return map[string][]byte{secretServer: encodeCertificate(c.server.Certificate[0]), secretServerKey: serverKey,
		secretAuthorities: c.bundle(), secretAuthorityKey: authorityKey}, nil
}

// bundle is what the API servers have to trust.
func (c *certificates) bundle() []byte {
	var all []byte
	for _, a := range c.authorities {
		all = append(all, encodeCertificate(a.certificate.Raw)...)
	}
	return all
}

// ends returns the last moments of the server's certificate and of the newest authority.
func (c *certificates) ends() (server, authority time.Time) {
	return c.server.Leaf.NotAfter, c.authorities[0].certificate.NotAfter
}

// renewed returns c as it should be at now, and whether that differs. c is not changed; nil makes the first ones. names are
// the DNS names and addresses at which API servers reach us, trusted is the bundle that they are told to trust.
func (c *certificates) renewed(names []string, trusted []byte, now time.Time) (*certificates, bool, error) {
	if c == nil || !now.Before(c.authorities[0].certificate.NotAfter) {
		// The first ones, or nobody was there for a year: nothing is left to overlap with.
		a, err := newAuthority(now)
		if err != nil {
			return nil, false, err
		}
		server, err := a.sign(names, now)
		return &certificates{authorities: []authority{a}, server: server}, true, err
	}
	next := &certificates{authorities: slices.Clone(c.authorities), server: c.server}
	changed := false
	next.authorities = slices.DeleteFunc(next.authorities, func(a authority) bool {
		changed = changed || !now.Before(a.certificate.NotAfter)
		return !now.Before(a.certificate.NotAfter)
	})
	if newest := next.authorities[0].certificate; now.After(newest.NotBefore.Add(backdate + authorityLife/2)) {
		a, err := newAuthority(now)
		if err != nil {
			return nil, false, err
		}
		next.authorities = slices.Insert(next.authorities, 0, a)
		changed = true
	}
	if next.serverDue(names, trusted, now) {
		server, err := next.authorities[0].sign(names, now)
		if err != nil {
			return nil, false, err
		}
		next.server, changed = server, true
	}
	return next, changed, nil
}

// serverDue tells whether the server's certificate has to be made anew, and whether its signer has settled.
func (c *certificates) serverDue(names []string, trusted []byte, now time.Time) bool {
	leaf, newest := c.server.Leaf, c.authorities[0].certificate
	unknown := slices.ContainsFunc(names, func(name string) bool { return leaf.VerifyHostname(name) != nil })
	if unknown || !now.Before(leaf.NotAfter) {
		return true // it is of no use as it is
	}
	if now.Before(newest.NotBefore.Add(backdate+settle)) || !bytes.Contains(trusted, encodeCertificate(newest.Raw)) {
		return false
	}
	return leaf.CheckSignatureFrom(newest) != nil || now.After(leaf.NotBefore.Add(backdate+serverLife/2))
}

func newAuthority(now time.Time) (authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	serial, err := newSerial()
	if err != nil {
		return authority{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: fmt.Sprintf("byokd inject authority %x", serial.Bytes()[:4])},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return authority{}, err
	}
	certificate, err := x509.ParseCertificate(raw)
	return authority{certificate, key}, err
}

// sign makes a certificate for a server. It ends before its authority does.
func (a authority) sign(names []string, now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "byokd inject"},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(serverLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if template.NotAfter.After(a.certificate.NotAfter) {
		template.NotAfter = a.certificate.NotAfter
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(raw)
	return &tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key, Leaf: leaf}, err
}

// newSerial draws a positive number of 126 bits (RFC 5280 allows 20 octets).
func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	return serial.SetBit(serial, 126, 1), nil
}

func encodeCertificate(raw []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})
}

func encodeKey(key crypto.PrivateKey) ([]byte, error) {
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), nil
}
