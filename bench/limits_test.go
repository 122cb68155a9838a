//go:build linux

package main

import (
	"bytes"
	"os"
	"path/filepath"
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
