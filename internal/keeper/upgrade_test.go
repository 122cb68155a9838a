package keeper

import (
	"errors"
	"os"
	"slices"
	"syscall"
	"testing"
)

// TestUpgrade: the installed binary takes over when asked for, and not before.
func TestUpgrade(t *testing.T) {
	for _, ask := range []struct {
		name string
		do   func(*watched)
	}{
		{"SIGHUP", (*watched).hangUp},
		{"the worker", func(w *watched) { w.tell("upgrade") }},
	} {
		t.Run(ask.name, func(t *testing.T) {
			w := keep(t, "serves")
			w.hears("serves ", "cause=")
			w.point("newer")
			w.kill(syscall.SIGKILL)
			w.hears("serves ", "cause=killed") // nobody has asked
			ask.do(w)
			w.hears("newer ", "cause=upgraded killed=1 fault=0 upgraded=1")
			w.kill(syscall.SIGKILL)
			w.hears("newer ", "cause=killed killed=2 fault=0 upgraded=1")
		})
	}
}

// TestUpgradeThatFails: whatever is wrong with the installed binary, the one before
// goes on.
func TestUpgradeThatFails(t *testing.T) {
	t.Run("unsuited", func(t *testing.T) {
		w := keep(t, "serves", func(o *Options) { o.Suits = func(string) error { return errors.New("another seam") } })
		w.hears("serves ")
		w.hangUp()
		w.logged("no upgrade: the installed binary does not suit, the worker goes on")
		if n := w.starts.Load(); n != 1 {
			t.Errorf("%d workers were started", n)
		}
	})
	t.Run("gone", func(t *testing.T) {
		w := keep(t, "serves")
		w.hears("serves ")
		if err := os.Remove(w.program); err != nil {
			t.Fatal(err)
		}
		w.hangUp()
		w.logged("no upgrade: the installed binary does not suit, the worker goes on")
		w.kill(syscall.SIGKILL)
		w.hears("serves ", "cause=killed")
	})
	t.Run("no program", func(t *testing.T) {
		w := keep(t, "serves")
		w.hears("serves ")
		if err := os.Rename(w.program, w.program+".old"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(w.program, []byte("\x7fELF, cut short"), 0o755); err != nil {
			t.Fatal(err)
		}
		w.hangUp()
		w.hears("serves ", "cause=upgraded")
		w.logged("the new binary cannot be run: back to the one before")
	})
	t.Run("it refuses the mount", func(t *testing.T) {
		w := keep(t, "serves")
		w.hears("serves ")
		w.point("refuses")
		w.hangUp()
		w.hears("serves ", "cause=upgraded", "upgraded=2")
		w.logged("the new binary cannot go on with the mount: back to the one before")
	})
	t.Run("it does not come to serve", func(t *testing.T) {
		w := keep(t, "serves")
		w.hears("serves ")
		w.point("mute")
		w.hangUp()
		w.hears("serves ", "cause=fault killed=0 fault=2 upgraded=1")
		w.logged("the new binary does not come to serve: back to the one before")
	})
	t.Run("after one that went well", func(t *testing.T) {
		w := keep(t, "serves")
		w.hears("serves ")
		w.point("newer")
		w.hangUp()
		w.hears("newer ")
		w.settled()
		w.point("refuses")
		w.hangUp()
		w.hears("newer ", "cause=upgraded", "upgraded=3")
	})
}

// TestWorkerAttendedToWhileAsking: a new binary that takes its time to answer keeps
// nobody waiting.
func TestWorkerAttendedToWhileAsking(t *testing.T) {
	answer := make(chan error)
	w := keep(t, "serves", func(o *Options) { o.Suits = func(string) error { return <-answer } })
	w.hears("serves ")
	w.hangUp()
	w.hangUp()
	w.kill(syscall.SIGKILL)
	w.hears("serves ", "cause=killed")
	w.point("newer")
	answer <- nil
	w.hears("newer ", "cause=upgraded")
}

// TestUpgradeAmidCrashes: a better binary ends a row of crashes.
func TestUpgradeAmidCrashes(t *testing.T) {
	w := keep(t, "mute")
	w.await("three deaths", func() bool { return w.logs.FilterMessage("the worker has ended and is started again").Len() >= 3 })
	w.point("serves")
	w.hangUp()
	w.hears("serves ")
}

// TestWorkerOfAnotherVersion: a keeper and a worker that do not understand each other
// say so.
func TestWorkerOfAnotherVersion(t *testing.T) {
	word, err := History{Version: Version + 1}.environment()
	if err != nil {
		t.Fatal(err)
	}
	for _, environ := range [][]string{{word}, {variable + "=no JSON"}} {
		if w, _, err := Connect(environ); err == nil || w != nil {
			t.Errorf("Connect(%q) = %v, %v", environ, w, err)
		}
	}
	if w, rest, err := Connect([]string{"A=b"}); w != nil || err != nil || !slices.Equal(rest, []string{"A=b"}) {
		t.Errorf("Connect without a keeper = %v, %q, %v", w, rest, err)
	}
}
