//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The peers that are an order of magnitude slower, or keep no promise of fsync: they
// are measured once rather than in each round, and what they cannot do is left out.
// `make bench-peers` installs them.

// peerPassword protects what the peers seal, which is noise.
const peerPassword = "bench"

func slow(name string) bool { return name == "encfs" || name == "cryfs" || name == "rclone" }

func startEncfs(_ context.Context, _ options, p *peer) error {
	if _, err := exec.LookPath("encfs"); err != nil {
		return err
	}
	lower, err := p.lower()
	if err != nil {
		return err
	}
	return p.serve("encfs", "-f", "--standard", "--extpass=echo "+peerPassword, lower, p.dir, "--", "-o", "allow_other")
}

func startCryfs(_ context.Context, o options, p *peer) error {
	if _, err := exec.LookPath("cryfs"); err != nil {
		return err
	}
	lower, err := p.lower()
	if err != nil {
		return err
	}
	env := append(os.Environ(), "CRYFS_FRONTEND=noninteractive", "CRYFS_NO_UPDATE_CHECK=true", "CRYFS_LOCAL_STATE_DIR="+filepath.Join(o.dir, "cryfs-state"))
	if err := p.launch(env, "cryfs", "-f", lower, p.dir, "-o", "allow_other"); err != nil { // asks for the password at its input
		return err
	}
	return p.awaitMount()
}

// startRclone mounts rclone's crypt remote, with the cache on disk that writing at
// random needs.
func startRclone(_ context.Context, o options, p *peer) error {
	if _, err := exec.LookPath("rclone"); err != nil {
		return err
	}
	lower, err := p.lower()
	if err != nil {
		return err
	}
	obscured, err := exec.Command("rclone", "obscure", peerPassword).Output()
	if err != nil {
		return fmt.Errorf("rclone obscure: %w", err)
	}
	env := append(os.Environ(), "RCLONE_CONFIG="+os.DevNull, "RCLONE_CONFIG_CRYPT_TYPE=crypt", "RCLONE_CONFIG_CRYPT_REMOTE="+lower,
		"RCLONE_CONFIG_CRYPT_PASSWORD="+strings.TrimSpace(string(obscured)))
	if err := p.launch(env, "rclone", "mount", "crypt:", p.dir, "--allow-other", "--vfs-cache-mode=full", "--cache-dir", filepath.Join(o.dir, "rclone-vfs")); err != nil {
		return err
	}
	return p.awaitMount()
}
