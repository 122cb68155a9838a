package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/pem"
	"fmt"
	"io"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// nonroot is the user that images run as, by number, so that Kubernetes can tell that it is not root. Distroless
// images use the same.
const nonroot = 65532

// entry is a file, or a directory when mode says so.
type entry struct {
	path    string
	mode    int64
	owner   int
	content []byte
}

const directory = 0o40000 // as in st_mode

// foundation is everything but the program: accounts, certificates, and the directories that are mounted over or
// written to.
func foundation() []entry {
	return []entry{
		{path: "etc/", mode: directory | 0o755},
		{path: "etc/passwd", mode: 0o644, content: fmt.Appendf(nil, "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:%d:%d:nonroot:/:/sbin/nologin\n", nonroot, nonroot)},
		{path: "etc/group", mode: 0o644, content: fmt.Appendf(nil, "root:x:0:\nnonroot:x:%d:\n", nonroot)},
		{path: "etc/ssl/", mode: directory | 0o755},
		{path: "etc/ssl/certs/", mode: directory | 0o755},
		{path: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, content: authorities()},
		{path: "run/", mode: directory | 0o755},
		{path: "run/byokd/", mode: directory | 0o700, owner: nonroot},
		{path: "tmp/", mode: directory | 0o1777},
		{path: "usr/", mode: directory | 0o755},
		{path: "usr/bin/", mode: directory | 0o755},
	}
}

// authorities are the roots that Mozilla trusts without reservation, as PEM. Those trusted for older certificates only
// are left out: a file cannot express that.
func authorities() []byte {
	var all bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			pem.Encode(&all, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // a buffer does not fail
		}
	}
	return all.Bytes()
}

// layer packs entries, in their order, all with the same time.
func layer(entries []entry, at time.Time) (v1.Layer, error) {
	var packed bytes.Buffer
	w := tar.NewWriter(&packed)
	for _, e := range entries {
		header := &tar.Header{Name: e.path, Mode: e.mode & 0o7777, Uid: e.owner, Gid: e.owner, Size: int64(len(e.content)),
			ModTime: at, Typeflag: tar.TypeReg, Format: tar.FormatPAX}
		if e.mode&directory != 0 {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, fmt.Errorf("%s: %w", e.path, err)
		}
		if _, err := w.Write(e.content); err != nil {
			return nil, fmt.Errorf("%s: %w", e.path, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed.Bytes())), nil }
	return tarball.LayerFromOpener(open, tarball.WithCompressionLevel(gzip.BestCompression),
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
}
