package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// release is an image for every platform, and what is known about each.
type release struct {
	program program
	index   v1.ImageIndex
	parts   []part
}

// part is the image for one platform.
type part struct {
	arch  string
	image v1.Image
	sbom  []byte
	// referrer is the SBOM as an artifact that refers to the image, as registries keep it.
	referrer v1.Image
}

// buildRelease builds a program for each platform and makes an image of it.
func buildRelease(ctx context.Context, p program, source string, stderr io.Writer) (*release, error) {
	r := &release{program: p, index: mutate.IndexMediaType(empty.Index, types.OCIImageIndex)}
	for _, arch := range platforms {
		b, err := buildBinary(ctx, p, source, arch, stderr)
		if err != nil {
			return nil, err
		}
		one, err := makePart(p, b)
		if err != nil {
			return nil, fmt.Errorf("image for %s: %w", arch, err)
		}
		r.parts = append(r.parts, one)
		r.index = mutate.AppendManifests(r.index, mutate.IndexAddendum{Add: one.image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		if arch == platforms[0] { // the same for all, but for platforms
			annotated, ok := mutate.Annotations(r.index, labels(p, b)).(v1.ImageIndex)
			if !ok {
				return nil, errors.New("an index with annotations is no index")
			}
			r.index = annotated
		}
	}
	return r, nil
}

// makePart puts one binary into an image, and writes its SBOM.
func makePart(p program, b binary) (part, error) {
	below, err := layer(foundation(), b.committed())
	if err != nil {
		return part{}, err
	}
	above, err := layer([]entry{{path: "usr/bin/" + p.name, mode: 0o755, content: b.content}}, b.committed())
	if err != nil {
		return part{}, err
	}
	made := v1.Time{Time: b.committed()}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.Append(image,
		mutate.Addendum{Layer: below, History: v1.History{Created: made, CreatedBy: "deploy/image: accounts, certificates"}},
		mutate.Addendum{Layer: above, History: v1.History{Created: made, CreatedBy: "deploy/image: go build " + p.pkg}})
	if err != nil {
		return part{}, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return part{}, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", b.arch, made
	config.Config = v1.Config{
		User: fmt.Sprintf("%d:%d", nonroot, nonroot), Entrypoint: []string{"/usr/bin/" + p.name}, WorkingDir: "/",
		Env: []string{"PATH=/usr/bin"}, Labels: labels(p, b),
	}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return part{}, err
	}
	text, err := sbom(p, b, rootsModule())
	if err != nil {
		return part{}, err
	}
	referrer, err := refer(image, text)
	return part{b.arch, image, text, referrer}, err
}

// labels are OCI's, the same for an image and its index.
func labels(p program, b binary) map[string]string {
	const project = "https://github.com/byokd/byokd"
	all := map[string]string{
		"org.opencontainers.image.title":         p.title,
		"org.opencontainers.image.description":   p.description,
		"org.opencontainers.image.url":           project,
		"org.opencontainers.image.source":        project,
		"org.opencontainers.image.documentation": project + "/blob/main/docs/KUBERNETES.md",
		"org.opencontainers.image.licenses":      "Apache-2.0",
		"org.opencontainers.image.created":       b.committed().Format("2006-01-02T15:04:05Z"),
		"org.opencontainers.image.version":       strings.Trim(b.info.Main.Version, "()"),
	}
	if revision := b.setting("vcs.revision"); revision != "" {
		all["org.opencontainers.image.revision"] = revision
	}
	return all
}

// rootsModule is the module that the certificates come from, in the version that this command was built with.
func rootsModule() *debug.Module {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return nil
	}
	i := slices.IndexFunc(info.Deps, func(m *debug.Module) bool { return m.Path == "golang.org/x/crypto/x509roots/fallback" })
	if i < 0 {
		return nil
	}
	return info.Deps[i]
}

// refer makes an artifact of an SBOM whose subject is the image.
func refer(image v1.Image, text []byte) (v1.Image, error) {
	subject, err := partial.Descriptor(image)
	if err != nil {
		return nil, err
	}
	artifact := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), sbomType)
	artifact, err = mutate.Append(artifact, mutate.Addendum{Layer: static.NewLayer(text, sbomType)})
	if err != nil {
		return nil, err
	}
	referring, ok := mutate.Subject(artifact, *subject).(v1.Image)
	if !ok {
		return nil, errors.New("an image with a subject is no image")
	}
	return referring, nil
}

// write puts the OCI layout, the archives, the SBOMs and their sums into dir.
func (r *release) write(dir, repository, tag string) error {
	named, err := name.NewTag(repository + ":" + tag)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	store := filepath.Join(dir, r.program.name)
	if err := os.RemoveAll(store); err != nil {
		return err
	}
	path, err := layout.Write(store, empty.Index)
	if err != nil {
		return err
	}
	if err := path.AppendIndex(r.index, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": named.Name()})); err != nil {
		return err
	}
	sums := map[string][]byte{}
	for _, p := range r.parts {
		if err := path.AppendImage(p.referrer); err != nil {
			return err
		}
		stem := fmt.Sprintf("%s-linux-%s", r.program.name, p.arch)
		archive := filepath.Join(dir, stem+".tar")
		if err := tarball.WriteToFile(archive, named, p.image); err != nil {
			return err
		}
		content, err := os.ReadFile(archive)
		if err != nil {
			return err
		}
		sums[stem+".tar"], sums[stem+".cdx.json"] = content, p.sbom
		if err := os.WriteFile(filepath.Join(dir, stem+".cdx.json"), p.sbom, 0o644); err != nil {
			return err
		}
	}
	var list strings.Builder
	for _, file := range slices.Sorted(maps.Keys(sums)) {
		fmt.Fprintf(&list, "%x  %s\n", sha256.Sum256(sums[file]), file)
	}
	return os.WriteFile(filepath.Join(dir, r.program.name+".SHA256SUMS"), []byte(list.String()), 0o644)
}

// push uploads the images, their index under the tag, and then what refers to them.
func (r *release) push(ctx context.Context, repository, tag string) error {
	named, err := name.NewTag(repository + ":" + tag)
	if err != nil {
		return err
	}
	options := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
	if err := remote.WriteIndex(named, r.index, options...); err != nil {
		return fmt.Errorf("pushing %s: %w", named, err)
	}
	for _, p := range r.parts {
		digest, err := p.referrer.Digest()
		if err != nil {
			return err
		}
		if err := remote.Write(named.Context().Digest(digest.String()), p.referrer, options...); err != nil {
			return fmt.Errorf("pushing the SBOM for %s: %w", p.arch, err)
		}
	}
	return nil
}
