//go:build linux

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestUncryptedBuilds: the cipher that copies fits the package it is put into, so
// that the limits can be measured when they are wanted; and byokd as it is built has
// none of it.
func TestUncryptedBuilds(t *testing.T) {
	mark := []byte("it copies and seals nothing")
	for _, build := range []struct {
		name string
		make func(output string) error
		has  bool
	}{
		{"copying", func(output string) error { return buildUncrypted(t.Context(), output, "./cmd/byokd") }, true},
		{"byokd", func(output string) error {
			cmd := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", output, "../cmd/byokd")
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			return cmd.Run()
		}, false},
	} {
		output := filepath.Join(t.TempDir(), build.name)
		if err := build.make(output); err != nil {
			t.Fatal(err)
		}
		program, err := os.ReadFile(output)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(program, mark) != build.has {
			t.Errorf("%s: that it copies is in it: %v", build.name, !build.has)
		}
	}
}
