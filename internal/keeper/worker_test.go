package keeper

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The workers of these tests are this test binary. What one does is told by the
// name under which the binary lies, so that an upgrade can bring another behaviour.

// childVariable tells the test binary that it is a worker (its value is of no
// interest), or a keeper of a worker of that name.
const childVariable = "BYOKD_KEEPER_TEST"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) == "" {
		os.Exit(m.Run())
	}
	w, _, err := Connect(os.Environ())
	if err != nil {
		say("refused: %v", err)
		os.Exit(1)
	}
	if w == nil {
		os.Exit(keeperMain())
	}
	program, err := os.Executable()
	if err != nil {
		panic(err)
	}
	role, known := roles[strings.TrimSuffix(filepath.Base(program), " (deleted)")]
	if !known {
		panic("a worker named " + program)
	}
	os.Exit(role(w))
}

// say writes a line to standard output, in one piece.
func say(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stdout, format+"\n", args...)
}

const cannotTakeOver = 19

var roles = map[string]func(*Worker) int{
	"serves": serves,
	"newer":  serves,
	// mute dies before it is ready.
	"mute": func(*Worker) int { return 0 },
	// crashes serves, and ends by itself.
	"crashes": func(w *Worker) int {
		start(w)
		die(syscall.SIGABRT)
		return 0
	},
	// refuses finds that it cannot go on.
	"refuses": func(w *Worker) int {
		must(w.Ready())
		must(w.Farewell(cannotTakeOver))
		return cannotTakeOver
	},
	// ends does so in order, at once.
	"ends": func(w *Worker) int {
		start(w)
		must(w.Farewell(7))
		return 7
	},
	// dies when it is told to stop, twice; then it stops.
	"dies": func(w *Worker) int {
		signals := start(w)
		<-signals
		if w.Restarts[Killed] < 2 {
			die(syscall.SIGKILL)
		}
		must(w.Farewell(0))
		return 0
	},
	// holds has more held than go into two messages, lets some go, and looks what it gets.
	"holds": func(w *Worker) int {
		signals := start(w)
		held, err := w.Held()
		must(err)
		right := 0
		for n, fd := range held {
			b := make([]byte, 100)
			length, err := unix.Pread(fd, b, 0)
			must(err)
			if string(b[:length]) == fmt.Sprint(n) {
				right++
			}
			unix.Close(fd)
		}
		say("held %d, of which right %d", len(held), right)
		if w.Restarts[Killed] == 2 {
			<-signals
			must(w.Farewell(0))
			return 0
		}
		for n := range manyHeld {
			must(w.Hold(uint64(n), textFile(fmt.Sprint(n))))
		}
		for n := 0; n < manyHeld; n += 3 {
			must(w.Release(uint64(n)))
		}
		must(w.Hold(1, textFile("another")))
		must(w.Hold(1, textFile("1")))
		die(syscall.SIGKILL)
		return 0
	},
	// lingers has something held whose close takes a minute, and goes on.
	"lingers": func(w *Worker) int {
		signals := start(w)
		fd, peer := fullSocket()
		must(w.Hold(1, fd))
		unix.Close(fd)
		must(w.Release(1))
		held, err := w.Held()
		must(err)
		say("held %d", len(held))
		unix.Close(peer) // ends the close
		<-signals
		must(w.Farewell(0))
		return 0
	},
	// panics when it is told to stop.
	"panics": func(w *Worker) int {
		<-start(w)
		panic("as the test wants")
	},
	// eats takes memory until there is no more.
	"eats": func(w *Worker) int {
		if w.Restarts[OOM] == 3 {
			return serves(w)
		}
		start(w)
		const most = 1 << 30 // should the limit not hold, the machine is not to suffer
		for range most >> 20 {
			memory, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			must(err)
			for at := 0; at < len(memory); at += 4096 { // a signal would cut MAP_POPULATE short
				memory[at] = 1
			}
		}
		panic("the memory cgroup does not hold")
	},
}

const manyHeld = 2*batch + 300

// fullSocket returns a TCP socket whose last close waits for a minute for what it has
// sent to be read, unless the peer, returned too, is closed.
func fullSocket() (fd, peer int) {
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	must(unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	must(unix.Listen(listener, 1))
	address, err := unix.Getsockname(listener)
	must(err)
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	must(unix.Connect(fd, address))
	peer, _, err = unix.Accept4(listener, unix.SOCK_CLOEXEC)
	must(err)
	unix.Close(listener)
	must(unix.SetNonblock(fd, true))
	must(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 60}))
	for err == nil {
		_, err = unix.Write(fd, make([]byte, 1<<16))
	}
	return fd, peer
}

// textFile returns a descriptor of a file of memory that holds a text.
func textFile(text string) int {
	fd, err := unix.MemfdCreate("text", unix.MFD_CLOEXEC)
	must(err)
	_, err = unix.Write(fd, []byte(text))
	must(err)
	return fd
}

// start tells the keeper and the test that this worker serves.
func start(w *Worker) <-chan os.Signal {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	must(w.Ready())
	must(w.Serving())
	text := ""
	if fd := w.Take("device"); fd >= 0 {
		b := make([]byte, 100)
		n, err := unix.Pread(fd, b, 0)
		must(err)
		text = string(b[:n])
	}
	score, err := os.ReadFile("/proc/self/oom_score_adj")
	must(err)
	comm, err := os.ReadFile("/proc/self/comm")
	must(err)
	program, err := os.Executable()
	must(err)
	say("%s pid=%d cause=%s killed=%d fault=%d upgraded=%d oom=%d text=%q score=%s comm=%s", filepath.Base(program), os.Getpid(),
		w.Cause, w.Restarts[Killed], w.Restarts[Fault], w.Restarts[Upgraded], w.Restarts[OOM], text, strings.TrimSpace(string(score)), strings.TrimSpace(string(comm)))
	return signals
}

// serves leaves with the keeper what the next one reads, and obeys what the test
// writes to its standard input until it is told to stop.
func serves(w *Worker) int {
	signals := start(w)
	fd, err := unix.MemfdCreate("text", unix.MFD_CLOEXEC)
	must(err)
	_, err = unix.Write(fd, fmt.Appendf(nil, "from %d", os.Getpid()))
	must(err)
	must(w.Deposit("device", fd))
	must(w.Mounted("/nowhere"))
	go obey(w)
	s := <-signals
	say("told %v", s)
	must(w.Farewell(0))
	return 0
}

func obey(w *Worker) {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		switch lines.Text() {
		case "upgrade":
			must(w.Upgrade())
		case "hold":
			r, wr, err := os.Pipe()
			must(err)
			must(w.Hold(1, int(wr.Fd())))
			wr.Close()
			go func() { // the end of the file comes when the keeper lets go
				_, err := io.ReadAll(r)
				say("released %v", err)
			}()
		case "release":
			must(w.Release(1))
		}
	}
}

func die(s syscall.Signal) {
	must(unix.Kill(os.Getpid(), s))
	select {}
}

func must(err error) {
	if err != nil && !errors.Is(err, unix.EPIPE) { // the keeper is gone, and this process is about to be
		panic(err)
	}
}
