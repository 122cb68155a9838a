package fs

import (
	"bytes"
	"os"
	"testing"
)

// TestSmallNewFileDoesNotWaitForTheDisk: the first block of a new file goes to
// the lower page cache although it is short; what comes after is a rewrite, and
// goes round it.
func TestSmallNewFileDoesNotWaitForTheDisk(t *testing.T) {
	v := newVolume(t, Options{Cache: Writethrough})
	f, err := os.Create(v.path("f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	direct := func() int {
		count := 0
		for _, n := range v.fs.nodes.all() {
			if n.file.direct.Load() != 0 {
				count++
			}
		}
		return count
	}
	if _, err := f.Write([]byte("first")); err != nil {
		t.Fatal(err)
	}
	if got := direct(); got != 0 {
		t.Errorf("the first write to a new file went through O_DIRECT")
	}
	for range 3 {
		if _, err := f.Write([]byte(", more")); err != nil {
			t.Fatal(err)
		}
	}
	if got := direct(); got != 1 && !v.fs.stable {
		t.Errorf("a short block was rewritten in place through the page cache")
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	v.remount()
	got, err := os.ReadFile(v.path("f"))
	if want := []byte("first, more, more, more"); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
}
