package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/internal/control"
	"github.com/byokd/byokd/keyguard"
)

func newFreezeCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use: "freeze", Short: "Freeze a running byokd on request, as if its key had been taken away", Args: cobra.NoArgs,
		Long: `Closes the gate of every key (or of those named by --key): reads and writes wait, cached plaintext is dropped,
keys are erased from memory, until ` + "`byokd thaw`" + `. The key in AWS is not touched. The command returns when nothing
plain leaves any more.

With --quiesce it also sees to it that all data, acknowledged or still dirty, is on the disk of the lower directory
before it returns: then a snapshot of that disk may be taken, and nothing written before is missing in it. Where that cannot be
done, nothing stays frozen and the command fails.

While a key is away, the request is recorded: access stays frozen when the key is back. A request outlives a restart
of byokd as long as the directory of the socket does. To thaw, type: byokd thaw

Exit codes:
  0   frozen (and, with --quiesce, consistent on disk)
  1   could not be done; the text says what is and what is not frozen
  2   wrong command line, no key of that name, or --quiesce without the volume's key
  13  byokd is stopping
  15  recorded: carried out when the key is back
  20  no byokd listens at the socket`,
		Example: "  byokd freeze --quiesce && snapshot-the-disk; byokd thaw",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return call.run(cmd, "freeze", writeFrozen)
		},
	}
	call.flags(cmd)
	cmd.Flags().BoolVar(&call.request.Quiesce, "quiesce", false, "put all data on the lower disk first, for a snapshot of it")
	return cmd
}

func newThawCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use: "thaw", Short: "Take a freeze on request back", Args: cobra.NoArgs,
		Long: `Opens the gate of every key (or of those named by --key) again and returns when reads and writes go on, which takes
at most two seconds where KMS grants the key. While a key is away, the request is recorded and carried out when it
is back. A freeze because of the key is not lifted by this: only its owner can do that.

Exit codes:
  0   thawed
  1   could not be done
  2   wrong command line, or no key of that name
  13  byokd is stopping
  15  recorded: carried out when the key is back
  20  no byokd listens at the socket`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return call.run(cmd, "thaw", writeThawed)
		},
	}
	call.flags(cmd)
	return cmd
}

// operatorCall is the command line of a freeze or thaw.
type operatorCall struct {
	socket, output string
	request        operatorRequest
}

func (c *operatorCall) flags(cmd *cobra.Command) {
	socketFlag(cmd, &c.socket)
	outputFlag(cmd, &c.output)
	cmd.Flags().StringSliceVar(&c.request.Keys, "key", nil, "name of a key in the configuration; repeat for several (all keys)")
}

func (c *operatorCall) run(cmd *cobra.Command, operation string, write func(io.Writer, operatorReport, string)) error {
	if err := checkOutput(c.output); err != nil {
		return err
	}
	var report operatorReport
	if err := callDaemon(cmd, c.socket, operation, c.request, &report); err != nil {
		return err
	}
	if c.output == outputJSON {
		if err := writeJSON(cmd.OutOrStdout(), report); err != nil {
			return err
		}
	} else {
		write(cmd.OutOrStdout(), report, c.socket)
	}
	if report.recorded() {
		return &exitError{code: exitRecorded}
	}
	return nil
}

func writeFrozen(out io.Writer, r operatorReport, socket string) {
	for _, k := range r.Keys {
		if k.Pending == keyguard.FreezeIntent {
			fmt.Fprintf(out, "%s: recorded; the key is away now, and access stays frozen when it is back\n  %s\n", k.Name, k.Cause)
			continue
		}
		fmt.Fprintf(out, "%s: frozen\n", k.Name)
	}
	if r.Quiesced {
		fmt.Fprintln(out, "All data is on the lower disk: the snapshot may be taken. Then type: byokd thaw"+prefixed(" --socket ", socketToTell(socket)))
	}
}

func writeThawed(out io.Writer, r operatorReport, _ string) {
	for _, k := range r.Keys {
		if k.Pending == keyguard.ThawIntent {
			fmt.Fprintf(out, "%s: recorded; the key is away now, and access goes on when it is back\n  %s\n", k.Name, k.Cause)
			continue
		}
		fmt.Fprintf(out, "%s: thawed, reads and writes go on\n", k.Name)
	}
}

// socketToTell is a control socket that commands do not find by themselves; else "".
func socketToTell(socket string) string {
	if socket == defaultSocket {
		return ""
	}
	return socket
}

func socketFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVar(socket, "socket", defaultSocket, "control socket of the running byokd (admin.socket in its configuration)")
}

const (
	outputTable = "table"
	outputJSON  = "json"
)

func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", outputTable, "table or json")
	if err := cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{outputTable, outputJSON}, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag was just made
	}
}

func checkOutput(output string) error {
	if output != outputTable && output != outputJSON {
		return &exitError{exitUsage, fmt.Errorf("-o %s: say table or json", output)}
	}
	return nil
}

func writeJSON(out io.Writer, v any) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return exitWith(exitFailure, encoder.Encode(v))
}

// callDaemon asks the running byokd, shows its progress on standard error, and turns its errors into exit codes.
func callDaemon(cmd *cobra.Command, socket, operation string, request, result any) error {
	text, err := control.NewClient(socket).Call(cmd.Context(), operation, request, func(line json.RawMessage) {
		var words string
		if json.Unmarshal(line, &words) == nil {
			fmt.Fprintln(cmd.ErrOrStderr(), words)
		}
	})
	var failed *control.Failure
	switch {
	case errors.Is(err, control.ErrNoAnswer):
		return &exitError{exitNoAnswer, fmt.Errorf("%w; is it running, and is that admin.socket of its configuration? (--socket PATH)", err)}
	case errors.As(err, &failed):
		return &exitError{failed.Code, err}
	case err != nil:
		return &exitError{exitFailure, err}
	}
	return exitWith(exitFailure, json.Unmarshal(text, result))
}
