package main

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// program is what an image is made of.
type program struct {
	name, pkg, repository, title, description string
	// secret programs hold keys: an image of one that cannot erase them for certain is refused.
	secret bool
}

var programs = map[string]program{
	"byokd": {
		name: "byokd", pkg: "./cmd/byokd", repository: "ghcr.io/byokd/byokd", secret: true, title: "byokd",
		description: "Bring your own key: an encrypted disk and bucket that freeze when the key is taken away",
	},
	"devcloud": {
		name: "devcloud", pkg: "./cmd/devcloud", repository: "ghcr.io/byokd/devcloud", title: "devcloud",
		description: "A stand-in for AWS KMS, STS and S3 for trying byokd; not for data that matters",
	},
}

// platforms are those on which byokd can erase keys (GOEXPERIMENT=runtimesecret).
var platforms = []string{"amd64", "arm64"}

// tags are those of the Makefile. Without gRPC's trace pages, which call methods by name, the linker leaves out what nobody calls.
const tags = "grpcnotrace"

// binary is a program built for one platform.
type binary struct {
	arch    string
	content []byte
	info    *buildinfo.BuildInfo
}

// buildBinary builds a program from source without cgo and without paths of this machine, and reads back how it was built.
func buildBinary(ctx context.Context, p program, source, arch string, stderr io.Writer) (binary, error) {
	dir, err := os.MkdirTemp("", "byokd-image-")
	if err != nil {
		return binary{}, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, p.name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-tags="+tags, "-buildvcs="+stamping(ctx, source), "-o", file, p.pkg)
	cmd.Dir, cmd.Stderr = source, stderr
	// GOFLAGS and GOAMD64 of the caller would show in the digest; what is not set here is Go's default.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOEXPERIMENT=runtimesecret",
		"GOFLAGS=-mod=readonly", "GOAMD64=v1", "GOARM64=v8.0", "GOWORK=off", "GOFIPS140=off")
	if err := cmd.Run(); err != nil {
		return binary{}, fmt.Errorf("building %s for %s: %w", p.pkg, arch, err)
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return binary{}, err
	}
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return binary{}, err
	}
	b := binary{arch: arch, content: content, info: info}
	if p.secret && b.setting("GOEXPERIMENT") != "runtimesecret" {
		return binary{}, errors.New("built without GOEXPERIMENT=runtimesecret: its keys could not be erased for certain")
	}
	return b, nil
}

// stamping says whether Go can stamp the commit: it fails where git may not read the repository, as when root builds
// another user's clone.
func stamping(ctx context.Context, source string) string {
	if exec.CommandContext(ctx, "git", "-C", source, "rev-parse", "HEAD").Run() != nil {
		return "false"
	}
	return "auto"
}

// setting is one of the build's settings (go version -m), empty when it was not recorded.
func (b binary) setting(key string) string {
	for _, s := range b.info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

// committed is the time of the commit, or the epoch in a build that knows none.
func (b binary) committed() time.Time {
	at, err := time.Parse(time.RFC3339, b.setting("vcs.time"))
	if err != nil {
		return time.Unix(0, 0).UTC()
	}
	return at.UTC()
}
