package fusemount

import (
	"os"
	"os/exec"
	"testing"
)

func TestBeingKilled(t *testing.T) {
	if BeingKilled(uint32(os.Getpid())) {
		t.Error("this process is not being killed")
	}
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if !BeingKilled(uint32(cmd.Process.Pid)) {
		t.Error("a process that is gone needs no answer")
	}
}

func TestSigkillIn(t *testing.T) {
	for text, want := range map[string]bool{
		"Name:\tx\nSigPnd:\t0000000000000100\nShdPnd:\t0\n":             true,
		"Name:\tx\nSigPnd:\t0000000000000200\nShdPnd:\t0\n":             false,
		"Name:\tSigPnd:\t0000000000000100\nSigPnd:\t0000000000000000\n": false, // a thread may call itself anything
		"":                            false,
		"\nSigPnd:\tnot a number\n":   false,
		"\nSigPnd:\tffffffffffffffff": true,
	} {
		if got := sigkillIn([]byte(text), "\nSigPnd:\t"); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestExiting(t *testing.T) {
	for text, want := range map[string]bool{
		"12 (a) b) R 1 1 1 0 -1 4 0 0":  true, // ") " in the name
		"12 (x) R 1 1 1 0 -1 4194304 0": false,
		"12 (x) R 1 1":                  false,
		"":                              false,
		"12 x R 1 1 1 0 -1 4":           false,
	} {
		if got := exiting([]byte(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
