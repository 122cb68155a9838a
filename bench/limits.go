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

// The limits parts show what stands behind a goal that is missed. They measure, on the
// disk and on one in memory, where an I/O costs least, byokd, a byokd that copies where
// it would seal, and the peers that goals are held against. What the second still lacks
// is not cryptography's, and no cipher could win it back; where go-fuse's loopback, which
// only passes on, misses the same goal, the price of FUSE is in the way.

// uncrypted is the peer that copies.
const uncrypted = "no crypto"

var limitsPeers = []string{"raw", subject, uncrypted, "loopback", "gocryptfs"}

func (o options) limitsSteps() int { return len(loadsOf(o)) * o.rounds * len(limitsPeers) }

// compareMemoryLimits is compareLimits on a disk in memory.
func compareMemoryLimits(ctx context.Context, o options, self string, stdout, stderr io.Writer) (s section, err error) {
	disk, done, err := memoryDisk(o.dir)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, done()) }()
	o.dir = disk
	return compareLimits(ctx, o, self, "limits, on ext4 in memory", stdout, stderr)
}

// compareLimits measures the limits and prints them.
func compareLimits(ctx context.Context, o options, self, title string, stdout, stderr io.Writer) (s section, err error) {
	o.peers = limitsPeers
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
	names := namesOf(peers)
	fmt.Fprintf(stdout, "\n%s\n\n", title)
	r.print(stdout, loadsOf(o), names)
	fmt.Fprintf(stdout, "\nGoals that are missed, %s: %q is byokd, copying where it would seal\n\n", title, uncrypted)
	r.printLimits(stdout, loadsOf(o), names)
	return r.section(title, loads, names), err
}

// compareS3Limits is compareLimits for the S3 proxy: what a byokd that copies lacks of
// the direct way is the price of a proxy.
func compareS3Limits(ctx context.Context, o options, self string, stdout, stderr io.Writer) (section, error) {
	return measureS3(ctx, o, self, "S3 limits", (*s3Peer).startCopying, stdout, stderr, func(r results, rows []load, names []string) {
		r.print(stdout, rows, names)
		fmt.Fprintln(stdout)
		r.printLimits(stdout, rows, names)
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

// printLimits writes a row for each goal that is missed: what byokd, byokd without
// cryptography and loopback make of it, and what is in the way.
func (r results) printLimits(w io.Writer, loads []load, peers []string) {
	compared := []string{subject, uncrypted, "loopback"}
	rows := heading(slices.Concat([]string{"load", "in parts of", "goal"}, compared, []string{"in the way"}))
	for _, l := range loads {
		for _, reference := range peers {
			goal := l.goals[reference]
			base, _ := r.rates.median(l.name, reference)
			ours, ok := r.rates.median(l.name, subject)
			if !ok || base == 0 || ours/base >= goal {
				continue
			}
			row := []string{l.name, reference, fmt.Sprintf("%.2f", goal)}
			for _, peer := range compared {
				text := "–"
				if rate, ok := r.rates.median(l.name, peer); ok {
					text = fmt.Sprintf("%.2f", rate/base)
				}
				row = append(row, text)
			}
			rows = append(rows, append(row, r.inTheWay(l.name, goal*base)))
		}
	}
	table(w, rows)
}

// inTheWay names what keeps byokd from a rate which it misses.
func (r results) inTheWay(load string, goal float64) string {
	bare, _ := r.rates.median(load, uncrypted)
	passing, known := r.rates.median(load, "loopback")
	switch {
	case r.rates.most(load, subject) >= goal:
		return "nothing: reached in one of the rounds"
	case bare >= goal:
		return "cryptography"
	case known && passing < goal:
		return "FUSE"
	case known:
		return "the format or its code"
	}
	return "not cryptography"
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
