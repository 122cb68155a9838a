package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// here builds the source of this checkout, once for all tests.
var here = sync.OnceValues(func() (*release, error) {
	return buildRelease(context.Background(), programs["byokd"], "../..", os.Stderr)
})

// TestImage does with byokd's image what `make image` and the release do, and takes apart what then is at the registry.
func TestImage(t *testing.T) {
	out := t.TempDir()
	store := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true)))
	t.Cleanup(store.Close)
	repository := strings.TrimPrefix(store.URL, "http://") + "/byokd/byokd"
	built, err := here()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(built.write(out, repository, "v0.0.1"), built.push(t.Context(), repository, "v0.0.1")); err != nil {
		t.Fatal(err)
	}
	digest, err := built.index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	printed, errDigest := name.NewDigest(repository + "@" + digest.String())
	tag, errTag := name.NewTag(repository + ":v0.0.1")
	if err := errors.Join(errDigest, errTag); err != nil {
		t.Fatal(err)
	}
	if tagged, err := remote.Head(tag); err != nil || tagged.Digest != digest {
		t.Errorf("the tag names %v (%v), not %s", tagged, err, digest)
	}
	index, err := remote.Index(printed)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Errorf("the index is damaged: %v", err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range manifest.Manifests {
		found = append(found, m.Platform.String())
		image, err := index.Image(m.Digest)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(m.Platform.Architecture, func(t *testing.T) {
			root := t.TempDir()
			binary := extract(t, image, root)
			checkConfig(t, image)
			checkBinary(t, binary, m.Platform.Architecture)
			checkSBOM(t, printed.Context().Digest(m.Digest.String()), binary)
			checkArchive(t, filepath.Join(out, "byokd-linux-"+m.Platform.Architecture+".tar"), image)
			if m.Platform.Architecture == runtime.GOARCH {
				runs(t, root)
			}
		})
	}
	if !slices.Equal(found, []string{"linux/amd64", "linux/arm64"}) {
		t.Errorf("platforms: %v", found)
	}
	checkSums(t, out)
}

// extract unpacks an image as a container runtime would, and returns the program.
func extract(t *testing.T, image v1.Image, root string) []byte {
	t.Helper()
	flat := mutate.Extract(image)
	defer flat.Close()
	files := tar.NewReader(flat)
	var program []byte
	for {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			return program
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(root, h.Name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, h.FileInfo().Mode().Perm())
		} else {
			var content []byte
			if content, err = io.ReadAll(files); err == nil {
				err = os.MkdirAll(filepath.Dir(path), 0o755) // upper layers come first
			}
			if err == nil {
				err = os.WriteFile(path, content, h.FileInfo().Mode().Perm())
			}
			switch h.Name {
			case "usr/bin/byokd":
				program = content
			case "etc/ssl/certs/ca-certificates.crt":
				checkAuthorities(t, content)
			}
			if h.Mode&0o6022 != 0 || h.Uid != 0 {
				t.Errorf("%s: mode %o, owner %d: programs and settings belong to root and are written by nobody else", h.Name, h.Mode, h.Uid)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func checkAuthorities(t *testing.T, file []byte) {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(file) {
		t.Fatal("no certificate in the file of authorities")
	}
	if n := bytes.Count(file, []byte("BEGIN CERTIFICATE")); n < 100 {
		t.Errorf("%d authorities only", n)
	}
}

func checkConfig(t *testing.T, image v1.Image) {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Config.User != "65532:65532" {
		t.Errorf("user %q: Kubernetes' runAsNonRoot wants a number that is not 0", config.Config.User)
	}
	for _, label := range []string{"title", "description", "source", "licenses", "created", "version"} {
		if config.Config.Labels["org.opencontainers.image."+label] == "" {
			t.Errorf("no label %s", label)
		}
	}
	if !slices.Equal(config.Config.Entrypoint, []string{"/usr/bin/byokd"}) {
		t.Errorf("entry point %q", config.Config.Entrypoint)
	}
}

// checkBinary: static, for its platform, erasing keys, and free of this machine's paths.
func checkBinary(t *testing.T, binary []byte, arch string) {
	t.Helper()
	file, err := elf.NewFile(bytes.NewReader(binary))
	if err != nil {
		t.Fatal(err)
	}
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	if file.Machine != machines[arch] {
		t.Errorf("a program for %v", file.Machine)
	}
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("not static: it has a segment %v", p.Type)
		}
	}
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(fmt.Sprint(info.Settings), "GOEXPERIMENT runtimesecret") {
		t.Errorf("built without runtimesecret: %v", info.Settings)
	}
	if !strings.Contains(fmt.Sprint(info.Settings), "-tags "+tags) {
		t.Errorf("not built as the Makefile does: %v", info.Settings)
	}
	for _, m := range info.Deps {
		if strings.Contains(m.Path, "versitygw") {
			t.Error("parts of devcloud are linked into byokd")
		}
	}
	if root, err := filepath.Abs("../.."); err != nil || bytes.Contains(binary, []byte(root+"/cmd")) {
		t.Errorf("the program knows where it was built (%v)", err)
	}
}

// checkSBOM finds the SBOM at the registry by the image's digest and compares it with the program.
func checkSBOM(t *testing.T, image name.Digest, binary []byte) {
	t.Helper()
	index, err := remote.Referrers(image)
	if err != nil {
		t.Fatal(err)
	}
	referrers, err := index.IndexManifest()
	if err != nil || len(referrers.Manifests) != 1 {
		t.Fatalf("%v, %v: one SBOM should refer to the image", referrers, err)
	}
	artifact, err := remote.Image(image.Context().Digest(referrers.Manifests[0].Digest.String()))
	if err != nil {
		t.Fatal(err)
	}
	layers, err := artifact.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatal(layers, err)
	}
	text, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	var doc cdx.BOM
	if err := cdx.NewBOMDecoder(text, cdx.BOMFileFormatJSON).Decode(&doc); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(binary)
	if got := (*doc.Metadata.Component.Hashes)[0].Value; got != hex.EncodeToString(sum[:]) {
		t.Errorf("the SBOM is of another program: %s", got)
	}
	listed := map[string]string{}
	for _, c := range *doc.Components {
		listed[c.Name] = c.Version
	}
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range info.Deps {
		if listed[m.Path] != m.Version {
			t.Errorf("%s %s is linked in, the SBOM says %q", m.Path, m.Version, listed[m.Path])
		}
	}
	if len(info.Deps) < 10 || listed["std"] == "" || len(listed) > len(info.Deps)+2 {
		t.Errorf("%d modules linked in, %d listed: %v", len(info.Deps), len(listed), listed)
	}
}

// checkArchive: what is loaded from a file is what is pulled.
func checkArchive(t *testing.T, file string, image v1.Image) {
	t.Helper()
	archived, err := tarball.ImageFromPath(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, errA := archived.ConfigName()
	b, errB := image.ConfigName()
	if errA != nil || errB != nil || a != b {
		t.Errorf("archive has image id %v (%v), the registry %v (%v)", a, errA, b, errB)
	}
}

func checkSums(t *testing.T, dir string) {
	t.Helper()
	list, err := os.ReadFile(filepath.Join(dir, "byokd.SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(list)) {
		sum, file, _ := strings.Cut(strings.TrimSpace(line), "  ")
		content, err := os.ReadFile(filepath.Join(dir, file))
		if got := sha256.Sum256(content); err != nil || hex.EncodeToString(got[:]) != sum {
			t.Errorf("%s: %v, sum %x", file, err, got)
		}
		n++
	}
	if n != 2*len(platforms) {
		t.Errorf("sums of %d files", n)
	}
}

// runs starts the program with nothing around it but what the image has, as the user that it names.
func runs(t *testing.T, root string) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("BYOKD_REQUIRE") != "" {
			t.Fatal("BYOKD_REQUIRE is set, but this is not root")
		}
		t.Skip("running a program in a root of its own needs root")
	}
	// t.TempDir and its parents are for root alone.
	for dir := root; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "/usr/bin/byokd", "version")
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: nonroot, Gid: nonroot}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "key erasure: guaranteed") {
		t.Errorf("byokd version: %v\n%s", err, out)
	}
}

// TestReproducible builds the same source at two places and compares digests. With BYOKD_E2E, the second place has an
// empty build cache, so that the compiler, too, runs twice.
func TestReproducible(t *testing.T) {
	first, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(t.TempDir(), "elsewhere")
	copySource(t, first, second)
	commit := exec.CommandContext(t.Context(), "git", "-C", first, "rev-parse", "HEAD")
	_, gitErr := commit.Output()
	if gitErr != nil {
		t.Logf("git does not tell a commit here (%v): compared without", gitErr)
	}
	built, err := here()
	if err != nil {
		t.Fatal(err)
	}
	a := digests(t, built)
	if os.Getenv("BYOKD_E2E") != "" {
		t.Setenv("GOCACHE", filepath.Join(t.TempDir(), "cache"))
	}
	again, err := buildRelease(t.Context(), programs["byokd"], second, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	b := digests(t, again)
	if a != b {
		t.Errorf("at %s:\n%s\nat %s:\n%s", first, a, second, b)
	}
}

// copySource copies the files that git knows, with their state, and the repository, whose commit is stamped.
func copySource(t *testing.T, from, to string) {
	t.Helper()
	script := `set -e; mkdir -p "$2"; cd "$1"; tar --exclude=./.cache --exclude=./bin --exclude=./run -cf - . | tar -C "$2" -xf -`
	if out, err := exec.CommandContext(t.Context(), "bash", "-c", script, "copy", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copying the source: %v\n%s", err, out)
	}
}

// digests are those of the index and of each SBOM.
func digests(t *testing.T, built *release) string {
	t.Helper()
	all := []any{}
	index, err := built.index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	all = append(all, index)
	for _, p := range built.parts {
		digest, err := p.referrer.Digest()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, digest)
	}
	text, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestUnknownProgramIsRefused(t *testing.T) {
	err := run(t.Context(), []string{"-program", "keeper"}, io.Discard, io.Discard)
	if err == nil || !strings.Contains(err.Error(), `no program "keeper"`) {
		t.Errorf("%v", err)
	}
}
