//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// The limits part shows what stands behind a goal that is missed. It measures, on a
// disk in memory where an I/O costs least, byokd, a byokd that copies where it would
// seal, and go-fuse's loopback: what the second still lacks is not cryptography's,
// and no cipher could win it back.

// uncrypted is the peer that copies.
const uncrypted = "no crypto"

func (o options) limitsSteps() int { return len(loadsOf(o)) * o.rounds * 4 }

// compareLimits measures the limits and prints them.
func compareLimits(ctx context.Context, o options, self string, stdout, stderr io.Writer) (s section, err error) {
	disk, done, err := memoryDisk(o.dir)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, done()) }()
	o.peers, o.dir = []string{"raw", subject, uncrypted, "loopback"}, disk
	peers, err := startPeers(ctx, o, stderr)
	defer func() {
		for i := range slices.Backward(peers) {
			err = errors.Join(err, peers[i].stop())
		}
	}()
	if err != nil {
		return s, err
	}
	r := newResults()
	if err = measureAll(ctx, o, self, peers, r, stderr); err != nil && ctx.Err() == nil {
		return s, err
	}
	fmt.Fprintf(stdout, "\nLimits, on ext4 in memory: %q is byokd, copying where it would seal\n\n", uncrypted)
	r.printLimits(stdout, loadsOf(o), "raw", "loopback")
	return r.section("limits, on ext4 in memory", loads, namesOf(peers)), err
}

// compareS3Limits is compareLimits for the S3 proxy: what a byokd that copies lacks of
// the direct way is the price of a proxy.
func compareS3Limits(ctx context.Context, o options, self string, stdout, stderr io.Writer) (section, error) {
	return measureS3(ctx, o, self, "S3 limits", (*s3Peer).startCopying, stdout, stderr, func(r results, rows []load, _ []string) {
		r.printLimits(stdout, rows, s3Direct)
	})
}

// startCopying starts a byokd that copies, on a bucket of its own.
func (p *s3Peer) startCopying(ctx context.Context, o options, direct *s3Peer, arn string, _ io.Writer) error {
	const upstream = "acme-copied"
	program := filepath.Join(o.dir, "byokd-copying")
	if err := buildUncrypted(ctx, program, "./cmd/byokd"); err != nil {
		return err
	}
	client := s3.New(s3.Options{BaseEndpoint: &direct.endpoint, UsePathStyle: true, Region: kmstest.DefaultRegion, Credentials: credentials.NewStaticCredentialsProvider(direct.id, direct.secret, "")})
	if _, err := client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: aws.String(upstream)}); err != nil {
		return err
	}
	p.name, p.bucket = uncrypted, s3Bucket
	return p.startProxy(ctx, o, program, direct.endpoint, arn, upstream)
}

// printLimits writes byokd and byokd without cryptography in parts of the last of the
// other peers, and what is in the way of the goal.
func (r results) printLimits(w io.Writer, loads []load, others ...string) {
	reference := others[len(others)-1]
	header := append([]string{"load", "unit"}, others...)
	rows := heading(append(header, subject, uncrypted, subject+" ÷ "+reference, uncrypted+" ÷ "+reference, "goal", "in the way"))
	for _, l := range loads {
		base, ok := r.rates.median(l.name, reference)
		if !ok || base == 0 {
			continue
		}
		ours, _ := r.rates.median(l.name, subject)
		bare, _ := r.rates.median(l.name, uncrypted)
		goal, blame := l.goals[reference], "nothing"
		switch {
		case goal == 0:
			blame = "–"
		case ours/base >= goal:
		case bare/base >= goal:
			blame = "cryptography"
		default:
			blame = "not cryptography"
		}
		row := []string{l.name, l.unit}
		for _, p := range append(slices.Clone(others), subject, uncrypted) {
			row = append(row, r.rate(l.name, p))
		}
		rows = append(rows, append(row, fmt.Sprintf("%.2f", ours/base), fmt.Sprintf("%.2f", bare/base), fmt.Sprintf("%.2f", goal), blame))
	}
	table(w, rows)
}

// memoryDisk mounts an ext4 in memory below dir, and returns what takes it away.
func memoryDisk(dir string) (mount string, done func() error, err error) {
	const size = 3 << 30
	image, err := os.CreateTemp("/dev/shm", "byokd-bench-*.img")
	if err != nil {
		return "", nil, fmt.Errorf("a disk in memory: %w", err)
	}
	remove := func() error { return os.Remove(image.Name()) }
	err = errors.Join(image.Truncate(size), image.Close())
	mount = filepath.Join(dir, "memory")
	if err == nil {
		err = os.MkdirAll(mount, 0o755)
	}
	for _, command := range [][]string{{"mkfs.ext4", "-q", "-F", image.Name()}, {"mount", "-o", "loop", image.Name(), mount}} {
		if err != nil {
			break
		}
		if text, failed := exec.Command(command[0], command[1:]...).CombinedOutput(); failed != nil {
			err = fmt.Errorf("%s: %w: %s", strings.Join(command, " "), failed, text)
		}
	}
	if err != nil {
		return "", nil, errors.Join(err, remove())
	}
	return mount, func() error { return errors.Join(unix.Unmount(mount, unix.MNT_DETACH), remove()) }, nil
}

// startUncrypted builds a byokd that copies and starts it.
func startUncrypted(ctx context.Context, o options, p *peer) error {
	program := filepath.Join(o.dir, "byokd-copying")
	if err := buildUncrypted(ctx, program, "./cmd/byokd"); err != nil {
		return err
	}
	return p.startByokd(ctx, o, program)
}

// buildUncrypted builds a package with bench's cipher in the place of
// internal/seal's, and without the erasure that comes with it. No source of byokd
// has a way to leave its ciphers out: go build's overlay does it from outside.
func buildUncrypted(ctx context.Context, output, pkg string) error {
	text, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return fmt.Errorf("go list: %w (run it in byokd's sources)", err)
	}
	module := strings.TrimSpace(string(text))
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(module, "internal/seal/cipher.go"): filepath.Join(module, "bench/testdata/cipher_null.go"),
	}})
	if err != nil {
		return err
	}
	file := output + ".overlay.json"
	if err := os.WriteFile(file, overlay, 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-overlay", file, "-o", output, pkg)
	cmd.Dir, cmd.Env = module, append(os.Environ(), "CGO_ENABLED=0", "GOEXPERIMENT=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("a byokd that copies: %w\n%s", err, text)
	}
	return nil
}
