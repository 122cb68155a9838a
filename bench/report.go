//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
)

// report is what a run has found, for programs: `-json FILE`. Rates are per
// second in the load's unit, CPU is the seconds of processor time that the
// peer's server took for a run, medians over the rounds; its memory is the most of
// any round.
type report struct {
	Machine  machine   `json:"machine"`
	Rounds   int       `json:"rounds"`
	Sections []section `json:"sections,omitempty"`
	Gate     *gateCost `json:"gate,omitempty"`
	Freeze   []span    `json:"freeze,omitempty"`
	Scale    *scaled   `json:"scale,omitempty"`
}

// section adds what was measured of one, also of one that was interrupted.
func (r *report) section(s section, err error) error {
	if len(s.Loads) > 0 {
		r.Sections = append(r.Sections, s)
	}
	return err
}

type section struct {
	Name  string      `json:"name"`
	Loads []loadRates `json:"loads"`
}

type loadRates struct {
	Name  string                `json:"name"`
	Unit  string                `json:"unit"`
	Peers map[string]peerRates  `json:"peers"`
	Ratio map[string]ratioToOne `json:"ratios"` // byokd's rate in parts of the peer's
}

type peerRates struct {
	Median  float64   `json:"median"`
	Samples []float64 `json:"samples"`
	CPU     float64   `json:"cpuSeconds,omitempty"`
	Peak    float64   `json:"peakMiB,omitempty"` // of the server's resident memory
}

type ratioToOne struct {
	Ratio float64 `json:"ratio"`
	Goal  float64 `json:"goal,omitempty"`
}

// logBase20 is 1 for 20 and -1 for 1/20, and no more or less than that.
func logBase20(x float64) float64 { return max(-1, min(1, math.Log(x)/math.Log(20))) }

// section makes a section of the report of what was measured.
func (r results) section(name string, loads []load, peers []string) section {
	s := section{Name: name}
	for _, l := range loads {
		ours, ok := r.rates.median(l.name, subject)
		if !ok {
			continue
		}
		row := loadRates{Name: l.name, Unit: l.unit, Peers: map[string]peerRates{}, Ratio: map[string]ratioToOne{}}
		for _, p := range peers {
			rate, ok := r.rates.median(l.name, p)
			if !ok {
				continue
			}
			cpu, _ := r.cpu.median(l.name, p)
			row.Peers[p] = peerRates{Median: rate, Samples: r.rates[[2]string{l.name, p}], CPU: cpu, Peak: r.peak.most(l.name, p)}
			if p != subject && rate > 0 {
				row.Ratio[p] = ratioToOne{Ratio: ours / rate, Goal: l.goals[p]}
			}
		}
		s.Loads = append(s.Loads, row)
	}
	return s
}

// write writes the report as JSON and as pictures, where files are named.
func (r report) write(o options) error {
	if o.json != "" {
		text, err := json.MarshalIndent(r, "", " ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(o.json, append(text, '\n'), 0o644); err != nil {
			return err
		}
	}
	if o.plot != "" && r.Scale != nil {
		if err := draw(o.plot, func(w io.Writer) error { return r.Scale.plot(w, r.Machine) }); err != nil {
			return err
		}
	}
	if o.svg == "" || len(r.Sections) == 0 {
		return nil
	}
	return draw(o.svg, r.chart)
}

func draw(file string, picture func(io.Writer) error) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(picture(f), f.Close())
}

// colourOf a peer, the same in all pictures.
func colourOf(peer string) string {
	switch peer {
	case "raw", s3Direct:
		return "#7a869a"
	case subject:
		return "#1c8a4d"
	case "loopback":
		return "#2f6fde"
	case "encfs":
		return "#8e44ad"
	case "cryfs":
		return "#c0392b"
	case "rclone":
		return "#b59b00"
	}
	return "#d9822b"
}

// chart draws one bar for each load and peer: byokd's rate in parts of the
// peer's, on a logarithmic scale from 1/20 to 20, with a tick at the goal.
func (r report) chart(w io.Writer) error {
	const left, width, bar, gap, top = 300, 520, 13, 12, 64
	at := func(ratio float64) float64 { return left + width*(0.5+0.5*logBase20(ratio)) }
	var body strings.Builder
	y := top
	for _, s := range r.Sections {
		fmt.Fprintf(&body, `<text x="16" y="%d" class="head">%s</text>`+"\n", y+4, html.EscapeString(s.Name))
		y += 18
		for _, l := range s.Loads {
			fmt.Fprintf(&body, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", left-10, y+bar, html.EscapeString(l.Name))
			for _, p := range slices.Sorted(maps.Keys(l.Ratio)) {
				q := l.Ratio[p]
				from, to := at(1), at(q.Ratio)
				fmt.Fprintf(&body, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`, min(from, to), y, max(from, to)-min(from, to)+0.5, bar-2, colourOf(p))
				fmt.Fprintf(&body, `<text x="%d" y="%d" class="figure">%.2f × %s</text>`, left+width+10, y+bar-3, q.Ratio, html.EscapeString(p))
				if q.Goal > 0 {
					fmt.Fprintf(&body, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" class="goal"/>`, at(q.Goal), at(q.Goal), y-1, y+bar-1)
				}
				body.WriteString("\n")
				y += bar
			}
			y += gap
		}
	}
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">
<style>.head{font-weight:bold;font-size:14px}.figure{font-size:11px;fill:#444}.goal{stroke:#c0392b;stroke-width:2}.axis{stroke:#bbb}</style>
<rect width="100%%" height="100%%" fill="white"/>
<text x="16" y="22" class="head">byokd's rate in parts of its peers' (1 is equal, right is faster, red: the goal)</text>
<text x="16" y="40" class="figure">%s</text>
`, left+width+150, y+20, html.EscapeString(r.Machine.String()))
	for _, ratio := range []float64{0.1, 0.25, 0.5, 1, 2, 4, 10} {
		fmt.Fprintf(w, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" class="axis"/><text x="%.1f" y="%d" class="figure" text-anchor="middle">%g</text>`+"\n",
			at(ratio), at(ratio), top-8, y, at(ratio), y+14, ratio)
	}
	_, err := fmt.Fprintf(w, "%s</svg>\n", body.String())
	return err
}
