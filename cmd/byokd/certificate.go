package main

import (
	"crypto/tls"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
)

// certificateEvery bounds how often the files of a certificate are looked at: with a handshake, once a second.
const certificateEvery = time.Second

// certificate serves a certificate from two files and takes up new ones when the files change, as
// cert-manager and Kubernetes secrets make them. Safe for concurrent use.
type certificate struct {
	files TLSConfig
	log   *zap.Logger
	now   func() time.Time

	mu      sync.Mutex
	present *tls.Certificate // guarded by mu
	stamp   [2]time.Time     // guarded by mu; modification times of the files it came from
	looked  time.Time        // guarded by mu
}

// newCertificate reads the files once; they have to be right at the start.
func newCertificate(files TLSConfig, log *zap.Logger) (*certificate, error) {
	c := &certificate{files: files, log: log, now: time.Now}
	stamp, err := c.modified()
	if err == nil {
		err = c.load(stamp)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// config is what a server needs. S3 speaks HTTP/1.1 only, and so do we.
func (c *certificate) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current(), nil }}
}

// current returns the certificate in force. While the files do not fit together, as in the midst of their
// replacement, the one before stays.
func (c *certificate) current() *tls.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.now(); now.Sub(c.looked) >= certificateEvery {
		c.looked = now
		stamp, err := c.modified()
		if err == nil && stamp != c.stamp {
			if err = c.load(stamp); err == nil {
				c.log.Info("the TLS certificate was read again", zap.Time("notAfter", c.present.Leaf.NotAfter))
			}
		}
		if err != nil {
			c.log.Warn("the TLS certificate cannot be read; the one before stays in use", zap.Error(err))
		}
	}
	return c.present
}

// load reads the files; the caller holds mu, or nobody else knows c yet.
func (c *certificate) load(stamp [2]time.Time) error {
	pair, err := tls.LoadX509KeyPair(c.files.Certificate, c.files.Key)
	if err != nil {
		return err
	}
	c.present, c.stamp = &pair, stamp
	return nil
}

func (c *certificate) modified() (stamp [2]time.Time, err error) {
	for i, name := range []string{c.files.Certificate, c.files.Key} {
		info, err := os.Stat(name)
		if err != nil {
			return stamp, err
		}
		stamp[i] = info.ModTime()
	}
	return stamp, nil
}
