package metrics

import (
	"fmt"
	"strconv"
	"time"

	g "maragu.dev/gomponents"
	h "maragu.dev/gomponents/html"

	"github.com/byokd/byokd/keyguard"
)

// The page is made of Go functions, whose texts and attributes are escaped as they are written. html/template would call
// methods by name, and with that the linker keeps every method of every type: 16 MB of program, 5 MiB resident.

// document renders the whole page. All of it is made here, so that it says the same with and without JavaScript; the
// script only exchanges what has changed and counts down.
func document(r Report) g.Node {
	title := "Encryption at rest · byokd"
	if r.State != StateReady {
		title = string(r.State) + " · " + title
	}
	erasure := "best effort"
	if r.Erasure == "guaranteed" {
		erasure = r.Erasure
	}
	return h.Doctype(h.HTML(h.Lang("en"),
		h.Head(
			h.Meta(h.Charset("utf-8")),
			h.Meta(h.Name("viewport"), h.Content("width=device-width, initial-scale=1")),
			h.Meta(h.Name("color-scheme"), h.Content("light dark")),
			h.TitleEl(g.Text(title)),
			h.Link(h.Rel("icon"), h.Href("data:,")),
			h.Link(h.Rel("stylesheet"), h.Href("/panel.css")),
			h.Script(h.Defer(), h.Src("/panel.js")),
			h.NoScript(h.Meta(g.Attr("http-equiv", "refresh"), h.Content("10"))),
		),
		h.Body(
			h.A(h.Class("skip"), h.Href("#panel"), g.Text("Skip to the state")),
			h.Header(
				h.H1(g.Text("Encryption at rest")),
				h.P(g.Text("Cluster "), h.Strong(g.Text(r.Cluster)), g.Text(" "), h.Span(h.ID("link"), h.Role("status"))),
			),
			h.Main(h.ID("panel"), h.TabIndex("-1"), panelMarkup(r)),
			h.Footer(
				h.P(g.Textf("byokd %s, key erasure %s · ", r.Version, erasure),
					h.A(h.Href("/v1/status"), g.Text("JSON")), g.Text(" · "), h.A(h.Href("/metrics"), g.Text("metrics")), g.Text(" "),
					h.NoScript(g.Text("· this page loads itself anew every 10 seconds"))),
			),
		),
	))
}

// panelMarkup renders what changes in the page.
func panelMarkup(r Report) g.Node {
	return g.Group{summaryMarkup(r), resourcesMarkup(r), keysMarkup(r), trafficMarkup(r.Traffic), historyMarkup(r)}
}

func summaryMarkup(r Report) g.Node {
	return h.Section(h.ID("summary"), h.Class("card "+string(r.State)), h.Role("status"), h.Aria("live", "polite"), h.Aria("atomic", "true"),
		badge(r.State, string(r.State)),
		h.H2(g.Text(r.Headline)),
		unless(r.Cause == "", func() g.Node { return h.P(g.Text(r.Cause)) }),
		unless(r.NextStep == "", func() g.Node { return stepMarkup(stepOf(r.NextStep)) }),
	)
}

func stepMarkup(s step) g.Node {
	return g.Group{
		h.P(h.Class("next"), h.Strong(g.Text("Next step:")), g.Text(" "+s.Text),
			unless(s.After == "", func() g.Node { return g.Text(" (" + s.After + ")") })),
		unless(s.Command == "", func() g.Node {
			return h.Div(h.Class("command"), h.Code(g.Text(s.Command)), h.Button(h.Type("button"), h.Class("copy"), g.Attr("hidden"), g.Text("Copy")))
		}),
	}
}

// section is a part of the page with a heading that names it.
func section(name, title string, children ...g.Node) g.Node {
	id := name + "-title"
	return h.Section(h.Aria("labelledby", id), h.H3(h.ID(id), g.Text(title)), g.Group(children))
}

func resourcesMarkup(r Report) g.Node {
	var items g.Node = h.Li(h.Class("card"), g.Text("None is configured."))
	if len(r.Resources) > 0 {
		items = g.Map(r.Resources, func(r ResourceReport) g.Node {
			return h.Li(h.Class("card "+string(r.State)),
				badge(r.State, string(r.State)),
				h.H4(g.Text(r.Name)),
				h.P(h.Class("where"), g.Text(r.Where)),
				unless(r.Note == "", func() g.Node { return h.P(g.Text(r.Note)) }),
				unless(r.Next == "", func() g.Node { return h.P(g.Text("Next step: " + r.Next)) }),
				h.Dl(fact("Key", g.Text(r.Key)), g.Map(r.Facts, func(f Fact) g.Node { return fact(f.Name, g.Text(f.Value)) })),
			)
		})
	}
	return section("resources", "Protected resources", h.Ul(h.Class("resources"), items))
}

func keysMarkup(r Report) g.Node {
	alone := len(r.Keys) == 1 // then the summary tells cause and next step
	return section("keys", "Keys",
		g.Map(r.Keys, func(k KeyReport) g.Node {
			state := stateOf(k.Gate, k.Key)
			return h.Article(h.Class("card "+string(state)), badge(state, k.Gate.String()), h.H4(g.Text(k.Name)), h.Dl(keyFacts(k, r.Time, alone)))
		}),
		unless(r.Role == "", func() g.Node { return h.P(g.Text("The key policy must allow the role "), h.Code(g.Text(r.Role))) }),
	)
}

func keyFacts(k KeyReport, now time.Time, alone bool) g.Node {
	return g.Group{
		fact("Key ARN", h.Code(g.Text(k.KeyARN))),
		fact("AWS KMS says", g.Text(k.Key.String()+because(k.Reason))),
		unless(k.Since.IsZero(), func() g.Node { return fact(k.Gate.String()+" since", moment(k.Since)) }),
		unless(k.DeletionDate.IsZero(), func() g.Node {
			return fact("Deletion", h.Strong(countdown(k.DeletionDate, now)), g.Text(", on "+stamp(k.DeletionDate)))
		}),
		unless(k.LastSuccess.IsZero(), func() g.Node {
			return fact("Last successful probe", h.Time(h.Data("ago", exact(k.LastSuccess)), h.DateTime(exact(k.LastSuccess)), g.Text(span(now.Sub(k.LastSuccess))+" ago")))
		}),
		unless(k.LeaseUntil.IsZero(), func() g.Node {
			if k.Gate == keyguard.Degraded {
				return fact("Lease", g.Text("ends "), countdown(k.LeaseUntil, now))
			}
			return fact("Lease", g.Text("would end "), countdown(k.LeaseUntil, now), g.Text(" if KMS fell silent now"))
		}),
		fact("Blocked operations", g.Text(strconv.FormatInt(k.Waiting, 10))),
		fact("Keys in memory", g.Text(keysInMemory(k))),
		fact("Freeze bound", g.Textf("%v s from a refusal to the last plain byte", k.BoundSeconds)),
		unless(k.Operator == nil, func() g.Node { return fact("On request", g.Text(onRequest(*k.Operator))) }),
		unless(k.MaterialEnds.IsZero(), func() g.Node {
			return fact("Key material ends", countdown(k.MaterialEnds, now), g.Text(", on "+stamp(k.MaterialEnds)))
		}),
		unless(!k.MultiRegion, func() g.Node {
			return fact("Multi-Region", g.Text("yes"), g.Map(k.Siblings, func(arn string) g.Node { return g.Group{g.Text(", "), h.Code(g.Text(arn))} }))
		}),
		unless(alone || k.Cause == "", func() g.Node { return fact("Cause", g.Text(k.Cause)) }),
		unless(alone || k.NextStep == "", func() g.Node { return fact("Next step", g.Text(k.NextStep)) }),
		unless(k.Warning == "", func() g.Node { return fact("Warning", g.Text(k.Warning)) }),
		unless(k.RequestID == "", func() g.Node { return fact("KMS request", h.Code(g.Text(k.RequestID))) }),
	}
}

func keysInMemory(k KeyReport) string {
	switch {
	case k.Erased:
		return "none"
	case k.Gate == keyguard.Open, k.Gate == keyguard.Degraded:
		return "in use"
	}
	return "being erased"
}

func onRequest(o OperatorReport) string {
	what := "frozen"
	if o.Pending != keyguard.NoIntent {
		what = o.Pending.String() + ", when the key is back"
	}
	return fmt.Sprintf("%s (%s, %s)", what, o.By, stamp(o.Since))
}

func trafficMarkup(t TrafficReport) g.Node {
	heads := []string{"Through", "Written", "Read", "Operations", "Mean latency"}
	row := func(name string, f TrafficFlow) g.Node {
		cells := []string{rate(f.InBytes), rate(f.OutBytes), fmt.Sprintf("%.1f/s", f.Operations), latency(f.Latency)}
		return h.Tr(h.Th(h.Scope("row"), g.Text(name)), g.Map(cells, func(text string) g.Node { return h.Td(g.Text(text)) }))
	}
	return section("traffic", "Traffic",
		h.Div(h.Class("scroll"), h.TabIndex("0"), h.Role("region"), h.Aria("labelledby", "traffic-title"), h.Table(
			h.THead(h.Tr(g.Map(heads, func(text string) g.Node { return h.Th(h.Scope("col"), g.Text(text)) }))),
			h.TBody(row("Disk", t.Disk), row("S3", t.Objects)),
		)))
}

func historyMarkup(r Report) g.Node {
	var events g.Node = h.Li(g.Text("Nothing yet."))
	if len(r.History) > 0 {
		events = g.Map(r.History, func(e Event) g.Node {
			return h.Li(moment(e.At), g.Textf(" %s: %v, key %v%s", e.Guard, e.Gate, e.Key, because(e.Reason)))
		})
	}
	return section("history", "Freezes and thaws", g.Map(timelines(r), timelineMarkup), h.Ol(h.Class("history"), h.TabIndex("0"), h.Aria("labelledby", "history-title"), events))
}

func timelineMarkup(t timeline) g.Node {
	return h.Figure(
		h.FigCaption(g.Text(t.Key+", since "), moment(t.From)),
		h.SVG(g.Attr("viewBox", fmt.Sprintf("0 0 %d 24", timelineUnits)), g.Attr("preserveAspectRatio", "none"), h.Aria("hidden", "true"),
			g.Map(t.Segments, func(s segment) g.Node {
				return g.El("rect", g.Attr("x", strconv.Itoa(s.X)), g.Attr("y", "0"), g.Attr("width", strconv.Itoa(s.Width)), g.Attr("height", "24"), h.Class(string(s.State)),
					g.El("title", g.Text(s.Gate.String()+because(s.Reason)+", "+stamp(s.Since))))
			})),
	)
}

func badge(state State, text string) g.Node {
	return h.P(h.Class("badge "+string(state)), g.Text(text))
}

// fact is a term of a list with what there is to say about it.
func fact(name string, value ...g.Node) g.Node {
	return g.Group{h.Dt(g.Text(name)), h.Dd(value...)}
}

// moment is a point in time, for people and for the script.
func moment(t time.Time) g.Node { return h.Time(h.DateTime(exact(t)), g.Text(stamp(t))) }

// countdown is how long it is until then, which the script goes on counting.
func countdown(t, now time.Time) g.Node {
	return h.Time(h.Data("until", exact(t)), h.DateTime(exact(t)), g.Text(until(t.Sub(now))))
}

// unless leaves out what is absent. It is a function, because a node is made before it is looked at.
func unless(absent bool, node func() g.Node) g.Node { return g.Iff(!absent, node) }

// because gives a reason in brackets, where there is one.
func because(r keyguard.Reason) string {
	if r == "" {
		return ""
	}
	return " (" + string(r) + ")"
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
func exact(t time.Time) string { return t.UTC().Format(time.RFC3339) }
