package metrics

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/byokd/byokd/keyguard"
)

// step is a next step with the command in it apart, ready to be copied.
type step struct{ Text, Command, After string }

// stepOf finds the command at the end of a next step. Where there are several, they stay in the text.
func stepOf(next string) step {
	for _, program := range []string{": aws ", ": byokd "} {
		i := strings.LastIndex(next, program)
		if i < 0 || strings.Contains(next[i:], ", then ") {
			continue
		}
		command, after, _ := strings.Cut(next[i+2:], "; ")
		return step{next[:i+1], command, after}
	}
	return step{Text: next}
}

// timeline is the history of one key as a bar of a thousand units.
type timeline struct {
	Key      string
	From     time.Time
	Segments []segment // in order, without gaps
}

type segment struct {
	X, Width int
	State    State
	Gate     keyguard.GateState
	Reason   keyguard.Reason
	Since    time.Time
}

const (
	timelineUnits = 1000
	timelineMin   = 4 // units: a freeze of a second in a day must be seen
	timelineSpan  = 24 * time.Hour
)

// timelines turns the history into bars over the same span: the last day, or since the oldest event.
func timelines(r Report) (all []timeline) {
	from := r.Time.Add(-timelineSpan)
	if n := len(r.History); n > 0 && r.History[n-1].At.After(from) {
		from = r.History[n-1].At
	}
	whole := r.Time.Sub(from)
	if whole <= 0 {
		return nil
	}
	for _, k := range r.Keys {
		bar := timeline{Key: k.Name, From: from}
		for _, e := range slices.Backward(r.History) {
			if e.Guard != k.Name {
				continue
			}
			x := max(0, int(e.At.Sub(from)*timelineUnits/whole))
			bar.add(segment{X: x, State: stateOf(e.Gate, e.Key), Gate: e.Gate, Reason: e.Reason, Since: e.At})
		}
		bar.close()
		all = append(all, bar)
	}
	return all
}

// add appends what begins at s.X; what looks the same as before goes on.
func (t *timeline) add(s segment) {
	if s.X == 0 {
		t.Segments = nil // before the span only the last state counts
	}
	if n := len(t.Segments); n > 0 {
		last := t.Segments[n-1]
		if last.State == s.State {
			return
		}
		s.X = min(max(s.X, last.X+timelineMin), timelineUnits-timelineMin)
		if s.X <= last.X { // crowded at the end: what is now matters more than what was
			t.Segments = t.Segments[:n-1]
			s.X = last.X
		}
	}
	t.Segments = append(t.Segments, s)
}

func (t *timeline) close() {
	for i := range t.Segments {
		end := timelineUnits
		if i+1 < len(t.Segments) {
			end = t.Segments[i+1].X
		}
		t.Segments[i].Width = end - t.Segments[i].X
	}
}

// span gives a duration in its two largest units. The script does the same (panel.js).
func span(d time.Duration) string {
	s := int64(max(d, 0).Round(time.Second) / time.Second)
	var parts []string
	for _, unit := range []struct {
		name string
		size int64
	}{{"d", 86400}, {"h", 3600}, {"min", 60}, {"s", 1}} {
		if n := s / unit.size; n > 0 || unit.size == 1 && len(parts) == 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, unit.name))
		}
		s %= unit.size
	}
	return strings.Join(parts[:min(2, len(parts))], " ")
}

func until(d time.Duration) string {
	if d <= 0 {
		return "due now"
	}
	return "in " + span(d)
}

// rate gives bytes per second.
func rate(bytes float64) string {
	for _, unit := range []string{"B/s", "KiB/s", "MiB/s"} {
		if bytes < 1024 {
			return fmt.Sprintf("%.3g %s", bytes, unit)
		}
		bytes /= 1024
	}
	return fmt.Sprintf("%.3g GiB/s", bytes)
}

// latency gives seconds in the unit that fits.
func latency(seconds float64) string {
	switch {
	case seconds == 0:
		return "–"
	case seconds < 1e-3:
		return fmt.Sprintf("%.3g µs", seconds*1e6)
	case seconds < 1:
		return fmt.Sprintf("%.3g ms", seconds*1e3)
	}
	return fmt.Sprintf("%.3g s", seconds)
}
