//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard/kmstest"
)

// subject is the peer that the others are compared with.
const subject = "byokd"

// alone is the same without a keeper, as it is by default: the two tell what that costs. -peers byokd,"byokd alone"
// compares the two.
const alone = "byokd alone"

// peer is a filesystem under test.
type peer struct {
	name    string
	dir     string // where the loads work
	mounted bool
	restore func() error // of settings of the machine that were changed for it, nil for none
	server  []*exec.Cmd  // stopped last first

	// Of byokd: its admin endpoint, its key and the control of its stand-in for AWS.
	admin   string
	arn     string
	control kmstest.Control
}

// startLimit is how long a peer may take to mount: cryfs derives its key for 5 s on a quiet
// machine, and for long on a busy one.
const startLimit = time.Minute

// startPeers starts the peers that were asked for and are installed.
func startPeers(ctx context.Context, o options, stderr io.Writer) ([]peer, error) {
	var all []peer
	for _, name := range o.peers {
		start, ok := map[string]func(context.Context, options, *peer) error{
			"raw": startRaw, subject: startByokd, alone: startByokd, uncrypted: startUncrypted, "loopback": startLoopback,
			"gocryptfs": startGocryptfs, "encfs": startEncfs, "cryfs": startCryfs, "rclone": startRclone,
		}[name]
		if !ok {
			return all, fmt.Errorf("there is no peer %q", name)
		}
		p := peer{name: name, dir: filepath.Join(o.dir, strings.ReplaceAll(name, " ", "-"))}
		if err := os.MkdirAll(p.dir, 0o755); err != nil {
			return all, err
		}
		err := start(ctx, o, &p)
		if errors.Is(err, exec.ErrNotFound) {
			fmt.Fprintf(stderr, "%s is not installed and left out (make bench-peers installs it)\n", name)
			continue
		}
		if err != nil && slow(name) {
			fmt.Fprintf(stderr, "%s does not start and is left out: %v\n", name, errors.Join(err, p.stop()))
			continue
		}
		all = append(all, p)
		if err != nil {
			return all, fmt.Errorf("%s: %w", name, err)
		}
	}
	return all, nil
}

// startRaw limits what the kernel may hold dirty of the device, where that is asked for
// and no other peer has its lower directory there.
func startRaw(_ context.Context, o options, p *peer) (err error) {
	if o.dirty == 0 || len(o.peers) > 1 {
		return nil
	}
	p.restore, err = boundDevice(p.dir, o.dirty<<20)
	return err
}

func startLoopback(_ context.Context, o options, p *peer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	lower, err := p.lower()
	if err != nil {
		return err
	}
	if err := p.serve(self, "loopback", lower, p.dir); err != nil || o.dirty == 0 {
		return err
	}
	return limitDirty(p.dir, o.dirty<<20)
}

func startGocryptfs(_ context.Context, _ options, p *peer) error {
	if _, err := exec.LookPath("gocryptfs"); err != nil {
		return err
	}
	lower, err := p.lower()
	if err != nil {
		return err
	}
	if _, err := os.Stat(lower + "/gocryptfs.conf"); err != nil {
		text, err := exec.Command("gocryptfs", "-init", "-q", "-scryptn", "10", "-extpass", "echo "+peerPassword, lower).CombinedOutput()
		if err != nil {
			return fmt.Errorf("gocryptfs -init: %w: %s", err, text)
		}
	}
	return p.serve("gocryptfs", "-fg", "-q", "-allow_other", "-extpass", "echo "+peerPassword, lower, p.dir)
}

// startByokd starts byokd as it is built.
func startByokd(ctx context.Context, o options, p *peer) error {
	return p.startByokd(ctx, o, filepath.Join(o.bin, "byokd"))
}

// startByokd starts a stand-in for AWS, and a byokd on it.
func (p *peer) startByokd(ctx context.Context, o options, program string) error {
	lower, err := p.lower()
	if err != nil {
		return err
	}
	cloud, err := freeAddress()
	if err != nil {
		return err
	}
	admin, err := freeAddress()
	if err != nil {
		return err
	}
	if err := p.launch(nil, filepath.Join(o.bin, "devcloud"), "serve", "--dir", p.dir+".devcloud", "--listen", cloud, "--setup"); err != nil {
		return err
	}
	arn, err := awaitKey(ctx, "http://"+cloud)
	if err != nil {
		return err
	}
	p.admin, p.arn, p.control = "http://"+admin, arn, kmstest.Control{Endpoint: "http://" + cloud}
	keeper := "auto"
	if p.name == alone {
		keeper = "off"
	}
	limit := ""
	if o.dirty != 0 {
		limit = fmt.Sprintf(", dirtyLimit: %dMiB", o.dirty)
	}
	config := fmt.Sprintf("cluster: {id: bench, region: %s}\nkeys:\n  primary: {arn: %q, endpoint: %q}\nvolume: {role: orchestration, lower: %q, mount: %q, keeper: %s%s}\nadmin: {listen: %s}\nlog: {level: warn}\n",
		kmstest.DefaultRegion, arn, "http://"+cloud, lower, p.dir, keeper, limit, admin)
	file := p.dir + ".yaml"
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	if err := p.launch(tenantEnvironment(), program, "run", "--config", file); err != nil {
		return err
	}
	return p.awaitMount()
}

// awaitKey waits for devcloud's key and returns its ARN.
func awaitKey(ctx context.Context, cloud string) (arn string, err error) {
	control := kmstest.Control{Endpoint: cloud}
	err = await(func() bool {
		status, err := control.Status(ctx)
		if err != nil || len(status.Keys) == 0 {
			return false
		}
		arn = status.Keys[0].ARN
		return true
	})
	if err != nil {
		return "", fmt.Errorf("devcloud: %w", err)
	}
	return arn, nil
}

// tenantEnvironment is what byokd needs to be let in at devcloud.
func tenantEnvironment() []string {
	return append(os.Environ(), "AWS_REGION="+kmstest.DefaultRegion, "AWS_EC2_METADATA_DISABLED=true",
		"AWS_ACCESS_KEY_ID="+kmstest.TenantAccessKey, "AWS_SECRET_ACCESS_KEY="+kmstest.TenantSecret)
}

// lower makes the directory that a mount's files lie in.
func (p *peer) lower() (string, error) {
	lower := p.dir + ".lower"
	return lower, os.MkdirAll(lower, 0o700)
}

// serve starts a filesystem that stays in the foreground, and awaits its mount.
func (p *peer) serve(program string, args ...string) error {
	if err := p.launch(nil, program, args...); err != nil {
		return err
	}
	return p.awaitMount()
}

// launch starts a server in a group of its own, so that Ctrl-C reaches us first.
// env nil means ours.
func (p *peer) launch(env []string, program string, args ...string) error {
	cmd := exec.Command(program, args...)
	cmd.Env, cmd.Stderr, cmd.Stdin = env, os.Stderr, strings.NewReader(peerPassword+"\n")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	p.server = append(p.server, cmd)
	return nil
}

func (p *peer) awaitMount() error {
	err := await(func() bool {
		mounts, err := os.ReadFile("/proc/self/mounts")
		return err == nil && bytes.Contains(mounts, []byte(" "+p.dir+" fuse."))
	})
	if err != nil {
		return fmt.Errorf("nothing was mounted: %w", err)
	}
	p.mounted = true
	return nil
}

// stop ends the servers, which unmount.
func (p *peer) stop() error {
	var all error
	if p.restore != nil {
		all = p.restore()
	}
	for _, cmd := range slices.Backward(p.server) {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(startLimit):
			all = errors.Join(all, fmt.Errorf("%s did not stop", strings.Join(cmd.Args, " ")), cmd.Process.Kill())
		}
	}
	if p.mounted {
		if err := unix.Unmount(p.dir, unix.MNT_FORCE|unix.MNT_DETACH); err == nil {
			all = errors.Join(all, fmt.Errorf("%s left its mount behind", p.name))
		}
	}
	return all
}

func await(ok func() bool) error {
	for deadline := time.Now().Add(startLimit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %v", startLimit)
		}
	}
	return nil
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
