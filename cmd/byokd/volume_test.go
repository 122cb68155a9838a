package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A kernel that ends FUSE requests by itself is refused at the start, naming the
// setting and the way out; one without such settings, or with 0, is not.
func TestRequestTimeoutsRefused(t *testing.T) {
	for _, c := range []struct {
		settings map[string]string
		refused  string
	}{
		{nil, ""},
		{map[string]string{"default_request_timeout": "0\n", "max_request_timeout": "0\n"}, ""},
		{map[string]string{"default_request_timeout": "600\n", "max_request_timeout": "0\n"}, "sysctl fs.fuse.default_request_timeout=0"},
		{map[string]string{"default_request_timeout": "0\n", "max_request_timeout": "65535\n"}, "sysctl fs.fuse.max_request_timeout=0"},
		{map[string]string{"max_request_timeout": "unreadable"}, "max_request_timeout"},
	} {
		dir := t.TempDir()
		for name, value := range c.settings {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := refuseRequestTimeouts(dir)
		if (err != nil) != (c.refused != "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%v: %v, want %q", c.settings, err, c.refused)
		}
	}
	if err := refuseRequestTimeouts(fuseSysctls); err != nil {
		t.Logf("this machine: %v", err)
	}
}
