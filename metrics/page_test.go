package metrics

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
)

// The page says everything that matters without a script.
func TestPanelWithoutScript(t *testing.T) {
	s := newSystem(t)
	s.panel.RunsAs("arn:aws:iam::444455556666:role/byokd-tenant")
	s.disk.Describe(Fact{"Format", "1"}, Fact{"Cache", "writeback"})
	s.guard.set(keyguard.Open, keyguard.Enabled, "")
	s.disk.Serving()
	s.guard.set(keyguard.Frozen, keyguard.PendingDeletion, keyguard.ReasonPendingDeletion)
	s.guard.mu.Lock()
	s.guard.status.DeletionDate = time.Now().Add(7*24*time.Hour + time.Minute)
	s.guard.status.LastSuccess = time.Now().Add(-90 * time.Second)
	s.guard.status.Waiting = 17
	s.guard.status.Detail = "<script>alert(1)</script>"
	s.guard.mu.Unlock()
	code, page := s.get(t, "/")
	for _, want := range []string{
		"External encryption key is not ready", "arn:aws:kms:eu-central-1:111122223333:key/primary", "PendingDeletion",
		"<code>aws --endpoint-url http://127.0.0.1:4566 kms cancel-key-deletion", "kms enable-key --key-id", "in 7 d", "1 min 30 s ago",
		"<dt>Blocked operations</dt><dd>17</dd>", "arn:aws:iam::444455556666:role/byokd-tenant", "orchestration disk", "/data",
		"<dt>Format</dt><dd>1</dd>", "<dt>Cache</dt><dd>writeback</dd>", `<rect x="`, "acme", `http-equiv="refresh"`,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if code != 200 || strings.Contains(page, "<script>") || strings.Contains(page, "ZgotmplZ") {
		t.Errorf("%d: %s", code, page)
	}
}

func TestNextStepsAreTakenApart(t *testing.T) {
	for next, want := range map[string]step{
		"Enable the key: aws kms enable-key --key-id K":                    {"Enable the key:", "aws kms enable-key --key-id K", ""},
		"When the reason for the freeze is gone: byokd thaw":               {"When the reason for the freeze is gone:", "byokd thaw", ""},
		"If so, see: aws kms describe-custom-key-stores; byokd goes on":    {"If so, see:", "aws kms describe-custom-key-stores", "byokd goes on"},
		"Find and connect it: aws kms describe-x, then aws kms connect-x":  {"Find and connect it: aws kms describe-x, then aws kms connect-x", "", ""},
		"There is no way back for this key.":                               {"There is no way back for this key.", "", ""},
		"Cancel (both are needed): aws kms a --key-id K && aws kms b -k K": {"Cancel (both are needed):", "aws kms a --key-id K && aws kms b -k K", ""},
	} {
		if got := stepOf(next); got != want {
			t.Errorf("%q: %+v", next, got)
		}
	}
}

func TestTimelinesHaveNoGaps(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	event := func(ago time.Duration, gate keyguard.GateState) Event {
		return Event{At: now.Add(-ago), Guard: "primary", Gate: gate, Key: keyguard.Disabled}
	}
	for name, c := range map[string]struct {
		history []Event // newest first
		want    []State
	}{
		"nothing yet": {nil, nil},
		"one freeze of a second": {[]Event{event(time.Hour, keyguard.Open), event(time.Hour+time.Second, keyguard.Frozen),
			event(10*time.Hour, keyguard.Open)}, []State{StateReady, StateFrozen, StateReady}},
		"draining and frozen are one": {[]Event{event(time.Hour, keyguard.Frozen), event(time.Hour+time.Second, keyguard.Draining),
			event(2*time.Hour, keyguard.Open)}, []State{StateReady, StateFrozen}},
		"before the span, only the last counts": {[]Event{event(time.Hour, keyguard.Open), event(30*time.Hour, keyguard.Frozen),
			event(40*time.Hour, keyguard.Open)}, []State{StateFrozen, StateReady}},
		"a freeze just now": {[]Event{event(0, keyguard.Frozen), event(10*time.Hour, keyguard.Open)}, []State{StateReady, StateFrozen}},
	} {
		bars := timelines(Report{Time: now, Keys: []KeyReport{{Name: "primary"}, {Name: "other"}}, History: c.history})
		if c.history == nil {
			if len(bars) > 0 && len(bars[0].Segments) > 0 {
				t.Errorf("%s: %+v", name, bars)
			}
			continue
		}
		var states []State
		end := bars[0].Segments[0].X
		for _, s := range bars[0].Segments {
			states = append(states, s.State)
			if s.X != end || s.Width < timelineMin {
				t.Errorf("%s: a gap or a segment that cannot be seen: %+v", name, bars[0].Segments)
			}
			end = s.X + s.Width
		}
		if !slices.Equal(states, c.want) || end != timelineUnits {
			t.Errorf("%s: %v up to %d, want %v", name, states, end, c.want)
		}
		if len(bars) != 2 || len(bars[1].Segments) != 0 {
			t.Errorf("%s: the other key has %+v", name, bars[1])
		}
	}
}

func TestTrafficIsAMeanOfTheLastSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := NewRegistry("v1", "guaranteed")
		disk := registry.NewFS(func() (VolumeGauges, bool) { return VolumeGauges{}, false })
		s3 := registry.NewObjects([]string{"documents"})
		meter := &trafficMeter{gather: registry.prom, now: time.Now}
		report := func() TrafficReport {
			t.Helper()
			r, err := meter.report()
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		if r := report(); r.Over != 0 {
			t.Errorf("knows traffic at the first look: %+v", r)
		}
		disk.Done("write", 4000, 10*time.Millisecond, 0)
		disk.Done("read", 1000, 30*time.Millisecond, 0)
		s3.Done(objstore.Event{Op: "PutObject", Bucket: "documents", Status: 200, In: 8000, Out: 200, Took: time.Second})
		time.Sleep(2 * time.Second) // the bubble's clock
		want := TrafficReport{Over: 2, Disk: TrafficFlow{InBytes: 2000, OutBytes: 500, Operations: 1, Latency: 0.02},
			Objects: TrafficFlow{InBytes: 4000, OutBytes: 100, Operations: 0.5, Latency: 1}}
		if r := report(); r != want {
			t.Errorf("got %+v, want %+v", r, want)
		}
		for range 3 * trafficSpan / time.Second { // old traffic is forgotten
			time.Sleep(time.Second)
			report()
		}
		if r := report(); r.Disk != (TrafficFlow{}) || r.Over < trafficSpan.Seconds() || r.Over > 2*trafficSpan.Seconds() {
			t.Errorf("old traffic is still told: %+v", r)
		}
	})
}

// With several keys each says its own cause, and its siblings, lease and request of an operator.
func TestPanelWithSeveralKeys(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var page strings.Builder
	err := document(Report{Time: now, State: StateFrozen, Headline: "External encryption key is not ready", Keys: []KeyReport{
		{Name: "primary", Gate: keyguard.Frozen, Key: keyguard.Disabled, Cause: "It is disabled & gone.", NextStep: "Enable it: aws kms enable-key",
			MultiRegion: true, Siblings: []string{"arn:sibling"}, Operator: &OperatorReport{Pending: keyguard.ThawIntent, By: "uid 0", Since: now}},
		{Name: "backup", Gate: keyguard.Degraded, Key: keyguard.Unreachable, Cause: "KMS is silent.", LeaseUntil: now.Add(42 * time.Second), MaterialEnds: now.Add(48 * time.Hour)},
	}}).Render(&page)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<dd>It is disabled &amp; gone.</dd>", "<dd>Enable it: aws kms enable-key</dd>", "<dd>KMS is silent.</dd>", "arn:sibling",
		"thaw, when the key is back (uid 0", ">in 42 s</time>", ">in 2 d</time>", `class="card frozen"`, `class="card degraded"`, "None is configured.", "Nothing yet."} {
		if !strings.Contains(page.String(), want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if strings.Contains(page.String(), "ZgotmplZ") {
		t.Error(page.String())
	}
}
