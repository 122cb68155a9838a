package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
)

// The words are explained for every state there is.
func TestExplainKnowsEveryState(t *testing.T) {
	words := map[string]string{} // word → what must be said
	for _, s := range metrics.States() {
		words[string(s)] = string(s) + ": "
	}
	for _, k := range keyguard.KeyStates() {
		words[k.String()] = k.String()
		words[strings.ToUpper(k.String())] = k.String()
	}
	for _, s := range fs.LowerStates() {
		words[s.String()] = s.String() + ": a state of the lower directory"
	}
	words["pending_deletion"] = "cancel-key-deletion"
	words["access-denied"] = "put-key-policy"
	for word, want := range words {
		var out, stderr strings.Builder
		if code := run(context.Background(), []string{"explain", word}, nil, &out, &stderr); code != exitOK || !strings.Contains(out.String(), want) {
			t.Errorf("explain %s: exit code %d, %s%s", word, code, out.String(), stderr.String())
		}
	}
	for _, k := range keyguard.KeyStates() {
		if !slices.ContainsFunc(keySituations(), func(s keySituation) bool { return s.key == k }) {
			t.Errorf("%v is not among the situations", k)
		}
	}
}

func TestExplainFillsInTheKey(t *testing.T) {
	const arn = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	var out strings.Builder
	run(context.Background(), []string{"explain", "disabled", "--key", arn}, nil, &out, &out)
	if want := "aws kms enable-key --key-id " + arn + " --region eu-west-1"; !strings.Contains(out.String(), want) {
		t.Errorf("%q is not in %s", want, out.String())
	}
	if code := run(context.Background(), []string{"explain", "sleepy"}, nil, &out, &out); code != exitUsage {
		t.Errorf("explained a state that does not exist: %d", code)
	}
	out.Reset()
	run(context.Background(), []string{"explain"}, nil, &out, &out)
	if got := strings.Fields(out.String()); !slices.Equal(got, explainWords()) {
		t.Errorf("lists %v", got)
	}
}

const (
	statesBegin   = "<!-- states: written by go test ./cmd/byokd -run TestMessagesAreDocumented -update -->\n"
	lowerBegin    = "<!-- lower: written by go test ./cmd/byokd -run TestMessagesAreDocumented -update -->\n"
	messagesBegin = "<!-- messages: written by go test ./cmd/byokd -run TestMessagesAreDocumented -update -->\n"
	tableEnd      = "<!-- end -->\n"
)

// docs/OPERATIONS.md has the words that byokd says, letter by letter.
func TestMessagesAreDocumented(t *testing.T) {
	const file = "../../docs/OPERATIONS.md"
	page, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var states, messages, lower strings.Builder
	states.WriteString("| what you see | meaning | reads and writes | by itself? |\n|---|---|---|---|\n")
	for _, m := range stateMeanings() {
		fmt.Fprintf(&states, "| `%s` | %s | %s | %s |\n", m.state, m.meaning, m.access, m.byItself)
	}
	messages.WriteString("| key state, reason | first line: External encryption key | cause | next step |\n|---|---|---|---|\n")
	for _, k := range keySituations() {
		s := k.status("KEY_ARN")
		fmt.Fprintf(&messages, "| `%s` | %s | %s | %s |\n", strings.ReplaceAll(k.name(), ", ", "` `"),
			strings.TrimPrefix(s.Headline(), "External encryption key "), s.Cause(), s.NextStep())
	}
	lower.WriteString("| state | of byokd | cause | next step |\n|---|---|---|---|\n")
	for _, s := range fs.LowerStates() {
		cause, nextStep := lowerMessage(fs.LowerHealth{State: s, Err: unix.EIO}, "LOWER")
		fmt.Fprintf(&lower, "| `%s` | `%s` | %s | %s |\n", s, stateOfLower(s), cause, nextStep)
		if (s != fs.LowerWell) != (cause != "" && nextStep != "") {
			t.Errorf("%v has the cause %q and the next step %q", s, cause, nextStep)
		}
	}
	got := string(page)
	for begin, table := range map[string]string{statesBegin: states.String(), messagesBegin: messages.String(), lowerBegin: lower.String()} {
		before, rest, ok := strings.Cut(got, begin)
		_, after, closed := strings.Cut(rest, tableEnd)
		if !ok || !closed {
			t.Fatalf("%s has no %s", file, begin)
		}
		got = before + begin + table + tableEnd + after
	}
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != string(page) {
		t.Errorf("the words have changed; run: go test ./cmd/byokd -run TestMessagesAreDocumented -update")
	}
}
