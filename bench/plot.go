//go:build linux

package main

import (
	"fmt"
	"html"
	"io"
	"slices"
	"strings"
)

// plot draws the curves of the scale part: a panel for each thing measured, a line
// for each peer, both axes linear from 0.
func (s scaled) plot(w io.Writer, m machine) error {
	const across, wide, high, gap, left, top = 2, 330, 150, 70, 70, 70
	var names []string
	for _, c := range s.Curves {
		if !slices.Contains(names, c.Name) {
			names = append(names, c.Name)
		}
	}
	var body strings.Builder
	for i, name := range names {
		x, y := left+i%across*(wide+gap), top+i/across*(high+gap)
		s.panel(&body, name, float64(x), float64(y), wide, high)
	}
	rows := (len(names) + across - 1) / across
	_, err := fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">
<style>.head{font-weight:bold;font-size:14px}.figure{font-size:11px;fill:#444}.axis{stroke:#999;fill:none}polyline{fill:none;stroke-width:1.6}</style>
<rect width="100%%" height="100%%" fill="white"/>
<text x="16" y="22" class="head">byokd at scale: what each costs as there is more of it (flat is right)</text>
<text x="16" y="40" class="figure">%s</text>
%s</svg>
`, left+across*(wide+gap), top+rows*(high+gap), html.EscapeString(m.String()), body.String())
	return err
}

// panel draws the curves of one name.
func (s scaled) panel(w io.Writer, name string, x, y, wide, high float64) {
	var most, furthest float64
	var unit, grows string
	for _, c := range s.Curves {
		if c.Name != name {
			continue
		}
		unit, grows = c.Unit, c.Across
		for _, p := range c.Points {
			most, furthest = max(most, p.Value), max(furthest, p.At)
		}
	}
	most *= 1.1
	fmt.Fprintf(w, `<text x="%.0f" y="%.0f" class="head">%s, %s</text>`+"\n", x, y-8, html.EscapeString(name), html.EscapeString(unit))
	fmt.Fprintf(w, `<path d="M%.0f %.0fV%.0fH%.0f" class="axis"/>`+"\n", x, y, y+high, x+wide)
	for _, part := range []float64{0.5, 1} {
		fmt.Fprintf(w, `<text x="%.0f" y="%.0f" class="figure" text-anchor="end">%s</text>`, x-6, y+high-part*high+4, figures(most*part))
		fmt.Fprintf(w, `<text x="%.0f" y="%.0f" class="figure" text-anchor="middle">%s</text>`+"\n", x+part*wide, y+high+15, figures(furthest*part))
	}
	fmt.Fprintf(w, `<text x="%.0f" y="%.0f" class="figure" text-anchor="middle">%s</text>`+"\n", x+wide/2, y+high+30, html.EscapeString(grows))
	label := x + wide
	for _, c := range slices.Backward(s.Curves) {
		if c.Name != name {
			continue
		}
		fmt.Fprintf(w, `<polyline stroke="%s" points="`, colourOf(c.Peer))
		for _, p := range c.Points {
			fmt.Fprintf(w, "%.1f,%.1f ", x+p.At/furthest*wide, y+high-p.Value/most*high)
		}
		fmt.Fprintf(w, `"/><text x="%.0f" y="%.0f" class="figure" text-anchor="end" style="fill:%s">%s</text>`+"\n", label, y-8, colourOf(c.Peer), html.EscapeString(c.Peer))
		label -= 50
	}
}
