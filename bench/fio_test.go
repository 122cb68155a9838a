//go:build linux

package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestFioRate reads reports as fio 3.33 writes them.
func TestFioRate(t *testing.T) {
	const idle = `"write": {"io_bytes": 0, "runtime": 0, "total_ios": 0}`
	for name, c := range map[string]struct {
		report string
		rate   float64
		err    string
	}{
		"large blocks, MiB/s": {`{"jobs": [{"error": 0, "read": {"io_bytes": 134217728, "runtime": 500, "total_ios": 128}, ` + idle + `}]}`, 256, ""},
		"small blocks, calls": {`{"jobs": [{"error": 0, "read": {"io_bytes": 4096000, "runtime": 250, "total_ios": 1000}, ` + idle + `}]}`, 4000, ""},
		"a job that failed":   {`{"jobs": [{"error": 5, ` + idle + `}]}`, 0, "fio reports"},
		"nothing":             {`{"jobs": [{"error": 0, ` + idle + `}]}`, 0, "did nothing"},
		"no report":           {`fio: bad option`, 0, "fio's report"},
	} {
		rate, err := fioRate([]byte(c.report))
		if rate != c.rate || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %g, %v", name, rate, err)
		}
	}
}

// TestFio runs a job of each kind for real.
func TestFio(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		if strings.Contains(os.Getenv("BYOKD_REQUIRE"), "databases") {
			t.Fatalf("BYOKD_REQUIRE names databases, and fio with them: %v", err)
		}
		t.Skip("fio is not installed (make bench-peers)")
	}
	dir := t.TempDir()
	for _, l := range loads {
		if l.program != "fio" || strings.Contains(l.name, "cold") { // dropping caches needs root, and slows all others
			continue
		}
		if l.needs.make != nil {
			if _, err := l.needs.make(dir); err != nil {
				t.Fatal(err)
			}
		}
		if rate, err := l.run(dir); err != nil || rate <= 0 {
			t.Errorf("%s: %g, %v", l.name, rate, err)
		}
	}
}
