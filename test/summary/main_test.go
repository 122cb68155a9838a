package main

import (
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	for _, c := range []struct {
		name, in string
		code     int
		want     []string
	}{
		{"all well", `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/x"}
{"Action":"pass","Package":"p","Test":"A/x"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"B"}
{"Action":"output","Package":"p","Test":"B","Output":"    b_test.go:7: no /dev/fuse\n"}
{"Action":"skip","Package":"p","Test":"B"}
{"Action":"pass","Package":"p","Elapsed":1.5}`, 0, []string{"1 passed, 0 failed, 1 skipped", "1 × no /dev/fuse", "ok       p"}},
		{"a failure with its output", `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:1: it broke\n"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`, 1, []string{"it broke", "0 passed, 1 failed, 0 skipped", "not well: p"}},
		{"not built", `{"ImportPath":"p [p.test]","Action":"build-output","Output":"undefined: x\n"}
{"ImportPath":"p [p.test]","Action":"build-fail"}
{"Action":"run","Package":"q","Test":"A"}
{"Action":"pass","Package":"q","Test":"A"}`, 1, []string{"undefined: x", "p [p.test] does not build"}},
		{"died", `{"Action":"run","Package":"q","Test":"B"}
{"Action":"pass","Package":"q","Test":"B"}
{"Action":"run","Package":"p","Test":"A"}`, 1, []string{"p A did not end"}},
		{"nothing ran", "", 1, []string{"0 passed"}},
	} {
		var out strings.Builder
		if code := run(strings.NewReader(c.in), &out); code != c.code {
			t.Errorf("%s: exit code %d, want %d", c.name, code, c.code)
		}
		for _, want := range c.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: %q is missing in:\n%s", c.name, want, out.String())
			}
		}
	}
}
