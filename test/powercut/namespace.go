//go:build linux

package powercut

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
)

// namespaceVariable is set in the process that has a mount namespace of its own.
const namespaceVariable = "BYOKD_POWERCUT_NAMESPACE"

// inOwnNamespace has this program do its work in a mount namespace of its own, if
// it is root, and returns the exit code.
//
// Whoever makes a mount namespace (a container, a test of something else) takes
// copies of all mounts that its own shows at that moment. A filesystem of which there
// is a copy lives on after its unmount here: it still writes, at last that its
// journal is clean, into what by then holds the next state. The journal of that is
// not recovered then, and what was acknowledged seems lost (seen: 8 points of 120
// with a namespace made each 30 ms).
func inOwnNamespace(work func() int) (code int, err error) {
	if os.Geteuid() != 0 || os.Getenv(namespaceVariable) != "" {
		return work(), nil
	}
	program, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(program, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), namespaceVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(1, exit.ExitCode()), nil
	}
	if err != nil {
		return 1, err
	}
	return 0, nil
}
