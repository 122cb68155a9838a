//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// The freeze part disables and enables the key of a whole daemon under full load
// and measures what is promised. `make soak` holds byokd to the promises, with
// memory searched for keys; this tells the figures.

// cycle is one freeze and thaw.
type cycle struct {
	disabled, refused, closed, last, erased time.Time
	enabled, opened, first                  time.Time
}

// The spans of a cycle that are told, in order, and what is promised of each.
var spans = []struct {
	name     string
	promised time.Duration // 0 for nothing
	of       func(c cycle) time.Duration
}{
	{"refusal → gate closed", time.Second, func(c cycle) time.Duration { return c.closed.Sub(c.refused) }},
	{"refusal → last byte on the mount", time.Second, func(c cycle) time.Duration { return c.last.Sub(c.refused) }},
	{"refusal → keys erased", 0, func(c cycle) time.Duration { return c.erased.Sub(c.refused) }},
	{"disable → gate closed", 2 * time.Second, func(c cycle) time.Duration { return c.closed.Sub(c.disabled) }},
	{"enable → gate open", 2 * time.Second, func(c cycle) time.Duration { return c.opened.Sub(c.enabled) }},
	{"enable → first byte on the mount", 2 * time.Second, func(c cycle) time.Duration { return c.first.Sub(c.enabled) }},
}

// span is the report of one of them, in milliseconds.
type span struct {
	Name     string    `json:"name"`
	Promised float64   `json:"promised,omitempty"`
	P50      float64   `json:"p50"`
	P99      float64   `json:"p99"`
	Max      float64   `json:"max"`
	Samples  []float64 `json:"samples"`
}

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1000 }

func (c cycle) String() string {
	return fmt.Sprintf("gate closed %.0f ms after the refusal, keys erased after %.0f ms; open %.0f ms after the key was enabled",
		milliseconds(c.closed.Sub(c.refused)), milliseconds(c.erased.Sub(c.refused)), milliseconds(c.opened.Sub(c.enabled)))
}

func spansOf(cycles []cycle) []span {
	var all []span
	for _, s := range spans {
		one := span{Name: s.name, Promised: milliseconds(s.promised)}
		for _, c := range cycles {
			one.Samples = append(one.Samples, milliseconds(s.of(c)))
		}
		sorted := slices.Sorted(slices.Values(one.Samples))
		at := func(part float64) float64 { return sorted[int(part*float64(len(sorted)-1)+0.5)] }
		if len(sorted) > 0 {
			one.P50, one.P99, one.Max = at(0.5), at(0.99), sorted[len(sorted)-1]
		}
		all = append(all, one)
	}
	return all
}

// measureFreezes runs the freeze part and prints it.
func measureFreezes(ctx context.Context, o options, self string, stdout, stderr io.Writer) (_ []span, err error) {
	o.peers = []string{subject}
	peers, err := startPeers(ctx, o, stderr)
	defer func() {
		for i := range peers {
			err = errors.Join(err, peers[i].stop())
		}
	}()
	if err != nil {
		return nil, err
	}
	p := &peers[0]
	load, err := p.startStress(ctx, o, self)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, load.end()) }()
	var cycles []cycle
	for i := range o.freezes {
		o.progress.step("freeze %d of %d under load", i+1, o.freezes)
		if err := load.progress(ctx); err != nil {
			return nil, err
		}
		c, err := p.freezeUnder(ctx, load)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return nil, err
		}
		cycles = append(cycles, c)
	}
	found := spansOf(cycles)
	printSpans(stdout, found, len(cycles))
	return found, nil
}

func printSpans(w io.Writer, all []span, cycles int) {
	fmt.Fprintf(w, "\nFreeze and thaw of the daemon with readers and writers flat out on the mount, %d times\n\n", cycles)
	fmt.Fprintln(w, "| from → to | p50 | p99 | max | promised |\n| --- | --- | --- | --- | --- |")
	for _, s := range all {
		promised := "–"
		if s.Promised > 0 {
			promised = fmt.Sprintf("%.0f ms", s.Promised)
			if s.Max > s.Promised {
				promised += " ▼"
			}
		}
		fmt.Fprintf(w, "| %s | %.0f ms | %.0f ms | %.0f ms | %s |\n", s.Name, s.P50, s.P99, s.Max, promised)
	}
}

// freezeOnce freezes and thaws a server that nobody uses.
func (p *peer) freezeOnce(ctx context.Context) (cycle, error) { return p.freezeUnder(ctx, nil) }

// freezeUnder disables the key, waits until all is frozen and erased, and enables it.
func (p *peer) freezeUnder(ctx context.Context, load *stress) (c cycle, err error) {
	before, err := p.control.Status(ctx)
	if err != nil {
		return c, err
	}
	c.disabled = time.Now()
	if _, err := p.control.Key(ctx, kmstest.KeyCommand{Key: p.arn, Do: "disable"}); err != nil {
		return c, err
	}
	report, err := p.awaitKey(ctx, func(k metrics.KeyReport) bool { return k.Gate == keyguard.Frozen && k.Erased })
	c.erased = time.Now()
	if err != nil {
		return c, err
	}
	c.closed = report.Since
	if c.refused, err = p.firstRefusal(ctx, before.LastCall); err != nil {
		return c, err
	}
	if load != nil {
		const promised = time.Second // what comes later would be seen
		time.Sleep(time.Until(c.refused.Add(promised)))
		c.last = load.last()
		load.resume()
	}
	if _, err := p.control.Key(ctx, kmstest.KeyCommand{Key: p.arn, Do: "enable"}); err != nil {
		return c, err
	}
	c.enabled = time.Now()
	report, err = p.awaitKey(ctx, func(k metrics.KeyReport) bool { return k.Gate == keyguard.Open })
	c.opened = report.Since
	if err == nil && load != nil {
		c.first, err = load.first(ctx)
	}
	return c, err
}

// firstRefusal is when KMS first refused byokd after a call.
func (p *peer) firstRefusal(ctx context.Context, after uint64) (time.Time, error) {
	page, err := p.control.Calls(ctx, after, 0, 0)
	if err != nil {
		return time.Time{}, err
	}
	for _, c := range page.Calls {
		if c.AccessKey == kmstest.TenantAccessKey && c.Error == "DisabledException" {
			return c.Time, nil
		}
	}
	return time.Time{}, errors.New("byokd froze, but KMS has refused nothing")
}

// awaitKey waits until byokd's status says so of its key.
func (p *peer) awaitKey(ctx context.Context, ok func(metrics.KeyReport) bool) (metrics.KeyReport, error) {
	const look = 2 * time.Millisecond
	for deadline := time.Now().Add(startLimit); time.Now().Before(deadline); time.Sleep(look) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, p.admin+"/v1/status", nil)
		if err != nil {
			return metrics.KeyReport{}, err
		}
		answer, err := http.DefaultClient.Do(request)
		if ctx.Err() != nil {
			return metrics.KeyReport{}, ctx.Err()
		}
		if err != nil {
			continue // busy
		}
		var r metrics.Report
		err = json.NewDecoder(answer.Body).Decode(&r)
		answer.Body.Close()
		if err == nil && len(r.Keys) == 1 && ok(r.Keys[0]) {
			return r.Keys[0], nil
		}
	}
	return metrics.KeyReport{}, fmt.Errorf("byokd's status did not come to say so within %v", startLimit)
}

// startStress starts the load of the freeze part in a process of its own: what hangs
// there hangs nothing here.
func (p *peer) startStress(ctx context.Context, o options, self string) (*stress, error) {
	dir := filepath.Join(p.dir, "stress")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	boards, err := mapBoards(filepath.Join(o.dir, "boards"))
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "stress", dir, filepath.Join(o.dir, "boards"))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &stress{boards: boards, cmd: cmd}
	return s, s.progress(ctx)
}
