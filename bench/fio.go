//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// fio's view of the filesystem: loads like those of loads.go, made by the program
// that storage is usually measured with (https://fio.readthedocs.io), for who
// trusts its figures rather than ours. What it reads it has written before, and
// what it writes again it finds there; random reads are of so small a part of it
// that few blocks are read twice.

// fioFile is the file of all jobs.
func fioFile(dir string) string { return filepath.Join(dir, "fio") }

var fioWritten = need{fioFile, fio("write", "--bs=1M", "--end_fsync=1")}

// fio runs one job to the size of a file, or to limit: its rate is in MiB/s for
// large blocks and in calls per second for small ones. A job that writes a file as
// a whole writes a new one.
func fio(how string, args ...string) func(dir string) (float64, error) {
	return func(dir string) (float64, error) {
		if how == "write" {
			if err := os.Remove(fioFile(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return 0, err
			}
		}
		// Nothing is preallocated, so that a file grows as it is written.
		cmd := exec.Command("fio", append([]string{"--name=bench", "--filename=" + fioFile(dir), "--rw=" + how, "--size=" + strconv.Itoa(fileSize),
			"--ioengine=psync", "--fallocate=none", "--invalidate=0", "--group_reporting", "--runtime=" + strconv.Itoa(int(limit/time.Millisecond)) + "ms",
			"--output-format=json"}, args...)...)
		text, err := cmd.Output()
		if err != nil {
			var ended *exec.ExitError
			if errors.As(err, &ended) {
				err = fmt.Errorf("%w: %s", err, ended.Stderr)
			}
			return 0, fmt.Errorf("fio: %w", err)
		}
		return fioRate(text)
	}
}

// fioRate reads a rate from fio's report: of the time until the last fsync, if any.
func fioRate(report []byte) (float64, error) {
	type direction struct {
		Calls   float64 `json:"total_ios"`
		Bytes   float64 `json:"io_bytes"`
		Runtime float64 `json:"runtime"` // milliseconds
	}
	var r struct {
		Jobs []struct {
			Error       int       `json:"error"`
			Read, Write direction // of all jobs that report as one
		}
	}
	if err := json.Unmarshal(report, &r); err != nil {
		return 0, fmt.Errorf("fio's report: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return 0, fmt.Errorf("fio reports %s", report)
	}
	d := r.Jobs[0].Read
	if d.Calls == 0 {
		d = r.Jobs[0].Write
	}
	if d.Calls == 0 || d.Runtime == 0 {
		return 0, errors.New("fio did nothing")
	}
	if d.Bytes/d.Calls >= large {
		return d.Bytes / large / d.Runtime * 1000, nil
	}
	return d.Calls / d.Runtime * 1000, nil
}
