package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/keyguard"
)

const (
	alertRules = "../deploy/alerts/byokd.rules.yaml"
	alertTests = "../deploy/alerts/byokd.rules.test.yaml"
	alertsK8s  = "../deploy/alerts/byokd.prometheusrule.yaml"
	runbooks   = "https://github.com/byokd/byokd/blob/main/docs/alerts/"
)

type alertRule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func readAlertRules(t *testing.T) (all []alertRule) {
	t.Helper()
	text, err := os.ReadFile(alertRules)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Rules []alertRule `yaml:"rules"`
		} `yaml:"groups"`
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) < 10 {
		t.Fatalf("found %d rules only: the file is not read as it should", len(all))
	}
	return all
}

// TestPrometheusRule: what the Prometheus operator is given is what the rules' file
// says.
func TestPrometheusRule(t *testing.T) {
	read := func(name string) (doc map[string]any) {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		return doc
	}
	rules, object := read(alertRules), read(alertsK8s)
	if object["apiVersion"] != "monitoring.coreos.com/v1" || object["kind"] != "PrometheusRule" {
		t.Errorf("a %v of %v", object["kind"], object["apiVersion"])
	}
	if spec, ok := object["spec"]; !ok || !reflect.DeepEqual(spec, any(rules)) {
		t.Errorf("spec of %s differs from %s", alertsK8s, alertRules)
	}
}

// series are the names and labels that byokd exports, by name.
func series(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../metrics/testdata/series.txt")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		name, labels, _ := strings.Cut(strings.TrimSuffix(strings.TrimSpace(line), "}"), "{")
		all[name] = strings.Split(labels, ",")
	}
	return all
}

var (
	selector = regexp.MustCompile(`\b((?:byokd|process|go)_[a-z0-9_]+)(\{[^}]*\})?`)
	matcher  = regexp.MustCompile(`([a-z_]+)(=~|!~|!=|=)"([^"]*)"`)
)

// checkQuery tells what an expression selects that byokd does not export: series, labels, states.
func checkQuery(t *testing.T, where, expr string, known map[string][]string) {
	t.Helper()
	states := map[string][]string{}
	states["byokd_node_mounts"] = []string{"served", "waiting"}
	for _, s := range keyguard.GateStates() {
		states["byokd_gate_state"] = append(states["byokd_gate_state"], snake(s.String()))
	}
	for _, s := range keyguard.KeyStates() {
		states["byokd_key_state"] = append(states["byokd_key_state"], snake(s.String()))
	}
	states["byokd_probes_total"] = states["byokd_key_state"]
	for _, s := range fs.LowerStates() {
		states["byokd_fs_lower_state"] = append(states["byokd_fs_lower_state"], s.String())
	}
	for _, m := range selector.FindAllStringSubmatch(expr, -1) {
		labels, ok := known[m[1]]
		if !ok {
			t.Errorf("%s: byokd exports no series %s", where, m[1])
			continue
		}
		for _, l := range matcher.FindAllStringSubmatch(m[2], -1) {
			target := slices.Contains([]string{"namespace", "pod", "job", "instance"}, l[1]) // given by Prometheus
			if !target && !slices.Contains(labels, l[1]) {
				t.Errorf("%s: %s has no label %s", where, m[1], l[1])
			}
			if l[1] == "state" && (l[2] == "=" || l[2] == "!=") && !slices.Contains(states[m[1]], l[3]) {
				t.Errorf("%s: %s has no state %q", where, m[1], l[3])
			}
		}
	}
}

var capital = regexp.MustCompile(`([a-z])([A-Z])`)

func snake(name string) string {
	return strings.ToLower(capital.ReplaceAllString(name, "${1}_$2"))
}

func TestAlertRules(t *testing.T) {
	known := series(t)
	seen := map[string]bool{}
	for _, rule := range readAlertRules(t) {
		if !regexp.MustCompile(`^Byokd[A-Z][A-Za-z]+$`).MatchString(rule.Alert) || seen[rule.Alert] {
			t.Errorf("%q: alerts have names of their own, ByokdSomething", rule.Alert)
		}
		seen[rule.Alert] = true
		if !selector.MatchString(rule.Expr) && !strings.Contains(rule.Expr, "up{job=") {
			t.Errorf("%s: no series of byokd in %q", rule.Alert, rule.Expr)
		}
		checkQuery(t, rule.Alert, rule.Expr, known)
		if !slices.Contains([]string{"critical", "warning", "info"}, rule.Labels["severity"]) {
			t.Errorf("%s: severity %q", rule.Alert, rule.Labels["severity"])
		}
		for _, annotation := range []string{"summary", "description"} {
			if rule.Annotations[annotation] == "" {
				t.Errorf("%s has no %s", rule.Alert, annotation)
			}
		}
		if url := rule.Annotations["runbook_url"]; url != runbooks+rule.Alert+".md" {
			t.Errorf("%s: runbook_url %q", rule.Alert, url)
		}
		page, err := os.ReadFile("../docs/alerts/" + rule.Alert + ".md")
		if err != nil {
			t.Errorf("%s has no page: %v", rule.Alert, err)
			continue
		}
		for _, part := range []string{"# " + rule.Alert + "\n", "\n**" + rule.Labels["severity"] + "**: ", "\n## Meaning\n", "\n## Diagnosis\n", "\n## What to do\n"} {
			if !strings.Contains(string(page), part) {
				t.Errorf("docs/alerts/%s.md lacks %q", rule.Alert, strings.TrimSpace(part))
			}
		}
		for _, name := range selector.FindAllString(string(page), -1) {
			if _, histogram := known[name+"_bucket"]; !histogram { // a page may name the family
				checkQuery(t, "docs/alerts/"+rule.Alert+".md", name, known)
			}
		}
	}
	pages, err := filepath.Glob("../docs/alerts/Byokd*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		if name := strings.TrimSuffix(filepath.Base(page), ".md"); !seen[name] {
			t.Errorf("%s is the page of no alert", page)
		}
	}
	index, err := os.ReadFile("../docs/alerts/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for name := range seen {
		if !strings.Contains(string(index), "| ["+name+"]("+name+".md) |") {
			t.Errorf("docs/alerts/README.md does not list %s", name)
		}
	}
}

// Every alert has been seen firing and been seen silent.
func TestAlertsFire(t *testing.T) {
	text, err := os.ReadFile(alertTests)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Tests []struct {
			Cases []struct {
				Alert    string `yaml:"alertname"`
				Expected []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		} `yaml:"tests"`
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, one := range file.Tests {
		for _, c := range one.Cases {
			if len(c.Expected) > 0 {
				fires[c.Alert] = true
			} else {
				silent[c.Alert] = true
			}
		}
	}
	for _, rule := range readAlertRules(t) {
		if !fires[rule.Alert] || !silent[rule.Alert] {
			t.Errorf("%s: firing tested: %v, silence tested: %v", rule.Alert, fires[rule.Alert], silent[rule.Alert])
		}
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "promtool") {
			t.Fatalf("BYOKD_REQUIRE names promtool: %v", err)
		}
		t.Skip("promtool is not installed (Debian: prometheus)")
	}
	for _, args := range [][]string{{"check", "rules", alertRules}, {"test", "rules", alertTests}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}
