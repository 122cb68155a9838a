package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
)

const (
	// statusTimeout bounds one question: the daemon answers from memory, in milliseconds.
	statusTimeout = 5 * time.Second
	// streamSilence is how long --watch waits for a sign of life: the server sends one every 10 s.
	streamSilence = 25 * time.Second
	// maxReport bounds what is read of an answer: some 100 events of history are below 64 KiB.
	maxReport = 4 << 20
)

func newStatusCommand(environ []string) *cobra.Command {
	var admin, output string
	var watch bool
	cmd := &cobra.Command{
		Use: "status", Short: "Show the state of a running byokd, its cause and the next step", Args: cobra.NoArgs,
		Long: `Asks the admin listener of a running byokd. It answers while frozen, too.

Exit codes:
  0   ready
  1   failed: a resource does not serve for a reason other than its key
  10  frozen: reads and writes wait for the key
  11  waiting: not started yet, the key is not usable or was not asked yet
  12  degraded: serving, but KMS cannot be reached; frozen when the lease ends
  13  stopping
  14  final: frozen for good, the key is deleted
  20  no byokd answers at the address
  21  impaired: serving, but a resource is not well for a reason other than its key, such as a full disk
      or a bucket that S3 refuses to byokd
With --watch the code is that of the last state seen. Colours are for terminals; NO_COLOR=1 switches them off.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains(statusOutputs(), output) {
				return &exitError{exitUsage, fmt.Errorf("-o %s: say %s", output, strings.Join(statusOutputs(), ", "))}
			}
			out := cmd.OutOrStdout()
			ask := statusClient{url: adminURL(adminAddress(admin, environ)), format: output, out: out, colours: coloursFor(out, environ)}
			if watch {
				return ask.watch(cmd.Context())
			}
			return ask.once(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&admin, "admin", "", adminUsage)
	cmd.Flags().StringVarP(&output, "output", "o", outputTable, strings.Join(statusOutputs(), ", "))
	if err := cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(statusOutputs(), cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag was just made
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "keep watching: print one line (or one document) per change")
	return cmd
}

// outputYAML is for people who read configurations all day.
const outputYAML = "yaml"

func statusOutputs() []string { return []string{outputTable, outputJSON, outputYAML} }

func adminURL(address string) string {
	if strings.Contains(address, "://") {
		return strings.TrimSuffix(address, "/")
	}
	return "http://" + address
}

// statusClient asks one daemon.
type statusClient struct {
	url     string
	format  string // one of statusOutputs
	out     io.Writer
	colours colours
}

// document gives a report in the format asked for, from its JSON.
func (c statusClient) document(text []byte) ([]byte, error) {
	if c.format != outputYAML {
		return text, nil
	}
	return yaml.JSONToYAML(text)
}

func (c statusClient) noAnswer(err error) error {
	return &exitError{exitNoAnswer, fmt.Errorf("no byokd answers at %s: %w; is it running, and is that admin.listen of its configuration? (--admin ADDRESS)", c.url, err)}
}

// once prints the state and turns it into the exit code.
func (c statusClient) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	body, err := c.get(ctx, "/v1/status")
	if err != nil {
		return c.noAnswer(err)
	}
	defer body.Close()
	text, err := io.ReadAll(io.LimitReader(body, maxReport))
	if err != nil {
		return c.noAnswer(err)
	}
	var report metrics.Report
	if err := json.Unmarshal(text, &report); err != nil {
		return c.noAnswer(err)
	}
	if c.format == outputTable {
		err = writeReport(c.out, report, c.colours)
	} else if text, err = c.document(text); err == nil {
		_, err = c.out.Write(text)
	}
	if err != nil {
		return exitWith(exitFailure, err)
	}
	return codeOf(report.State)
}

// watch prints a line for each change until ctx or the daemon ends.
func (c statusClient) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	body, err := c.get(ctx, "/v1/events")
	if err != nil {
		return c.noAnswer(err)
	}
	defer body.Close()
	silence := time.AfterFunc(streamSilence, cancel)
	defer silence.Stop()
	last, lastShown := metrics.State(""), ""
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, maxReport)
	for lines.Scan() {
		silence.Reset(streamSilence)
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		var r metrics.Report
		if err := json.Unmarshal([]byte(data), &r); err != nil {
			return c.noAnswer(err)
		}
		last = r.State
		if id := identity(r); id == lastShown {
			continue // a heartbeat
		} else {
			lastShown = id
		}
		line, err := c.changed(r, data)
		if err == nil {
			_, err = fmt.Fprintln(c.out, line)
		}
		if err != nil {
			return exitWith(exitFailure, err)
		}
	}
	if last == "" {
		return c.noAnswer(errors.Join(lines.Err(), ctx.Err()))
	}
	if last != metrics.StateStopping { // killed, or out of reach
		return endedAfter(last, fmt.Errorf("the connection to byokd at %s has ended; the last state seen was %s", c.url, last))
	}
	return codeOf(last)
}

// changed is one change in the format asked for; data is its JSON.
func (c statusClient) changed(r metrics.Report, data string) (string, error) {
	switch c.format {
	case outputTable:
		return c.colours.in(dim, r.Time.Local().Format("15:04:05.000")) + "  " + change(r, c.colours), nil
	case outputYAML:
		document, err := c.document([]byte(data))
		return "---\n" + strings.TrimSuffix(string(document), "\n"), err
	}
	return data, nil
}

// identity is the same for two reports between which nothing changed that is worth a line; a countdown in
// the cause is not.
func identity(r metrics.Report) string {
	parts := []string{string(r.State), r.Headline}
	for _, k := range r.Keys {
		parts = append(parts, k.Name, k.Key.String(), k.Gate.String(), string(k.Reason))
		if k.Operator != nil {
			parts = append(parts, fmt.Sprint(k.Operator.Freeze, k.Operator.Pending))
		}
	}
	for _, x := range r.Resources {
		parts = append(parts, x.Name, string(x.State), x.Note)
	}
	return strings.Join(parts, "\x00")
}

// change is a report in one line; where something has come to rest that is not well, its cause and the next
// step follow, indented.
func change(r metrics.Report, c colours) string {
	var b strings.Builder
	var keys []string
	passing := false
	for _, k := range r.Keys {
		keys = append(keys, fmt.Sprintf("%s: key %s, gate %s", k.Name, k.Key, k.Gate))
		passing = passing || k.Gate == keyguard.Draining || k.Gate == keyguard.Thawing
	}
	fmt.Fprintf(&b, "%s %s (%s)", c.state(r.State, fmt.Sprintf("%-9s", strings.ToUpper(string(r.State)))), r.Headline, strings.Join(keys, "; "))
	if r.State == metrics.StateReady || passing {
		return b.String()
	}
	for _, line := range []string{r.Cause, prefixed("Next step: ", r.NextStep)} {
		if line != "" {
			b.WriteString("\n              " + line)
		}
	}
	return b.String()
}

func prefixed(prefix, text string) string {
	if text == "" {
		return ""
	}
	return prefix + text
}

func (c statusClient) get(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+path, nil)
	if err != nil {
		return nil, err
	}
	// A client of its own: proxies of the environment are for the outside, this is our own daemon.
	client := &http.Client{Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("it answers %s", resp.Status)
	}
	return resp.Body, nil
}

// codeOf turns a state into the exit code.
func codeOf(s metrics.State) error {
	codes := map[metrics.State]int{metrics.StateReady: exitOK, metrics.StateDegraded: exitDegraded, metrics.StateWaiting: exitWaiting,
		metrics.StateFrozen: exitFrozen, metrics.StateFinal: exitFinal, metrics.StateStopping: exitStopping,
		metrics.StateImpaired: exitImpaired}
	code, known := codes[s]
	switch {
	case !known:
		return &exitError{code: exitFailure}
	case code == exitOK:
		return nil
	}
	return &exitError{code: code}
}

// endedAfter keeps the exit code of a state and adds what is to be said.
func endedAfter(s metrics.State, why error) error {
	code := exitOK
	var coded *exitError
	if errors.As(codeOf(s), &coded) {
		code = coded.code
	}
	return &exitError{code, why}
}

// writeReport prints a report for people.
func writeReport(out io.Writer, r metrics.Report, c colours) error {
	var b strings.Builder
	b.WriteString(c.state(r.State, r.Headline) + "\n")
	if r.Cause != "" {
		b.WriteString(r.Cause + "\n")
	}
	if r.NextStep != "" {
		b.WriteString(c.in(bold, "Next step:") + " " + r.NextStep + "\n")
	}
	fmt.Fprintf(&b, "\nCluster %s, byokd %s, key erasure %s\n", r.Cluster, r.Version, r.Erasure)
	if r.Role != "" {
		b.WriteString("The key policy must allow " + r.Role + "\n")
	}
	b.WriteString("\n")
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "KEY\tSTATE\t%s\tSINCE\tARN\n", c.in(bold, "GATE")) // styled as the cells below, for the width
	for _, k := range r.Keys {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", k.Name, k.Key, c.gate(k.Gate), since(k.Since, r.Time), k.KeyARN)
	}
	for _, k := range r.Keys {
		for _, line := range notes(k, r.Time) {
			fmt.Fprintf(w, "  %s: %s\n", k.Name, line)
		}
	}
	fmt.Fprintf(w, "\nRESOURCE\t%s\tKEY\tWHERE\n", c.in(bold, "STATE"))
	for _, x := range r.Resources {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", x.Name, c.state(x.State, string(x.State)), x.Key, x.Where)
	}
	for _, x := range r.Resources { // below all rows, as a line without cells would end their alignment
		if x.Note != "" {
			fmt.Fprintf(w, "  %s: %s\n", x.Name, x.Note)
		}
		if x.Next != "" && x.Next != r.NextStep {
			fmt.Fprintf(w, "  %s: next step: %s\n", x.Name, x.Next)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	writeHistory(&b, r.History)
	_, err := io.WriteString(out, b.String())
	return err
}

// historyShown is how many of the latest changes are printed; the JSON has more, the audit file all.
const historyShown = 6

func writeHistory(b *strings.Builder, history []metrics.Event) {
	if len(history) < 2 {
		return // the start alone
	}
	b.WriteString("\nLATEST CHANGES\n")
	for _, e := range history[:min(historyShown, len(history))] {
		fmt.Fprintf(b, "%s  %s: gate %s, key %s", e.At.Local().Format("2006-01-02 15:04:05"), e.Guard, e.Gate, e.Key)
		if e.Reason != keyguard.ReasonNone {
			fmt.Fprintf(b, " (%s)", e.Reason)
		}
		b.WriteString("\n")
	}
}

// notes are the facts about a key that only matter in some states.
func notes(k metrics.KeyReport, now time.Time) []string {
	var lines []string
	if k.Gate == keyguard.Degraded && !k.LeaseUntil.IsZero() {
		lines = append(lines, "freezes in "+k.LeaseUntil.Sub(now).Round(time.Second).String()+" unless KMS answers")
	}
	if !k.DeletionDate.IsZero() {
		lines = append(lines, "KMS deletes the key, and the data with it, at "+k.DeletionDate.Format(time.RFC3339))
	}
	if o := k.Operator; o != nil && o.Pending != keyguard.NoIntent {
		lines = append(lines, fmt.Sprintf("a %s was asked for (%s, %s); it is carried out when the key is back", o.Pending, o.By, o.Since.Format(time.RFC3339)))
	} else if o != nil && o.Freeze {
		lines = append(lines, fmt.Sprintf("frozen on request (%s, %s), whatever the key's state", o.By, o.Since.Format(time.RFC3339)))
	}
	if !k.Gate.Admits() && !k.LastSuccess.IsZero() {
		lines = append(lines, "last successful probe "+since(k.LastSuccess, now)+" ago")
	}
	if k.Waiting == 1 {
		lines = append(lines, "1 operation waits")
	} else if k.Waiting > 1 {
		lines = append(lines, fmt.Sprintf("%d operations wait", k.Waiting))
	}
	if !k.Gate.Admits() && k.Erased {
		lines = append(lines, "no key is in memory")
	}
	if k.Warning != "" {
		lines = append(lines, "warning: "+k.Warning)
	}
	return lines
}

func since(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return now.Sub(t).Round(time.Second).String()
}
