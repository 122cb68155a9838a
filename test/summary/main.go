// summary reads `go test -json` from standard input and prints what a person wants to see of it: one line
// per package, the output of what failed, why tests were skipped, and the sum. It exits 1 when anything
// failed, was not built or never ended.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is one line of go test -json (go doc test2json).
type event struct {
	Action, Package, Test, Output, ImportPath string
	Elapsed                                   float64
}

// key names a test, or a package when Test is empty.
type key struct{ pkg, test string }

type summary struct {
	out                     io.Writer
	output                  map[key][]string // of tests that have not ended; of packages whole
	open                    map[key]bool
	parents                 map[key]bool // tests with subtests: their parts are counted instead
	passed, failed, skipped int
	reasons                 map[string]int // of skips
	broken                  []string       // packages that failed
}

func main() { os.Exit(run(os.Stdin, os.Stdout)) }

func run(in io.Reader, out io.Writer) int {
	s := summary{out: out, output: map[key][]string{}, open: map[key]bool{}, parents: map[key]bool{}, reasons: map[string]int{}}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(out, lines.Text()) // not JSON: go itself has something to say
			continue
		}
		s.take(e)
	}
	if err := lines.Err(); err != nil {
		s.broken = append(s.broken, err.Error())
	}
	return s.finish()
}

func (s *summary) take(e event) {
	k := key{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(s.out, e.Output)
	case "build-fail":
		s.broken = append(s.broken, e.ImportPath+" does not build")
	case "start", "run":
		s.open[k] = true
		if i := strings.LastIndexByte(e.Test, '/'); i > 0 {
			s.parents[key{e.Package, e.Test[:i]}] = true
		}
	case "output":
		s.output[k] = append(s.output[k], e.Output)
	case "pass", "fail", "skip":
		delete(s.open, k)
		if e.Test == "" {
			s.endPackage(e)
		} else {
			s.endTest(e, k)
		}
	}
}

func (s *summary) endTest(e event, k key) {
	switch {
	case e.Action == "fail":
		fmt.Fprintf(s.out, "%s\n%s", e.Package, strings.Join(s.output[k], ""))
		if !s.parents[k] {
			s.failed++
		}
	case s.parents[k]:
	case e.Action == "pass":
		s.passed++
	default:
		s.skipped++
		s.reasons[reason(s.output[k])]++
	}
	delete(s.output, k)
}

func (s *summary) endPackage(e event) {
	k := key{e.Package, ""}
	if e.Action == "fail" {
		s.broken = append(s.broken, e.Package)
		fmt.Fprint(s.out, strings.Join(s.output[k], ""))
	}
	word := map[string]string{"pass": "ok", "fail": "FAIL", "skip": "no tests"}[e.Action]
	fmt.Fprintf(s.out, "%-8s %-50s %6.1fs\n", word, e.Package, e.Elapsed)
}

// reason finds what t.Skip said: the line after its file and number.
func reason(output []string) string {
	for _, line := range output {
		line = strings.TrimSpace(line)
		if at, text, ok := strings.Cut(line, ": "); ok && strings.Contains(at, ".go:") {
			return text
		}
	}
	return "no reason given"
}

func (s *summary) finish() int {
	for k := range s.open { // a test binary that died or timed out
		s.broken = append(s.broken, strings.TrimSuffix(k.pkg+" "+k.test, " ")+" did not end")
	}
	if len(s.reasons) > 0 {
		var lines []string
		for text, n := range s.reasons {
			lines = append(lines, fmt.Sprintf("  %3d × %s", n, text))
		}
		slices.Sort(lines)
		fmt.Fprintf(s.out, "\nskipped:\n%s\n", strings.Join(lines, "\n"))
	}
	fmt.Fprintf(s.out, "\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	if len(s.broken) > 0 {
		slices.Sort(s.broken)
		fmt.Fprintf(s.out, "not well: %s\n", strings.Join(slices.Compact(s.broken), "; "))
	}
	if s.failed > 0 || len(s.broken) > 0 || s.passed == 0 {
		return 1
	}
	return 0
}
