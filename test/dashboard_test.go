package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

type dashboard struct {
	UID        string `json:"uid"`
	Title      string `json:"title"`
	Templating struct {
		List []struct {
			Name       string           `json:"name"`
			Type       string           `json:"type"`
			Datasource *datasource      `json:"datasource"`
			Query      *json.RawMessage `json:"query"`
			Definition string           `json:"definition"`
		} `json:"list"`
	} `json:"templating"`
	Panels []dashboardPanel `json:"panels"`
}

type datasource struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

type dashboardPanel struct {
	ID          int         `json:"id"`
	Type        string      `json:"type"`
	Title       string      `json:"title"`
	Description string      `json:"description"`
	Datasource  *datasource `json:"datasource"`
	Grid        struct{ H, W, X, Y int }
	FieldConfig struct {
		Defaults struct {
			Unit string `json:"unit"`
		} `json:"defaults"`
	} `json:"fieldConfig"`
	Targets []struct {
		RefID      string      `json:"refId"`
		Datasource *datasource `json:"datasource"`
		Expr       string      `json:"expr"`
		Legend     string      `json:"legendFormat"`
	} `json:"targets"`
}

func (p *dashboardPanel) UnmarshalJSON(text []byte) error {
	type plain dashboardPanel
	var grid struct {
		At struct{ H, W, X, Y int } `json:"gridPos"`
	}
	if err := json.Unmarshal(text, (*plain)(p)); err != nil {
		return err
	}
	err := json.Unmarshal(text, &grid)
	p.Grid = grid.At
	return err
}

func readDashboard(t *testing.T) dashboard {
	t.Helper()
	text, err := os.ReadFile("../deploy/dashboards/byokd.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	if d.UID == "" || d.Title == "" || len(d.Panels) < 10 {
		t.Fatalf("uid %q, title %q, %d panels: the file is not read as it should", d.UID, d.Title, len(d.Panels))
	}
	return d
}

// The rules that Grafana's own linter has, and ours: what a panel shows, in which unit, chosen by the variables.
func TestDashboardPanels(t *testing.T) {
	known := series(t)
	ids := map[int]bool{}
	timelines := 0
	for _, p := range readDashboard(t).Panels {
		if ids[p.ID] {
			t.Errorf("%s: two panels have the id %d", p.Title, p.ID)
		}
		ids[p.ID] = true
		if p.Title == "" {
			t.Errorf("panel %d has no title", p.ID)
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || p.FieldConfig.Defaults.Unit == "" {
			t.Errorf("%s: description %q, unit %q", p.Title, p.Description, p.FieldConfig.Defaults.Unit)
		}
		if len(p.Targets) == 0 {
			t.Errorf("%s asks nothing", p.Title)
		}
		checkDatasource(t, p.Title, p.Datasource)
		for _, target := range p.Targets {
			checkDatasource(t, p.Title, target.Datasource)
			if target.Legend == "" || target.RefID == "" {
				t.Errorf("%s: a query without legend or id: %s", p.Title, target.Expr)
			}
			checkDashboardQuery(t, p, target.Expr, known)
			states := strings.Contains(target.Expr, "byokd_gate_state") || strings.Contains(target.Expr, "byokd_key_state")
			if states && p.Type != "stat" {
				timelines++
				if p.Type != "state-timeline" {
					t.Errorf("%s: a state is shown as a state timeline, not as a %s", p.Title, p.Type)
				}
			}
		}
	}
	if timelines < 2 {
		t.Errorf("%d state timelines, want one for the gate and one for the key", timelines)
	}
}

func checkDatasource(t *testing.T, where string, d *datasource) {
	t.Helper()
	if d == nil || *d != (datasource{"prometheus", "${datasource}"}) {
		t.Errorf("%s: the data source is the variable, not %+v", where, d)
	}
}

func checkDashboardQuery(t *testing.T, p dashboardPanel, expr string, known map[string][]string) {
	t.Helper()
	checkQuery(t, p.Title, expr, known)
	for _, m := range selector.FindAllStringSubmatch(expr, -1) {
		if strings.HasPrefix(m[1], "byokd_inject_") || strings.HasPrefix(m[1], "byokd_node_") {
			continue // of the whole cluster: these programs run in a namespace of their own, and serve pods in all
		}
		if m[1] != "byokd_build_info" && !(strings.Contains(m[2], `namespace=~"$namespace"`) && strings.Contains(m[2], `pod=~"$pod"`)) {
			t.Errorf("%s: %s does not follow the variables namespace and pod", p.Title, m[0])
		}
	}
	for _, function := range []string{"rate(", "increase("} {
		for _, part := range strings.Split(expr, function)[1:] {
			if window, _, _ := strings.Cut(part[strings.IndexByte(part, '[')+1:], "]"); window != "$__rate_interval" {
				t.Errorf("%s: %s over %s, not over $__rate_interval", p.Title, function, window)
			}
		}
	}
	counter := selector.FindStringSubmatch(expr)
	if counter != nil && (strings.HasSuffix(counter[1], "_total") || strings.HasSuffix(counter[1], "_bucket") || strings.HasSuffix(counter[1], "_count")) &&
		!strings.Contains(expr, "rate(") && !strings.Contains(expr, "increase(") {
		t.Errorf("%s: the counter %s is shown raw", p.Title, counter[1])
	}
}

func TestDashboardVariables(t *testing.T) {
	d := readDashboard(t)
	var names []string
	for _, v := range d.Templating.List {
		names = append(names, v.Name)
		if v.Type == "query" {
			checkDatasource(t, v.Name, v.Datasource)
			checkQuery(t, v.Name, v.Definition, series(t))
		}
	}
	if want := []string{"datasource", "namespace", "pod"}; !slices.Equal(names, want) {
		t.Errorf("variables %v, want %v", names, want)
	}
}

func TestDashboardPanelsDoNotOverlap(t *testing.T) {
	taken := map[[2]int]string{}
	for _, p := range readDashboard(t).Panels {
		g := p.Grid
		if g.W <= 0 || g.H <= 0 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("%s: at %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("%s lies over %s", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
}

// Every series is either on the dashboard or named here with a reason.
func TestDashboardShowsEverySeries(t *testing.T) {
	elsewhere := map[string]string{
		"byokd_key_info": "an ARN is no graph", "byokd_thaws_total": "as many as freezes", "byokd_gate_state_since_timestamp_seconds": "the timeline shows it",
		"byokd_keys_erased": "ByokdKeysNotErased", "byokd_operator_freeze": "ByokdFrozenOnRequest", "byokd_operator_pending": "byokd status",
		"byokd_key_material_expiry_timestamp_seconds": "ByokdKeyMaterialExpires", "byokd_fs_parked_calls": "part of byokd_gate_waiting",
		"byokd_fs_writeback_cache": "a setting", "byokd_fs_undrained_files_total": "ByokdUndrainedFiles", "byokd_s3_held_seconds_total": "byokd_s3_held_requests",
	}
	shown := map[string]bool{}
	for _, p := range readDashboard(t).Panels {
		for _, target := range p.Targets {
			for _, m := range selector.FindAllStringSubmatch(target.Expr, -1) {
				shown[m[1]] = true
			}
		}
	}
	family := func(name string) string {
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			name = strings.TrimSuffix(name, suffix)
		}
		return name
	}
	for name := range series(t) {
		f := family(name)
		if !shown[name] && !shown[f+"_bucket"] && !shown[f+"_count"] && elsewhere[name] == "" {
			t.Errorf("%s is on no panel", name)
		}
	}
	for name := range elsewhere {
		if _, ok := series(t)[name]; !ok || shown[name] {
			t.Errorf("%s is excused from the dashboard, but shown or gone", name)
		}
	}
}

// Prometheus can read every query.
func TestDashboardQueriesParse(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		if slices.Contains(strings.Split(os.Getenv("BYOKD_REQUIRE"), ","), "promtool") {
			t.Fatalf("BYOKD_REQUIRE names promtool: %v", err)
		}
		t.Skip("promtool is not installed (Debian: prometheus)")
	}
	type rule struct {
		Record string `yaml:"record"`
		Expr   string `yaml:"expr"`
	}
	var rules []rule
	filled := strings.NewReplacer("$__rate_interval", "5m", "$namespace", ".*", "$pod", ".*")
	for _, p := range readDashboard(t).Panels {
		for _, target := range p.Targets {
			rules = append(rules, rule{fmt.Sprintf("panel:%d_%s", p.ID, target.RefID), filled.Replace(target.Expr)})
		}
	}
	text, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "dashboard", "rules": rules}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "dashboard.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(promtool, "check", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool check rules: %v\n%s", err, out)
	}
}
