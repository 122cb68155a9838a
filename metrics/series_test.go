package metrics

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/byokd/byokd/internal/inject"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
)

var update = flag.Bool("update", false, "rewrite the golden files of this package and docs/METRICS.md")

// exposition is a scrape in which every series of byokd appears.
func exposition(t *testing.T) string {
	t.Helper()
	s := newSystem(t)
	s.guard.set(keyguard.Frozen, keyguard.PendingDeletion, keyguard.ReasonPendingDeletion)
	s.guard.mu.Lock()
	s.guard.status.LastSuccess, s.guard.status.LeaseUntil, s.guard.status.DeletionDate = time.Now(), time.Now(), time.Now()
	s.guard.status.MaterialExpires = time.Now()
	s.guard.mu.Unlock()
	s.guards.Probed(keyguard.Disabled, keyguard.ReasonKeyDisabled, time.Millisecond)
	s.fs.Done("write", 1, time.Millisecond, 0)
	s.fs.Done("lookup", 0, time.Millisecond, syscall.ENOENT)
	s.objects.Done(objstore.Event{Op: "GetObject", Bucket: "documents", Status: 503, Code: "SlowDown"})
	_, text := s.get(t, "/metrics")
	return text + injectorExposition(t) + nodeExposition(t)
}

// injectorExposition is a scrape of byokd inject: the series that are its alone.
func injectorExposition(t *testing.T) string {
	t.Helper()
	registry := NewRegistry("v1", "guaranteed")
	i := registry.NewInjector()
	i.Reviewed(inject.OutcomeDenied, inject.ReasonImage, time.Millisecond)
	i.Warned(inject.ReasonSubPath)
	i.Certified(time.Now(), time.Now())
	return seriesOf(registry, "byokd_inject_")
}

// nodeExposition is a scrape of byokd node: the series that are its alone.
func nodeExposition(t *testing.T) string {
	t.Helper()
	registry := NewRegistry("v1", "guaranteed")
	n := registry.NewNode()
	n.Follow(func() (served, waiting int) { return 2, 1 })
	n.Published("publish", nil)
	n.Published("unpublish", errors.New("busy"))
	text := seriesOf(registry, "byokd_node_")
	for _, line := range []string{`byokd_node_mounts{state="served"} 2`, `byokd_node_mounts{state="waiting"} 1`,
		`byokd_node_volume_calls_total{call="publish",result="ok"} 1`, `byokd_node_volume_calls_total{call="unpublish",result="failed"} 1`} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("%s is missing in\n%s", line, text)
		}
	}
	return text
}

// seriesOf is what a scrape says of the series whose names begin with prefix.
func seriesOf(registry *Registry, prefix string) string {
	answer := httptest.NewRecorder()
	registry.Handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	var ours strings.Builder
	mine := false
	for line := range strings.Lines(answer.Body.String()) {
		if strings.HasPrefix(line, "# HELP ") {
			mine = strings.HasPrefix(line, "# HELP "+prefix)
		}
		if mine {
			ours.WriteString(line)
		}
	}
	return ours.String()
}

// golden compares with a file, or rewrites it with -update.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the series have changed; if that is meant, say so in CHANGELOG.md and run: go test ./metrics -run TestSeries -update\n%s should be:\n%s", file, got)
	}
}

// borrowed are series of Go's collectors that our dashboard shows.
var borrowed = []string{"process_resident_memory_bytes", "process_cpu_seconds_total", "go_memstats_heap_inuse_bytes"}

// The names and label names of all series are an interface: alerts and dashboards rely on them.
func TestSeriesNames(t *testing.T) {
	seen := map[string]bool{}
	for line := range strings.Lines(exposition(t)) {
		name, rest, labelled := strings.Cut(strings.Fields(line)[0], "{")
		if !strings.HasPrefix(name, "byokd_") && !slices.Contains(borrowed, name) {
			continue
		}
		var labels []string
		if labelled {
			labels = labelNames(rest)
		}
		seen[name+"{"+strings.Join(labels, ",")+"}"] = true
	}
	var names []string
	for n := range seen {
		names = append(names, n)
	}
	slices.Sort(names)
	golden(t, "testdata/series.txt", strings.Join(names, "\n")+"\n")
}

// labelNames are the names in a="x",b="y"}.
func labelNames(labels string) (names []string) {
	for pair := range strings.SplitSeq(strings.TrimSuffix(labels, "}"), ",") {
		names = append(names, pair[:strings.IndexByte(pair, '=')])
	}
	return names
}

// family is one metric as /metrics describes it.
type family struct {
	name, kind, help string
	labels           []string
}

func families(text string) (all []family) {
	for line := range strings.Lines(text) {
		words := strings.SplitN(strings.TrimSpace(line), " ", 4)
		switch {
		case strings.HasPrefix(line, "# HELP "):
			all = append(all, family{name: words[2], help: words[3]})
		case strings.HasPrefix(line, "# TYPE "):
			all[len(all)-1].kind = words[3]
		default:
			last := &all[len(all)-1]
			if _, labels, ok := strings.Cut(words[0], "{"); ok {
				for _, label := range labelNames(labels) {
					if label != "le" && !slices.Contains(last.labels, label) {
						last.labels = append(last.labels, label)
					}
				}
			}
		}
	}
	return all
}

// docs/METRICS.md is what /metrics says about itself, as a page.
func TestSeriesDocument(t *testing.T) {
	groups := []struct{ prefix, title, about string }{
		{"byokd_fs_", "Filesystem", "Absent where no volume is configured; the gauges are absent while nothing is mounted."},
		{"byokd_s3_", "S3 proxy", "Absent where no buckets are configured."},
		{"byokd_worker_", "Worker", "Absent without a keeper (`volume.keeper`)."},
		{"byokd_inject_", "Injector", "Of `byokd inject` alone, which has none of the above."},
		{"byokd_node_", "Node driver", "Of `byokd node` alone, which has none of the above."},
		{"byokd_build_info", "The program", "The collectors of the Go runtime (`go_*`) and of the process (`process_resident_memory_bytes`, `process_cpu_seconds_total`, `process_open_fds`, …) are there as well."},
		{"byokd_", "Keys and gate", "`guard` is the name of a key in the configuration. States are state sets: one series for each state, 1 for the present one."},
	}
	rows := make([]strings.Builder, len(groups))
	for _, f := range families(exposition(t)) {
		if !strings.HasPrefix(f.name, "byokd_") {
			continue
		}
		i := slices.IndexFunc(groups, func(g struct{ prefix, title, about string }) bool { return strings.HasPrefix(f.name, g.prefix) })
		labels := "–"
		if len(f.labels) > 0 {
			labels = "`" + strings.Join(f.labels, "`, `") + "`"
		}
		fmt.Fprintf(&rows[i], "| `%s` | %s | %s | %s |\n", f.name, f.kind, labels, strings.ReplaceAll(f.help, "|", "\\|"))
	}
	var page strings.Builder
	page.WriteString("# Metrics\n\nWritten by `go test ./metrics -run TestSeries -update` from what `/metrics` says; a test keeps it equal.\n\n" +
		"`/metrics` answers at all times, frozen too. Names and labels are an interface: alerts ([alerts/](alerts/)) and the dashboard\n" +
		"(`deploy/dashboards/byokd.json`) rely on them, and a change is told in the changelog. Labels come from fixed or configured\n" +
		"sets; a key's ARN stands in `byokd_key_info` only. Histograms have classic buckets and, for a Prometheus that scrapes native\n" +
		"histograms, native ones as well.\n")
	for n := range groups {
		i := (n + len(groups) - 1) % len(groups) // what is in no other group comes first
		if rows[i].Len() == 0 {
			t.Fatalf("no series under %s", groups[i].title)
		}
		fmt.Fprintf(&page, "\n## %s\n\n%s\n\n| series | kind | labels | what it says |\n|---|---|---|---|\n%s", groups[i].title, groups[i].about, rows[i].String())
	}
	golden(t, "../docs/METRICS.md", page.String())
}

// Prometheus' own linter has nothing to say.
func TestSeriesPleasePromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "promtool") {
			t.Fatalf("BYOKD_REQUIRE names promtool: %v", err)
		}
		t.Skip("promtool is not installed (Debian: prometheus)")
	}
	var ours strings.Builder
	mine := false
	for line := range strings.Lines(exposition(t)) {
		if strings.HasPrefix(line, "# HELP ") {
			mine = strings.HasPrefix(line, "# HELP byokd_")
		}
		if mine {
			ours.WriteString(line)
		}
	}
	check := exec.Command(promtool, "check", "metrics")
	check.Stdin = strings.NewReader(ours.String())
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// A Prometheus that knows native histograms gets them beside the classic buckets.
func TestHistogramsAreNativeToo(t *testing.T) {
	s := newSystem(t)
	s.fs.Done("read", 1, 3*time.Millisecond, 0)
	req, err := http.NewRequest(http.MethodGet, s.server.URL+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text")
	resp, err := s.server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, histogram, ok := strings.Cut(string(body), "byokd_fs_operation_duration_seconds")
	histogram, _, _ = strings.Cut(histogram, "\nname:")
	if !ok || !strings.Contains(histogram, "upper_bound:") || !strings.Contains(histogram, "positive_span") {
		t.Errorf("want classic and native buckets, got %s", histogram)
	}
}

func TestFrozenSecondsGrowDuringAFreeze(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := NewRegistry("v1", "guaranteed")
		observer := registry.NewGuards().Observer("primary")
		step := func(from, to keyguard.GateState) {
			observer.Transitioned(keyguard.Transition{From: from, To: to})
		}
		frozen := func() float64 {
			gathered, err := registry.prom.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range gathered {
				if f.GetName() == "byokd_frozen_seconds_total" {
					return f.GetMetric()[0].GetCounter().GetValue()
				}
			}
			t.Fatal("byokd_frozen_seconds_total is absent")
			return 0
		}
		for _, c := range []struct {
			from, to keyguard.GateState
			after    time.Duration
			want     float64
		}{
			{keyguard.Starting, keyguard.Open, 10 * time.Second, 0}, // waiting for the first opening is no freeze
			{keyguard.Open, keyguard.Degraded, time.Second, 0},
			{keyguard.Degraded, keyguard.Draining, time.Second, 1},
			{keyguard.Draining, keyguard.Frozen, 4 * time.Second, 5},
			{keyguard.Frozen, keyguard.Thawing, time.Second, 6},
			{keyguard.Thawing, keyguard.Frozen, time.Second, 7},
			{keyguard.Frozen, keyguard.Open, time.Hour, 7},
			{keyguard.Open, keyguard.Draining, time.Second, 8},
			{keyguard.Draining, keyguard.Stopping, time.Hour, 8},
		} {
			step(c.from, c.to)
			time.Sleep(c.after) // the bubble's clock
			if got := frozen(); got != c.want {
				t.Errorf("%v → %v and %v later: %v s frozen, want %v", c.from, c.to, c.after, got, c.want)
			}
		}
	})
}
