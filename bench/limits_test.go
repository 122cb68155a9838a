//go:build linux

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestUncryptedBuilds: the cipher that copies fits the package it is put into, so
// that the limits can be measured when they are wanted.
func TestUncryptedBuilds(t *testing.T) {
	output := filepath.Join(t.TempDir(), "seal.a")
	if err := buildUncrypted(t.Context(), output, "./internal/seal"); err != nil {
		t.Fatal(err)
	}
	object, err := os.ReadFile(output)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(object, []byte("it copies and seals nothing")) {
		t.Error("the package was built with its own cipher")
	}
}

// TestInTheWay: what is blamed for a missed goal is what the peers without it lack.
func TestInTheWay(t *testing.T) {
	l := load{name: "x", unit: "op/s", goals: goals(0.5, 0.9, 1.3)}
	for _, c := range []struct {
		ours, bare, passing float64 // loopback's is 0 where it was not measured; raw makes 100, gocryptfs 50
		another             float64 // of byokd's rounds
		want                string
	}{
		{70, 70, 70, 0, ""},
		{60, 70, 70, 0, "| gocryptfs | 1.30 | 1.20 | 1.40 | 1.40 | cryptography |\n| loopback | 0.90 | 0.86 | 1.00 | 1.00 | cryptography |\n"},
		{60, 60, 70, 0, "| gocryptfs | 1.30 | 1.20 | 1.20 | 1.40 | the format or its code |\n| loopback | 0.90 | 0.86 | 0.86 | 1.00 | the format or its code |\n"},
		{60, 60, 62, 0, "| gocryptfs | 1.30 | 1.20 | 1.20 | 1.24 | FUSE |\n"},
		{40, 44, 0, 0, "| raw | 0.50 | 0.40 | 0.44 | – | not cryptography |\n| gocryptfs | 1.30 | 0.80 | 0.88 | – | not cryptography |\n"},
		{60, 60, 62, 66, "| gocryptfs | 1.30 | 1.20 | 1.20 | 1.24 | nothing: reached in one of the rounds |\n"},
	} {
		r := newResults()
		for peer, rate := range map[string]float64{"raw": 100, "gocryptfs": 50, subject: c.ours, uncrypted: c.bare, "loopback": c.passing} {
			if rate > 0 {
				r.rates.add(l.name, peer, rate)
			}
		}
		if c.another > 0 {
			r.rates.add(l.name, subject, c.another)
			r.rates.add(l.name, subject, c.ours)
		}
		var out bytes.Buffer
		r.printLimits(&out, []load{l}, []string{"raw", "gocryptfs", "loopback"})
		_, rows, _ := strings.Cut(out.String(), "| --- |\n")
		if got := strings.ReplaceAll(rows, "| x ", ""); got != c.want {
			t.Errorf("byokd %v, without cryptography %v, loopback %v:\n%swant\n%s", c.ours, c.bare, c.passing, got, c.want)
		}
	}
}
