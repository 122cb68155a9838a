//go:build linux

package powercut

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// burnersVariable says how many processes compete for the processors while a
// recording is made, 0 if it is not set: orders of events that need a thread to be
// held up at the wrong moment come up more often.
const burnersVariable = "BYOKD_POWERCUT_BURNERS"

// burn starts them and returns how they are ended. The calling thread must be
// there as long as they.
func burn() (end func(), err error) {
	text := os.Getenv(burnersVariable)
	if text == "" {
		return func() {}, nil
	}
	count, err := strconv.Atoi(text)
	if err != nil || count < 0 {
		return nil, fmt.Errorf("%s=%s: say a number from 0 on", burnersVariable, text)
	}
	var burners []*exec.Cmd
	end = func() {
		for _, b := range burners {
			_ = b.Process.Kill()
			_ = b.Wait() // killed
		}
	}
	for range count {
		b := exec.Command("sh", "-c", "while :; do :; done")
		b.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that is killed leaves none behind
		if err := b.Start(); err != nil {
			end()
			return nil, errors.Join(errors.New("a process that competes for the processors"), err)
		}
		burners = append(burners, b)
	}
	return end, nil
}
