package keeper

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// variable tells a worker what its keeper has for it.
const variable = "BYOKD_KEEPER"

// socketFD is the worker's end of the pair; the deposits follow.
const socketFD = 3

// Cause says why a worker ended.
type Cause string

// The causes.
const (
	First    Cause = ""         // there was none before
	Killed   Cause = "killed"   // by SIGKILL, or another signal from outside
	OOM      Cause = "oom"      // by the kernel, for want of memory
	Fault    Cause = "fault"    // a panic or a signal of its own doing
	Upgraded Cause = "upgraded" // by the keeper, to start another binary
)

// Causes lists those that count as restarts.
func Causes() []Cause { return []Cause{Killed, OOM, Fault, Upgraded} }

// History is what a worker is told about those before it.
type History struct {
	Version  int              `json:"version"`
	Restarts map[Cause]uint64 `json:"restarts"`
	Cause    Cause            `json:"cause"` // of the last one
	Died     time.Time        `json:"died"`  // the last one; zero for the first worker
	Names    []string         `json:"names"` // of the deposits, in the order of their descriptors

	Name     string `json:"name"`     // of the worker, as lists of processes show it
	OOMScore string `json:"oomScore"` // oom_score_adj as it was before the keeper lowered its own
}

// Worker is the worker's side. It is safe for concurrent use.
type Worker struct {
	History
	socket   int
	deposits map[string]int
}

// Connect finds the keeper that has started this process; nil when none has. The
// environment it returns is without the keeper's word.
func Connect(environ []string) (w *Worker, rest []string, err error) {
	word := ""
	for _, e := range environ {
		if value, ok := strings.CutPrefix(e, variable+"="); ok {
			word = value
			continue
		}
		rest = append(rest, e)
	}
	if word == "" {
		return nil, rest, nil
	}
	w = &Worker{socket: socketFD, deposits: map[string]int{}}
	if err := json.Unmarshal([]byte(word), &w.History); err != nil {
		return nil, rest, fmt.Errorf("%s: %w", variable, err)
	}
	if w.Version != Version {
		return nil, rest, fmt.Errorf("the keeper speaks version %d, this byokd version %d", w.Version, Version)
	}
	_ = os.WriteFile("/proc/self/comm", []byte(w.Name), 0) // the kernel has taken the number of a descriptor for it
	unix.CloseOnExec(socketFD)
	for i, name := range w.Names {
		unix.CloseOnExec(socketFD + 1 + i)
		w.deposits[name] = socketFD + 1 + i
	}
	if w.OOMScore != "" { // the keeper is spared, the worker is not
		_ = os.WriteFile("/proc/self/oom_score_adj", []byte(w.OOMScore), 0)
	}
	return w, rest, nil
}

// Take returns a descriptor that an earlier worker has deposited, which becomes the
// caller's; -1 when there is none.
func (w *Worker) Take(name string) int {
	fd, ok := w.deposits[name]
	if !ok {
		return -1
	}
	delete(w.deposits, name)
	return fd
}

// Deposit hands the keeper a copy of a descriptor, in place of one deposited under
// the same name before. The next worker gets it.
func (w *Worker) Deposit(name string, fd int) error {
	return send(w.socket, deposit, []byte(name), fd)
}

// Hold hands the keeper a copy of a descriptor: what it names is kept from going.
// The next worker may have it by Held.
func (w *Worker) Hold(n uint64, fd int) error { return send(w.socket, hold, number(n), fd) }

// Held returns copies of all that the keeper holds, by number; they become the
// caller's. It is called before anything else is awaited from the keeper.
func (w *Worker) Held() (map[uint64]int, error) {
	held := map[uint64]int{}
	for {
		err := send(w.socket, fetch, nil, -1)
		var numbers []uint64
		var fds []int
		if err == nil {
			numbers, fds, err = receiveHeld(w.socket)
		}
		if err != nil {
			for _, fd := range held {
				unix.Close(fd)
			}
			return nil, err
		}
		if len(numbers) == 0 {
			return held, nil
		}
		for i, n := range numbers {
			held[n] = fds[i]
		}
	}
}

// Release has the keeper close what it holds under a number, if anything.
func (w *Worker) Release(n uint64) error { return send(w.socket, release, number(n), -1) }

// Mounted tells where there is a mount, which the keeper's end would leave dead.
func (w *Worker) Mounted(dir string) error { return send(w.socket, mounted, []byte(dir), -1) }

// Ready tells that signals are taken in order from now on.
func (w *Worker) Ready() error { return send(w.socket, ready, nil, -1) }

// Serving tells that requests are being answered.
func (w *Worker) Serving() error { return send(w.socket, serving, nil, -1) }

// Upgrade asks the keeper to replace this worker by one of the binary that is
// installed now.
func (w *Worker) Upgrade() error { return send(w.socket, upgrade, nil, -1) }

// Farewell tells that this process is about to exit with a code, as it should; the
// keeper exits with it.
func (w *Worker) Farewell(code int) error { return send(w.socket, farewell, []byte{byte(code)}, -1) }

// environment is what a keeper adds for its worker.
func (h History) environment() (string, error) {
	word, err := json.Marshal(h)
	return variable + "=" + string(word), err
}

func (c Cause) String() string { return string(c) }

// ownOOMScore reads this process's.
func ownOOMScore() string {
	text, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return ""
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return ""
	}
	return strconv.Itoa(score)
}
