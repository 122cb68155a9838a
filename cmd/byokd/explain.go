package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
)

// stateMeaning is what a state in one word means, as `byokd explain` and docs/OPERATIONS.md tell it.
type stateMeaning struct {
	state                       metrics.State
	meaning, access, byItself   string
	causes                      []keyguard.KeyState // the key states that lead to it
	anotherCause, anotherRemedy string
}

func stateMeanings() []stateMeaning {
	return []stateMeaning{
		{state: metrics.StateReady, meaning: "the key is usable", access: "served", byItself: "–", causes: []keyguard.KeyState{keyguard.Enabled}},
		{state: metrics.StateImpaired, meaning: "the key is usable; a resource is not well", access: "served, but for what the text says", byItself: "when what the text says is mended",
			anotherCause: "The disk of a volume is full, its path leads elsewhere, or calls on it fail now and then; or the S3 below a bucket refuses byokd or cannot be reached.", anotherRemedy: "byokd status and the log tell what"},
		{state: metrics.StateDegraded, meaning: "KMS cannot be reached; the lease runs", access: "served until the lease ends",
			byItself: "yes, when KMS answers", causes: []keyguard.KeyState{keyguard.Unreachable}},
		{state: metrics.StateWaiting, meaning: "not started: the key was not usable yet", access: "not mounted; S3 answers 503 SlowDown after `holdFor`",
			byItself: "yes", causes: []keyguard.KeyState{keyguard.Unknown, keyguard.Disabled, keyguard.PendingDeletion, keyguard.AccessDenied, keyguard.Unavailable, keyguard.Unreachable}},
		{state: metrics.StateFrozen, meaning: "the key is refused, or the lease has ended", access: "hang; S3 answers 503 SlowDown after `holdFor`", byItself: "yes, when the key is back",
			causes:       []keyguard.KeyState{keyguard.Disabled, keyguard.PendingDeletion, keyguard.AccessDenied, keyguard.Unavailable, keyguard.Unreachable},
			anotherCause: "An operator has asked for it (byokd freeze).", anotherRemedy: "byokd thaw"},
		{state: metrics.StateFinal, meaning: "the key is deleted", access: "hang for good", byItself: "no", causes: []keyguard.KeyState{keyguard.Deleted}},
		{state: metrics.StateFailed, meaning: "a resource does not serve for another reason", access: "see the text", byItself: "see the text",
			anotherCause: "Something other than the key: a disk that is read-only, gone or does not answer, or a mount that somebody else has ended.", anotherRemedy: "byokd status and the log tell what"},
		{state: metrics.StateStopping, meaning: "a stop was asked for", access: "end", byItself: "–"},
	}
}

// keySituation is one thing that KMS can say about a key, with the reason where there are several.
type keySituation struct {
	key    keyguard.KeyState
	reason keyguard.Reason
	gate   keyguard.GateState // in which the words are shown
	short  string             // the reason in words, when the state alone does not say it
}

func keySituations() []keySituation {
	all := []keySituation{
		{keyguard.Unknown, keyguard.ReasonNone, keyguard.Starting, ""},
		{keyguard.Enabled, keyguard.ReasonNone, keyguard.Open, ""},
		{keyguard.Enabled, keyguard.ReasonOperator, keyguard.Frozen, "frozen on request"},
		{keyguard.Disabled, keyguard.ReasonKeyDisabled, keyguard.Frozen, ""},
		{keyguard.PendingDeletion, keyguard.ReasonPendingDeletion, keyguard.Frozen, ""},
		{keyguard.Deleted, keyguard.ReasonKeyDeleted, keyguard.Frozen, ""},
		{keyguard.AccessDenied, keyguard.ReasonAccessDenied, keyguard.Frozen, ""},
	}
	for _, r := range []keyguard.Reason{keyguard.ReasonPendingImport, keyguard.ReasonKeyStoreDown, keyguard.ReasonKeyCreating, keyguard.ReasonInvalidState} {
		all = append(all, keySituation{keyguard.Unavailable, r, keyguard.Frozen, string(r)})
	}
	for _, r := range []keyguard.Reason{keyguard.ReasonThrottled, keyguard.ReasonServiceFault, keyguard.ReasonTimeout, keyguard.ReasonDNS,
		keyguard.ReasonTLS, keyguard.ReasonConnection, keyguard.ReasonCredentials, keyguard.ReasonClockSkew, keyguard.ReasonKeyStoreDown,
		keyguard.ReasonInvalidState, keyguard.ReasonUnknownFault} {
		all = append(all, keySituation{keyguard.Unreachable, r, keyguard.Frozen, string(r)})
	}
	for _, r := range []keyguard.Reason{keyguard.ReasonKeyNotFound, keyguard.ReasonWrongKey, keyguard.ReasonInvalidCiphertext,
		keyguard.ReasonWrongKind, keyguard.ReasonWrongRegion, keyguard.ReasonBadRequest} {
		all = append(all, keySituation{keyguard.Misconfigured, r, keyguard.Stopping, string(r)})
	}
	return all
}

// status is the situation as a guard would tell it of a key.
func (k keySituation) status(arn string) keyguard.Status {
	return keyguard.Status{KeyARN: arn, Key: k.key, Gate: k.gate, Reason: k.reason, OperatorFreeze: k.reason == keyguard.ReasonOperator}
}

func (k keySituation) name() string {
	if k.short == "" {
		return k.key.String()
	}
	return k.key.String() + ", " + k.short
}

// explainWords is what can be explained: states of byokd, of a key and of a lower directory, and reasons.
func explainWords() (words []string) {
	for _, m := range stateMeanings() {
		words = append(words, string(m.state))
	}
	for _, k := range keySituations() {
		words = append(words, k.key.String(), string(k.reason))
	}
	for _, s := range fs.LowerStates() {
		words = append(words, s.String())
	}
	slices.Sort(words)
	words = slices.Compact(words)
	return slices.DeleteFunc(words, func(w string) bool { return w == "" })
}

func newExplainCommand(environ []string) *cobra.Command {
	arn := "KEY_ARN"
	cmd := &cobra.Command{
		Use: "explain STATE", Short: "Tell what a state of byokd or of a key means, and what to do", Args: cobra.MaximumNArgs(1),
		Long: "Explains a state as byokd status shows it (frozen, waiting, …), a state of the key (Disabled, PendingDeletion, …) or of\n" +
			"the disk below (read_only, …), or a reason (throttled, dns, …): cause, what becomes of reads and writes, and the next step. Asks nobody. Without STATE it\n" +
			"lists what can be explained.",
		RunE: func(cmd *cobra.Command, args []string) error {
			out := cmd.OutOrStdout()
			e := explainer{out, coloursFor(out, environ), arn}
			if len(args) == 0 {
				_, err := fmt.Fprintln(out, strings.Join(explainWords(), "\n"))
				return exitWith(exitFailure, err)
			}
			if !e.explain(args[0]) {
				return &exitError{exitUsage, fmt.Errorf("%q is no state or reason; byokd explain lists them", args[0])}
			}
			return nil
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return explainWords(), cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().StringVar(&arn, "key", arn, "ARN of the key, for commands that work as they stand")
	return cmd
}

// explainer writes explanations.
type explainer struct {
	out io.Writer
	colours
	arn string
}

// explain writes what a word means; false when it is none. KMS' own spelling and the labels of metrics
// (pending_deletion) are understood as well.
func (e explainer) explain(word string) bool {
	plain := func(s string) string { return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s)) }
	for _, m := range stateMeanings() {
		if plain(word) == string(m.state) {
			e.state(m)
			return true
		}
	}
	for _, s := range fs.LowerStates() {
		if plain(word) == plain(s.String()) {
			e.lower(s)
			return true
		}
	}
	found := false
	for _, k := range keySituations() {
		if plain(word) == plain(k.key.String()) || plain(word) == plain(string(k.reason)) {
			if found {
				fmt.Fprintln(e.out)
			}
			e.situation(k)
			found = true
		}
	}
	return found
}

func (e explainer) state(m stateMeaning) {
	fmt.Fprintf(e.out, "%s: %s\n", e.colours.state(m.state, string(m.state)), m.meaning)
	fmt.Fprintf(e.out, "Reads and writes: %s\nBy itself: %s\n", strings.ReplaceAll(m.access, "`", ""), m.byItself)
	for _, k := range keySituations() {
		if slices.Contains(m.causes, k.key) && k.reason != keyguard.ReasonOperator {
			fmt.Fprintln(e.out)
			if m.state == metrics.StateWaiting {
				k.gate = keyguard.Starting
			}
			if m.state == metrics.StateDegraded {
				k.gate = keyguard.Degraded
			}
			e.situation(k)
		}
	}
	if m.anotherCause != "" {
		fmt.Fprintf(e.out, "\n%s\nNext step: %s\n", m.anotherCause, m.anotherRemedy)
	}
}

// lower explains a state of a lower directory.
func (e explainer) lower(s fs.LowerState) {
	of := stateOfLower(s)
	fmt.Fprintf(e.out, "%s: a state of the lower directory (byokd_fs_lower_state); byokd shows %s\n", e.in(bold, s.String()), e.colours.state(of, string(of)))
	cause, nextStep := lowerMessage(fs.LowerHealth{State: s, Err: unix.EIO}, "volume.lower")
	if cause != "" {
		fmt.Fprintf(e.out, "%s\n%s %s\n", cause, e.in(bold, "Next step:"), nextStep)
	}
}

func (e explainer) situation(k keySituation) {
	s := k.status(e.arn)
	fmt.Fprintf(e.out, "%s\n%s\n%s\n", e.in(bold, k.name()), s.Headline(), s.Cause())
	if step := s.NextStep(); step != "" {
		fmt.Fprintf(e.out, "%s %s\n", e.in(bold, "Next step:"), step)
	}
}
