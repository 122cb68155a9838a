//go:build linux

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// results of a section: rates, and the processor time (seconds) and the peak of the
// memory (MiB) of the peers' servers.
type results struct{ rates, cpu, peak samples }

func newResults() results { return results{samples{}, samples{}, samples{}} }

// samples holds a figure for each round, by load and peer.
type samples map[[2]string][]float64

func (r samples) add(load, peer string, rate float64) {
	key := [2]string{load, peer}
	r[key] = append(r[key], rate)
}

func (r samples) median(load, peer string) (float64, bool) {
	all := slices.Sorted(slices.Values(r[[2]string{load, peer}]))
	if len(all) == 0 {
		return 0, false
	}
	return (all[len(all)/2] + all[(len(all)-1)/2]) / 2, true
}

// most is the largest figure, 0 where there is none.
func (r samples) most(load, peer string) float64 {
	return slices.Max(append([]float64{0}, r[[2]string{load, peer}]...))
}

// spread is how far the rounds lie apart, in parts of the median.
func (r samples) spread(load, peer string) float64 {
	all := r[[2]string{load, peer}]
	m, ok := r.median(load, peer)
	if !ok || m == 0 {
		return 0
	}
	return (slices.Max(all) - slices.Min(all)) / m
}

// print writes the table: rates, and byokd's in parts of each other's. ▼ marks a
// ratio below its goal.
func (r results) print(w io.Writer, loads []load, peers []string) {
	header := append([]string{"load", "unit"}, peers...)
	others := slices.DeleteFunc(slices.Clone(peers), func(p string) bool { return p == subject })
	for _, p := range others {
		header = append(header, "÷ "+p)
	}
	rows := heading(append(header, "± "+subject))
	for _, l := range loads {
		ours, ok := r.rates.median(l.name, subject)
		if !ok {
			continue
		}
		row := []string{l.name, l.unit}
		for _, p := range peers {
			row = append(row, r.rate(l.name, p))
		}
		for _, p := range others {
			rate, _ := r.rates.median(l.name, p)
			row = append(row, ratio(ours, rate, l.goals[p]))
		}
		rows = append(rows, append(row, fmt.Sprintf("%.0f %%", 100*r.rates.spread(l.name, subject))))
	}
	table(w, rows)
	fmt.Fprintln(w, "\nRates: more is better. ÷ is byokd's rate in parts of the other's, ▼ below the goal; ± how far byokd's rounds lie apart.")
}

// rate is a peer's for a table.
func (r results) rate(load, peer string) string {
	rate, ok := r.rates.median(load, peer)
	if !ok {
		return "–"
	}
	return figures(rate)
}

// printUsage writes what the peers' servers took for a run: processor time, and the
// most memory that they had at any moment.
func (r results) printUsage(w io.Writer, loads []load, peers []string) {
	peers = slices.DeleteFunc(slices.Clone(peers), func(p string) bool {
		return !slices.ContainsFunc(loads, func(l load) bool { return r.peak.most(l.name, p) > 0 })
	})
	header := []string{"load"}
	for _, p := range peers {
		header = append(header, p+", CPU s", p+", MiB")
	}
	rows := heading(header)
	for _, l := range loads {
		if _, ok := r.rates.median(l.name, subject); !ok {
			continue
		}
		row := []string{l.name}
		for _, p := range peers {
			cpu, ok := r.cpu.median(l.name, p)
			if !ok {
				row = append(row, "–", "–")
				continue
			}
			row = append(row, fmt.Sprintf("%.2f", cpu), fmt.Sprintf("%.0f", r.peak.most(l.name, p)))
		}
		rows = append(rows, row)
	}
	fmt.Fprint(w, "\nWhat the servers took for a run: processor time, and the peak of their resident memory\n\n")
	table(w, rows)
}

// heading begins a table.
func heading(header []string) [][]string {
	rows := [][]string{header, nil}
	for range header {
		rows[1] = append(rows[1], "---")
	}
	return rows
}

func table(w io.Writer, rows [][]string) {
	for _, row := range rows {
		fmt.Fprintln(w, "|", strings.Join(row, " | "), "|")
	}
}

func figures(rate float64) string {
	switch {
	case rate >= 10_000:
		return fmt.Sprintf("%.1f k", rate/1000)
	case rate >= 100:
		return fmt.Sprintf("%.0f", rate)
	}
	return fmt.Sprintf("%.1f", rate)
}

func ratio(ours, other, goal float64) string {
	if other == 0 {
		return "–"
	}
	text := fmt.Sprintf("%.2f", ours/other)
	if goal > 0 && ours/other < goal {
		text += fmt.Sprintf(" ▼ %.2f", goal)
	}
	return text
}
