package main

import (
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/metrics"
)

// colours decides whether text gets colours: for people at a terminal only, and not where NO_COLOR is set
// (https://no-color.org) or the terminal is a dumb one.
type colours bool

func coloursFor(out io.Writer, environ []string) colours {
	file, ok := out.(*os.File)
	if !ok || slices.Contains(environ, "TERM=dumb") ||
		slices.ContainsFunc(environ, func(v string) bool { return strings.HasPrefix(v, "NO_COLOR=") && v != "NO_COLOR=" }) {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// Styles are the colours that every terminal has; the word says the same without them. All have the same
// length, so that a column of a table stays one when each of its cells has a style.
const (
	bold   = "1;39"
	green  = "1;32"
	yellow = "1;33"
	red    = "1;31"
	dim    = "0;90"
)

func (c colours) in(style, text string) string {
	if !c || text == "" {
		return text
	}
	return "\x1b[" + style + "m" + text + "\x1b[0m"
}

func (c colours) state(s metrics.State, text string) string {
	return c.in(map[metrics.State]string{metrics.StateReady: green, metrics.StateImpaired: yellow, metrics.StateDegraded: yellow, metrics.StateWaiting: yellow,
		metrics.StateFrozen: red, metrics.StateFinal: red, metrics.StateFailed: red, metrics.StateStopping: dim}[s], text)
}

func (c colours) gate(s keyguard.GateState) string {
	style := map[keyguard.GateState]string{keyguard.Open: green, keyguard.Degraded: yellow, keyguard.Starting: yellow, keyguard.Stopping: dim}[s]
	if style == "" {
		style = red // Draining, Frozen, Thawing: nothing new passes
	}
	return c.in(style, s.String())
}
