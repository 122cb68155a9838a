//go:build linux

package main

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// progress is the line that tells how far a run is and how long it will take yet.
type progress struct {
	w     io.Writer
	began time.Time
	total int // steps planned, all taken to be of one length
	done  int
	ahead int // steps of the parts that have not begun
}

func newProgress(w io.Writer) *progress { return &progress{w: w, began: time.Now()} }

// plan adds the steps of a part that is yet to come.
func (p *progress) plan(steps int) { p.total += steps; p.ahead += steps }

// begin enters a part of so many planned steps, and returns what ends it, whether
// or not it took all of them.
func (p *progress) begin(steps int) (end func()) {
	p.ahead -= steps
	return func() {
		p.done = p.total - p.ahead
		fmt.Fprintf(p.w, "\r%-100s\r", "")
	}
}

// step says what is being done now.
func (p *progress) step(format string, args ...any) {
	left := ""
	if p.done > 4 {
		each := time.Since(p.began) / time.Duration(p.done)
		left = fmt.Sprintf(", %s left", about(each*time.Duration(max(1, p.total-p.done))))
	}
	text := fmt.Sprintf("[%d of %d%s] ", p.done+1, max(p.total, p.done+1), left) + fmt.Sprintf(format, args...)
	fmt.Fprintf(p.w, "\r%-100s", text+strings.Repeat(" ", max(0, 100-len(text))))
	p.done++
}

// about rounds a time that is only estimated.
func about(d time.Duration) string {
	if d < 90*time.Second {
		return fmt.Sprintf("%d s", max(10, int(d.Seconds()/10)*10))
	}
	return fmt.Sprintf("%d min", int(d.Minutes()+0.5))
}
