//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// The S3 section compares byokd with the way straight to the same upstream, which
// is devcloud on the same disk, and with rclone's crypt remote served over S3,
// where an rclone is installed that can (1.65 or newer). Client, proxy and upstream
// are processes of the same machine and share its processors.

const (
	s3Direct = "direct"
	s3Crypt  = "rclone crypt"
	s3Bucket = "acme-documents"
)

// s3Peer is an endpoint under test.
type s3Peer struct {
	peer
	endpoint, bucket, id, secret string
}

// s3Load is one thing to measure on an endpoint.
type s3Load struct {
	load
	run func(ctx context.Context, client *s3.Client, bucket string) (rate float64, err error)
}

const (
	s3Large   = 64 << 20
	s3Small   = 1 << 10
	s3Clients = 16
)

// s3Goals are parts of the direct way's rate where a core is free for byokd.
func s3Goals(direct float64) map[string]float64 { return map[string]float64{s3Direct: direct} }

// s3Loads in the order of the table. Those that get find what those before put.
var s3Loads = []s3Load{
	{load{name: "PUT 64 MiB, 1 client", unit: "MiB/s", goals: s3Goals(0.9)}, s3Transfer(1, s3Put(s3Large))},
	{load{name: "PUT 64 MiB, 4 clients", unit: "MiB/s", goals: s3Goals(0.9)}, s3Transfer(4, s3Put(s3Large))},
	{load{name: "GET 64 MiB, 1 client", unit: "MiB/s", goals: s3Goals(0.9)}, s3Transfer(1, s3Get(s3Large))},
	{load{name: "GET 64 MiB, 4 clients", unit: "MiB/s", goals: s3Goals(0.9)}, s3Transfer(4, s3Get(s3Large))},
	{load{name: "PUT 1 KiB, 1 client", unit: "op/s"}, s3Requests(1, s3Put(s3Small))},
	{load{name: "PUT 1 KiB, 16 clients", unit: "op/s"}, s3Requests(s3Clients, s3Put(s3Small))},
	{load{name: "GET 1 KiB, 1 client", unit: "op/s"}, s3Requests(1, s3Get(s3Small))},
	{load{name: "GET 1 KiB, 16 clients", unit: "op/s"}, s3Requests(s3Clients, s3Get(s3Small))},
}

// s3Steps are the measurements of the S3 part, were all peers there.
func (o options) s3Steps() int {
	steps := 0
	for _, l := range s3Loads {
		if o.loads.MatchString(l.name) {
			steps += 3 * o.rounds
		}
	}
	return steps
}

// s3Operation is one request about the object of a client; it returns its bytes.
type s3Operation func(ctx context.Context, client *s3.Client, bucket string, worker int) (int64, error)

func s3Put(size int) s3Operation {
	body := sync.OnceValue(func() []byte { return filled(size) })
	return func(ctx context.Context, client *s3.Client, bucket string, worker int) (int64, error) {
		_, err := client.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: aws.String(fmt.Sprintf("bench/%d/%d", size, worker)), Body: bytes.NewReader(body())})
		return int64(size), err
	}
}

func s3Get(size int) s3Operation {
	put := s3Put(size)
	return func(ctx context.Context, client *s3.Client, bucket string, worker int) (int64, error) {
		out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: &bucket, Key: aws.String(fmt.Sprintf("bench/%d/%d", size, worker))})
		if err != nil && strings.Contains(err.Error(), "NoSuchKey") {
			return put(ctx, client, bucket, worker) // the first time
		}
		if err != nil {
			return 0, err
		}
		defer out.Body.Close()
		n, err := io.Copy(io.Discard, out.Body)
		if err == nil && n != int64(size) {
			err = fmt.Errorf("%d bytes of %d", n, size)
		}
		return n, err
	}
}

// s3Requests measures requests per second, s3Transfer MiB per second.
func s3Requests(clients int, op s3Operation) func(context.Context, *s3.Client, string) (float64, error) {
	return func(ctx context.Context, client *s3.Client, bucket string) (float64, error) {
		requests, _, err := s3Rates(ctx, client, bucket, clients, op)
		return requests, err
	}
}

func s3Transfer(clients int, op s3Operation) func(context.Context, *s3.Client, string) (float64, error) {
	return func(ctx context.Context, client *s3.Client, bucket string) (float64, error) {
		_, bytes, err := s3Rates(ctx, client, bucket, clients, op)
		return bytes / (1 << 20), err
	}
}

// s3Rates runs op in each of some clients for as long as limit, after a first time
// that is not measured.
func s3Rates(ctx context.Context, client *s3.Client, bucket string, clients int, op s3Operation) (requests, bytes float64, err error) {
	for worker := range clients {
		if _, err := op(ctx, client, bucket, worker); err != nil {
			return 0, 0, err
		}
	}
	var count, total atomic.Int64
	errs := make([]error, clients)
	var working sync.WaitGroup
	began := time.Now()
	for worker := range clients {
		working.Go(func() {
			for time.Since(began) < limit {
				n, err := op(ctx, client, bucket, worker)
				if err != nil {
					errs[worker] = err
					return
				}
				count.Add(1)
				total.Add(n)
			}
		})
	}
	working.Wait()
	took := time.Since(began).Seconds()
	return float64(count.Load()) / took, float64(total.Load()) / took, errors.Join(errs...)
}

// runS3Load is the child's side of a measurement.
func runS3Load(ctx context.Context, args []string, stdout io.Writer) error {
	if len(args) != 5 {
		return errors.New("s3load NAME ENDPOINT BUCKET ID SECRET")
	}
	client := s3.New(s3.Options{BaseEndpoint: &args[1], UsePathStyle: true, Region: kmstest.DefaultRegion,
		Credentials: credentials.NewStaticCredentialsProvider(args[3], args[4], "")})
	for _, l := range s3Loads {
		if l.name == args[0] {
			rate, err := l.run(ctx, client, args[2])
			if err == nil {
				_, err = fmt.Fprintln(stdout, rate)
			}
			return err
		}
	}
	return fmt.Errorf("there is no load %q", args[0])
}

// compareS3 measures the S3 section and prints its table.
func compareS3(ctx context.Context, o options, self string, stdout, stderr io.Writer) (section, error) {
	return measureS3(ctx, o, self, "S3", (*s3Peer).startCrypt, stdout, stderr, func(r results, rows []load, names []string) {
		r.print(stdout, rows, names)
		r.printUsage(stdout, rows, names)
	})
}

// measureS3 measures the direct way, byokd and a third peer, and prints what was found.
func measureS3(ctx context.Context, o options, self, title string, third s3Starter, stdout, stderr io.Writer, show func(r results, rows []load, names []string)) (s section, err error) {
	peers, err := startS3Peers(ctx, o, third, stderr)
	defer func() {
		for _, p := range slices.Backward(peers) {
			err = errors.Join(err, p.stop())
		}
	}()
	if err != nil {
		return s, err
	}
	ours := peers[slices.IndexFunc(peers, func(p *s3Peer) bool { return p.name == subject })]
	if o.large > 0 {
		if err := ours.transferLarge(ctx, o.large<<30, stdout); err != nil {
			return s, err
		}
	}
	r := newResults()
	var rows []load
	for round := range o.rounds {
		for _, l := range s3Loads {
			if !o.loads.MatchString(l.name) {
				continue
			}
			if round == 0 {
				rows = append(rows, l.load)
			}
			for i := range peers {
				p := peers[(i+round)%len(peers)]
				o.progress.step("round %d of %d: %s: %s", round+1, o.rounds, l.name, p.name)
				p.resetPeak()
				before := p.cpuSeconds()
				rate, err := measureChild(ctx, self, "s3load", l.name, p.endpoint, p.bucket, p.id, p.secret)
				if ctx.Err() != nil {
					break
				}
				if err != nil {
					return s, fmt.Errorf("%s on %s: %w", l.name, p.name, err)
				}
				r.rates.add(l.name, p.name, rate)
				r.cpu.add(l.name, p.name, p.cpuSeconds()-before)
				if u, ok := p.usage(); ok {
					r.peak.add(l.name, p.name, u.peak)
				}
			}
		}
	}
	fmt.Fprintf(stdout, "\n%s: upstream is devcloud, a directory on the same disk\n\n", title)
	names := make([]string, len(peers))
	for i, p := range peers {
		names[i] = p.name
	}
	show(r, rows, names)
	return r.section(title, rows, names), err
}

// transferLarge puts and gets one object, and tells byokd's memory before and after.
func (p *s3Peer) transferLarge(ctx context.Context, size int64, stdout io.Writer) error {
	client := s3.New(s3.Options{BaseEndpoint: &p.endpoint, UsePathStyle: true, Region: kmstest.DefaultRegion, Credentials: credentials.NewStaticCredentialsProvider(p.id, p.secret, "")})
	key := aws.String("bench/large")
	before, err := p.peakMemory()
	if err != nil {
		return err
	}
	link, err := s3.NewPresignClient(client).PresignPutObject(ctx, &s3.PutObjectInput{Bucket: &p.bucket, Key: key}, func(o *s3.PresignOptions) { o.Expires = time.Hour })
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, link.URL, io.LimitReader(zeros{}, size))
	if err != nil {
		return err
	}
	request.ContentLength = size
	began := time.Now()
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("PUT of %d bytes: %s", size, answer.Status)
	}
	put := time.Since(began)
	afterPut, err := p.peakMemory()
	if err != nil {
		return err
	}
	began = time.Now()
	out, err := client.GetObject(ctx, &s3.GetObjectInput{Bucket: &p.bucket, Key: key})
	if err != nil {
		return err
	}
	defer out.Body.Close()
	if n, err := io.Copy(io.Discard, out.Body); err != nil || n != size {
		return fmt.Errorf("GET of %d bytes: %d, %w", size, n, err)
	}
	got := time.Since(began)
	afterGet, err := p.peakMemory()
	if err != nil {
		return err
	}
	mib := float64(size) / (1 << 20)
	fmt.Fprintf(stdout, "one object of %.0f MiB: PUT %.0f MiB/s, GET %.0f MiB/s; byokd's memory at its peak: %s before, %s after the PUT, %s after the GET\n",
		mib, mib/put.Seconds(), mib/got.Seconds(), before, afterPut, afterGet)
	_, err = client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &p.bucket, Key: key})
	return err
}

// zeros is an endless body that costs nothing.
type zeros struct{}

// Read implements io.Reader.
func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// peakMemory is the most that the peer's process has had in memory so far.
func (p *s3Peer) peakMemory() (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.server[0].Process.Pid))
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	line, _, _ := strings.Cut(rest, "\n")
	kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(line), " kB"), 64)
	return fmt.Sprintf("%.1f MiB", kib/1024), err
}

// s3Starter starts a third peer before the direct one. A peer without a name is not
// installed.
type s3Starter func(p *s3Peer, ctx context.Context, o options, direct *s3Peer, arn string, stderr io.Writer) error

// startS3Peers starts the upstream and what stands before it.
func startS3Peers(ctx context.Context, o options, third s3Starter, stderr io.Writer) ([]*s3Peer, error) {
	cloud, err := freeAddress()
	if err != nil {
		return nil, err
	}
	direct := &s3Peer{peer: peer{name: s3Direct}, endpoint: "http://" + cloud, bucket: s3Bucket, id: kmstest.TenantAccessKey, secret: kmstest.TenantSecret}
	all := []*s3Peer{direct}
	if err := direct.launch(nil, filepath.Join(o.bin, "devcloud"), "serve", "--dir", o.dir+"/devcloud-s3", "--listen", cloud, "--setup"); err != nil {
		return all, err
	}
	arn, err := awaitKey(ctx, direct.endpoint)
	if err != nil {
		return all, err
	}
	if err := direct.awaitBucket(ctx); err != nil {
		return all, err
	}
	ours := &s3Peer{peer: peer{name: subject}, bucket: s3Bucket, id: "bench", secret: "bench-secret"}
	all = append(all, ours)
	if err := ours.startProxy(ctx, o, filepath.Join(o.bin, "byokd"), direct.endpoint, arn, "acme-backups"); err != nil {
		return all, err
	}
	other := &s3Peer{id: "bench", secret: "bench-secret"}
	err = third(other, ctx, o, direct, arn, stderr)
	if other.name != "" {
		all = append(all, other)
	}
	return all, err
}

// rcloneServing finds an rclone that serves S3, or returns "". Debian's may be too old;
// `make rclone` builds one.
func rcloneServing() string {
	for _, program := range []string{".cache/rclone", "rclone"} {
		if help, err := exec.Command(program, "serve", "s3", "--help").Output(); err == nil && bytes.Contains(help, []byte("--auth-key")) {
			return program
		}
	}
	return ""
}

// startProxy starts a byokd with a bucket upstream and no volume.
func (p *s3Peer) startProxy(ctx context.Context, o options, program, cloud, arn, upstream string) error {
	address, err := freeAddress()
	if err != nil {
		return err
	}
	admin, err := freeAddress()
	if err != nil {
		return err
	}
	p.endpoint = "http://" + address
	credentials := o.dir + "/s3-credentials-" + upstream
	if err := os.WriteFile(credentials, []byte(p.id+":"+p.secret+"\n"), 0o600); err != nil {
		return err
	}
	config := fmt.Sprintf("cluster: {id: bench, region: %s}\nkeys:\n  primary: {arn: %q, endpoint: %q}\nobjects:\n  listen: %s\n  credentials: {file: %q}\n  buckets:\n    %s: {upstream: {bucket: %s, endpoint: %q}}\nadmin: {listen: %s, socket: %q}\nlog: {level: warn}\n",
		kmstest.DefaultRegion, arn, cloud, address, credentials, s3Bucket, upstream, cloud, admin, o.dir+"/s3-control-"+upstream+".sock")
	file := o.dir + "/byokd-" + upstream + ".yaml"
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	command := []string{program, "run", "--config", file}
	if o.core >= 0 {
		command = append([]string{"taskset", "-c", strconv.Itoa(o.core)}, command...)
	}
	if err := p.launch(tenantEnvironment(), command[0], command[1:]...); err != nil {
		return err
	}
	return p.awaitBucket(ctx)
}

// startCrypt starts rclone: S3 in front, its crypt remote, S3 behind.
func (p *s3Peer) startCrypt(ctx context.Context, o options, upstream *s3Peer, _ string, stderr io.Writer) error {
	program := rcloneServing()
	if program == "" {
		fmt.Fprintln(stderr, "rclone with `serve s3` is not installed and left out")
		return nil
	}
	p.name, p.bucket = s3Crypt, "bench"
	address, err := freeAddress()
	if err != nil {
		return err
	}
	p.endpoint = "http://" + address
	obscured, err := exec.Command(program, "obscure", "bench").Output()
	if err != nil {
		return err
	}
	env := append(os.Environ(), "RCLONE_CONFIG="+os.DevNull,
		"RCLONE_CONFIG_UP_TYPE=s3", "RCLONE_CONFIG_UP_PROVIDER=Other", "RCLONE_CONFIG_UP_ENDPOINT="+upstream.endpoint, "RCLONE_CONFIG_UP_REGION="+kmstest.DefaultRegion,
		"RCLONE_CONFIG_UP_ACCESS_KEY_ID="+upstream.id, "RCLONE_CONFIG_UP_SECRET_ACCESS_KEY="+upstream.secret,
		"RCLONE_CONFIG_CRYPT_TYPE=crypt", "RCLONE_CONFIG_CRYPT_REMOTE=up:"+upstream.bucket+"/crypt", "RCLONE_CONFIG_CRYPT_PASSWORD="+strings.TrimSpace(string(obscured)))
	if err := p.launch(env, program, "serve", "s3", "--addr", address, "--auth-key", p.id+","+p.secret, "--cache-dir", o.dir+"/rclone-cache", "crypt:"); err != nil {
		return err
	}
	client := s3.New(s3.Options{BaseEndpoint: &p.endpoint, UsePathStyle: true, Region: kmstest.DefaultRegion, Credentials: credentials.NewStaticCredentialsProvider(p.id, p.secret, "")})
	return await(func() bool {
		_, err := client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &p.bucket})
		return err == nil || strings.Contains(err.Error(), "AlreadyExists")
	})
}

// awaitBucket waits until the endpoint serves its bucket.
func (p *s3Peer) awaitBucket(ctx context.Context) error {
	client := s3.New(s3.Options{BaseEndpoint: &p.endpoint, UsePathStyle: true, Region: kmstest.DefaultRegion, Credentials: credentials.NewStaticCredentialsProvider(p.id, p.secret, ""), RetryMaxAttempts: 1})
	err := await(func() bool {
		_, err := client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &p.bucket})
		return err == nil
	})
	if err != nil {
		return fmt.Errorf("%s does not serve %s: %w", p.endpoint, p.bucket, err)
	}
	return nil
}

// measureChild runs one load in a process of its own.
func measureChild(ctx context.Context, self string, args ...string) (float64, error) {
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
}
