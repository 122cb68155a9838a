//go:build linux

package test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// The table of docs/BEHAVIOUR.md, cell by cell, with the engine as the program: every way to lose the key, under load
// and at the start.
func TestWorkloadStates(t *testing.T) {
	e := newEngine(t)
	e.start()
	for _, r := range revocations {
		if r.cache != "" {
			continue // a matter of the mount, not of the key
		}
		e.running(r)
		e.starting(r)
	}
}

// running takes the key away under load and gives it back.
func (e *engine) running(r revocation) {
	e.t.Helper()
	load := e.load()
	before := e.writes.count()
	e.awaitLong("instances", e.process, func() bool { return e.writes.count() > before+200 })
	changed := time.Now()
	r.refuse(e.stack, 0)
	report := e.awaitState(metrics.StateFrozen, metrics.StateFinal)
	told := time.Since(changed)
	<-time.After(freezeLimit)
	last := e.writes.look()
	r.assertTold(e.stack)
	var free, took = e.free()
	if free == 0 || took > time.Second {
		e.t.Errorf("the disk monitor would see %d bytes free, after %v", free, took)
	}
	waiting := make(chan int, 1)
	if r.restore != nil {
		go func() { waiting <- e.backup("of-" + strings.ReplaceAll(r.name, " ", "-")) }()
	}
	e.hold(2*time.Second, func() {
		if at := e.writes.resumed(); !at.IsZero() {
			e.t.Fatalf("a command was acknowledged %v after the key was lost", at.Sub(changed))
		}
		if len(waiting) > 0 {
			e.t.Fatal("a backup was completed while frozen")
		}
	})
	e.t.Logf("running, %v: last acknowledged command after %v, panel %q after %v; %s", r.key, last.Sub(changed).Round(time.Millisecond), report.Headline, told.Round(time.Millisecond), report.Cause)
	if r.restore == nil {
		e.kill()
		load.end()
		return
	}
	r.restore(e.stack, 0)
	restored := time.Now()
	e.awaitState(metrics.StateReady)
	e.awaitLong("a command", e.process, func() bool { return !e.writes.resumed().IsZero() })
	e.t.Logf("running, %v: first acknowledged command %v after the key was usable again, the backup of that time complete after %d attempts", r.key,
		e.writes.resumed().Sub(restored).Round(time.Millisecond), <-waiting)
	load.end()
	if failed := e.writes.errors(); len(failed) > 0 {
		e.t.Errorf("%d commands failed, the first: %v", len(failed), failed[0])
	}
	e.verifyAll(fmt.Sprint("after ", r.name), 0)
	e.quietLog(fmt.Sprint("over ", r.name))
}

// starting starts byokd without the key, and gives it back where it can be.
func (e *engine) starting(r revocation) {
	e.t.Helper()
	if r.restore != nil {
		e.kill()
	}
	e.stopDaemon()
	before := e.sealedFiles()
	if r.restore != nil { // else it is lost already
		r.refuse(e.stack, 0)
	}
	e.startDaemon()
	e.awaitKey(r.key)
	report := e.awaitState(metrics.StateWaiting, metrics.StateFinal)
	e.assertHealth(true, false, false)
	if mounted(e.mount) {
		e.t.Error("mounted without a key")
	}
	if left, err := os.ReadDir(e.mount); err != nil || len(left) > 0 {
		e.t.Errorf("an unmounted mount point holds %v, %v", left, err)
	}
	e.t.Logf("at the start, %v: not mounted, startup probe false, panel %q; %s", report.Keys[0].Key, report.Headline, report.Cause)
	if after := e.sealedFiles(); after != before {
		e.t.Errorf("%d files lay below the seal before, %d after the start without a key", before, after)
	}
	if r.restore == nil {
		return
	}
	r.restore(e.stack, 0)
	restored := time.Now()
	e.awaitState(metrics.StateReady)
	e.t.Logf("at the start, %v: mounted %v after the key was usable again", r.key, time.Since(restored).Round(time.Millisecond))
	e.start()
	e.verifyAll(fmt.Sprint("started after ", r.name), 0)
}

// sealedFiles counts what lies below the mount.
func (e *engine) sealedFiles() (files int) {
	e.t.Helper()
	err := filepath.WalkDir(e.lower, func(string, fs.DirEntry, error) error { files++; return nil })
	if err != nil || files < 10 {
		e.t.Errorf("%d files below the seal: %v", files, err)
	}
	return files
}

// The document store's sequence by the AWS SDK for Java through the proxy, links included, with the key away when it
// begins: shorter than byokd holds a request, and longer, so that the SDK meets a 503 and tries again.
func TestWorkloadDocuments(t *testing.T) {
	requireWorkloads(t)
	for _, length := range []time.Duration{0, 10 * time.Second, 30 * time.Second} {
		t.Run(length.String(), func(t *testing.T) {
			d := newDatabase(t, withHold(20*time.Second))
			if length > 0 {
				d.key(kmstest.KeyCommand{Do: "disable"})
				d.awaitState(metrics.StateFrozen)
			}
			p := d.jvm("documents", "Client", d.s3)
			d.hold(length, func() {
				if p.ended() {
					t.Fatalf("the client has ended while frozen: %s", p.tail())
				}
			})
			if length > 0 {
				d.key(kmstest.KeyCommand{Do: "enable"})
				d.awaitState(metrics.StateReady)
			}
			if !p.wait(workloadPatience) || p.code() != 0 || !strings.Contains(p.output(), "java: all as on S3") {
				t.Fatalf("with the key away for %v: %v\n%s", length, p.err, p.tail())
			}
			t.Logf("key away for %v: the SDK's client has all as on S3", length)
		})
	}
}
