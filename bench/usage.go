//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// usage is what a server's process has.
type usage struct {
	resident, peak float64 // MiB; peak since it was started, or since resetPeak
	descriptors    int
	threads        int
}

// pid of the peer's server, the last that was started, and of byokd with a keeper the
// worker that serves; 0 where there is none.
func (p *peer) pid() int {
	if len(p.server) == 0 {
		return 0
	}
	server := p.server[len(p.server)-1].Process.Pid
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", server))
	for _, list := range lists {
		text, _ := os.ReadFile(list) // of a thread that has ended: none
		for _, child := range strings.Fields(string(text)) {
			if command, err := os.ReadFile("/proc/" + child + "/cmdline"); err == nil && bytes.Contains(command, []byte("\x00run\x00")) {
				pid, _ := strconv.Atoi(child)
				return pid
			}
		}
	}
	return server
}

// usage reads /proc/PID; false where the peer has no server.
func (p *peer) usage() (u usage, ok bool) {
	pid := p.pid()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if pid == 0 || err != nil {
		return u, false
	}
	u.resident, u.peak = statusField(text, "VmRSS:")/1024, statusField(text, "VmHWM:")/1024
	u.descriptors, u.threads = int(statusField(text, "FDSize:")), int(statusField(text, "Threads:"))
	if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err == nil {
		u.descriptors = len(entries)
	}
	return u, true
}

// statusField reads a number of /proc/PID/status; 0 where there is none.
func statusField(status []byte, name string) float64 {
	_, rest, _ := bytes.Cut(status, []byte("\n"+name))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	value, _ := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(string(line), " kB")), 64)
	return value
}

// resetPeak lets the peak of the memory begin anew (proc(5), clear_refs).
func (p *peer) resetPeak() {
	if pid := p.pid(); pid != 0 {
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0) // the peak then is that since its start
	}
}

// cpuSeconds is the processor time that the peer's server has taken so far (utime
// and stime of /proc/PID/stat, in ticks of 10 ms); 0 where there is none.
func (p *peer) cpuSeconds() float64 {
	if p.pid() == 0 {
		return 0
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid()))
	if err != nil {
		return 0
	}
	const utime, stime, perSecond = 11, 12, 100 // counted from behind the name
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	user, _ := strconv.ParseFloat(fields[utime], 64)
	system, _ := strconv.ParseFloat(fields[stime], 64)
	return (user + system) / perSecond
}

// idleFor is how long an idle server is watched: twenty probes of the key.
const idleFor = 20 * time.Second

// idle returns the part of a processor that the server takes when nothing is asked
// of it.
func (p *peer) idle(ctx context.Context) (float64, error) {
	before := p.cpuSeconds()
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(idleFor):
	}
	return (p.cpuSeconds() - before) / idleFor.Seconds(), nil
}
