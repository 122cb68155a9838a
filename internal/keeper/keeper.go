package keeper

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Options of a keeper.
type Options struct {
	// Program is the path of the worker's binary, with Args (the first is its name)
	// and Env. What lies there when the keeper starts is started again until an
	// upgrade is asked for, which takes what lies there then.
	Program string
	Args    []string
	Env     []string
	Files   [3]*os.File // the worker's standard streams

	// Signals are passed on to the worker, but for SIGHUP, which is an upgrade.
	Signals <-chan os.Signal
	// Suits says whether a binary can be this keeper's worker, before the present
	// one is stopped for it. It is called in a goroutine of its own; may be nil.
	Suits func(program string) error
	// CannotTakeOver is the exit code of a worker that finds a mount which it cannot go
	// on with: after an upgrade, the binary before is tried again.
	CannotTakeOver int
	// Sentinel is started for a mount when the worker tells of it, and stopped at
	// the end: it ends the mount when this process is killed.
	Sentinel func(dir string) (stop func(), err error)
	// Started is told of each worker; may be nil.
	Started func(pid int)
	// StatusWithin is how long a dead worker's exit status is waited for; 0 is 50 ms. It
	// tells the cause, and comes late where a thread hangs in the kernel.
	StatusWithin time.Duration
	Log          *zap.Logger
}

// statusWithin is the default of Options.StatusWithin.
const statusWithin = 50 * time.Millisecond

// The pause before a worker is started that follows ones which ended by themselves:
// none for the first, so that a fault costs its callers nothing else.
const (
	shortLife  = 5 * time.Second
	firstPause = 50 * time.Millisecond
	longPause  = time.Second
)

type keeper struct {
	Options
	log      *zap.Logger
	program  program
	proven   program // the last one that has served, to go back to
	history  History
	deposits map[string]*os.File
	held     map[uint64]int
	closing  chan int // descriptors that were let go of
	handing  []uint64 // what of held the present worker is still to get, if it has begun to ask; nil when not
	stopped  func()   // the sentinel's
	oomKills uint64   // of the cgroup, at the last look

	quick     int           // workers in a row that soon ended by themselves
	stopping  os.Signal     // the first signal to stop, nil while there is none
	upgrading bool          // the present worker is being replaced
	unproven  bool          // the program is new, and has not served yet
	asked     chan error    // gets what Suits says of the installed binary; nil while it is not asked
	present   *child        // nil between two
	messages  chan message  // of the present child
	ended     chan struct{} // closed when the present child can do nothing any more
}

// child is one worker process.
type child struct {
	process *os.Process
	conn    *os.File // our end
	socket  int      // its descriptor
	started time.Time
	ready   bool
	code    int                   // of its farewell, -1 without
	status  chan *os.ProcessState // gets one, if Wait returns
}

// Run keeps a worker running until one ends in order, and returns its exit code. An
// error says that none could be started. It takes the calling thread, whose end
// would end the worker.
func Run(o Options) (code int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	k := &keeper{Options: o, log: o.Log, deposits: map[string]*os.File{}, held: map[uint64]int{},
		closing: make(chan int, closingMost), history: History{Version: Version, Restarts: map[Cause]uint64{}, Name: filepath.Base(o.Args[0]), OOMScore: ownOOMScore()}}
	if k.program, err = openProgram(o.Program); err != nil {
		return 0, err
	}
	k.proven = k.program
	k.spareMe()
	go closeAll(k.closing)
	defer k.letGo()
	k.oomKills = oomKills()
	for {
		if err := k.startProven(); err != nil {
			return 0, err
		}
		k.attend()
		code, goOn := k.bury()
		if !goOn {
			return code, nil
		}
	}
}

// spareMe asks the kernel not to take this process when memory runs out.
func (k *keeper) spareMe() {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		k.log.Info("the keeper may be ended for want of memory, and the mount with it: oom_score_adj cannot be lowered (CAP_SYS_RESOURCE)", zap.Error(err))
		k.history.OOMScore = ""
	}
}

// startProven starts a worker: of the binary before where the new one cannot even be
// run.
func (k *keeper) startProven() error {
	err := k.start()
	if err == nil || !k.unproven {
		return err
	}
	k.log.Error("the new binary cannot be run: back to the one before", zap.Error(err))
	k.goBack()
	return k.start()
}

// start starts a worker and a goroutine that reads what it says.
func (k *keeper) start() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "worker")
	defer theirs.Close()
	if err := unix.SetNonblock(pair[0], true); err != nil { // for Go's poller
		unix.Close(pair[0])
		return os.NewSyscallError("fcntl", err)
	}
	ours := os.NewFile(uintptr(pair[0]), "keeper")
	conn, err := ours.SyscallConn()
	if err != nil {
		ours.Close()
		return err
	}
	k.handing = nil
	k.history.Names = slices.Sorted(maps.Keys(k.deposits))
	files := []*os.File{k.Files[0], k.Files[1], k.Files[2], theirs}
	for _, name := range k.history.Names {
		files = append(files, k.deposits[name])
	}
	word, err := k.history.environment()
	if err != nil {
		ours.Close()
		return err
	}
	process, err := os.StartProcess(k.program.link(), k.Args, &os.ProcAttr{Env: append(slices.Clone(k.Env), word), Files: files,
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}}) // a Ctrl-C is passed on, once
	if err != nil {
		ours.Close()
		return fmt.Errorf("start the worker: %w", err)
	}
	c := &child{process: process, conn: ours, socket: pair[0], started: time.Now(), code: -1, status: make(chan *os.ProcessState, 1)}
	go func() {
		state, _ := process.Wait()
		c.status <- state
	}()
	if k.Started != nil {
		k.Started(process.Pid)
	}
	k.present, k.messages, k.ended = c, make(chan message), make(chan struct{})
	go listen(conn, k.messages, k.ended)
	return nil
}

// listen passes messages on until the other end is gone. Two buffers suffice: when
// a message is taken, whoever takes it is done with the one before.
func listen(socket syscall.RawConn, messages chan<- message, ended chan<- struct{}) {
	boxes := [2]*inbox{newInbox(), newInbox()}
	for i := 0; ; i++ {
		m, ok := boxes[i%2].receive(socket)
		if !ok {
			break
		}
		messages <- m
	}
	close(ended)
}

// attend does what worker and signals say, until the worker is gone.
func (k *keeper) attend() {
	for {
		select {
		case m := <-k.messages:
			k.heed(m)
		case s := <-k.Signals:
			k.signal(s)
		case err := <-k.asked:
			k.replace(err)
		case <-k.ended:
			k.present.conn.Close()
			return
		}
	}
}

func (k *keeper) heed(m message) {
	fd := m.fd
	switch m.kind {
	case deposit:
		name := string(m.body)
		if old := k.deposits[name]; old != nil {
			old.Close()
		}
		if fd >= 0 {
			k.deposits[name] = os.NewFile(uintptr(fd), name)
			fd = -1
		}
	case hold, release:
		if len(m.body) != 8 {
			break
		}
		n := binary.NativeEndian.Uint64(m.body)
		if old, ok := k.held[n]; ok {
			k.closing <- old
			delete(k.held, n)
		}
		if fd >= 0 {
			k.held[n] = fd
			fd = -1
		} else if m.kind == hold {
			k.log.Error("a descriptor that the worker hands over did not arrive: the limit of open files is too low")
		}
	case fetch:
		k.hand()
	case mounted:
		k.watch(string(m.body))
	case ready:
		k.present.ready = true
		if k.stopping != nil {
			_ = k.present.process.Signal(k.stopping)
		}
	case serving:
		if k.upgrading { // the one before said so, whose end is on its way
			break
		}
		k.unproven = false
		if k.proven != k.program {
			k.proven.close()
			k.proven = k.program
		}
	case upgrade:
		k.consider()
	case farewell:
		if len(m.body) == 1 {
			k.present.code = int(m.body[0])
		}
	}
	if fd >= 0 {
		unix.Close(fd)
	}
}

// hand gives the worker some of what is held. It waits for it: no more than one answer
// is under way, so that neither waits for the other to read.
func (k *keeper) hand() {
	if k.handing == nil {
		k.handing = slices.AppendSeq(make([]uint64, 0, len(k.held)), maps.Keys(k.held))
	}
	var numbers [8 * batch]byte
	var fds [batch]int
	n := 0
	for ; n < batch && len(k.handing) > 0; k.handing = k.handing[:len(k.handing)-1] {
		number := k.handing[len(k.handing)-1]
		if fd, ok := k.held[number]; ok {
			binary.NativeEndian.PutUint64(numbers[8*n:], number)
			fds[n] = fd
			n++
		}
	}
	if n == 0 {
		k.handing = nil
	}
	_ = sendMany(k.present.socket, fetch, numbers[:8*n], fds[:n]) // a worker that is gone wants none
}

func (k *keeper) watch(dir string) {
	if k.Sentinel == nil || k.stopped != nil {
		return
	}
	stop, err := k.Sentinel(dir)
	if err != nil {
		k.log.Warn("without a sentinel, the mount of a byokd killed in a freeze may have to be ended by hand (umount -f -l)", zap.Error(err))
		return
	}
	k.stopped = stop
}

func (k *keeper) signal(s os.Signal) {
	if s == syscall.SIGHUP {
		k.consider()
		return
	}
	if k.stopping == nil {
		k.stopping = s
	}
	if k.present != nil && k.present.ready { // else it gets it when it is
		_ = k.present.process.Signal(s)
	}
}

// consider asks the installed binary whether it suits. Meanwhile the worker is
// attended to: it may take as long as a program takes to start.
func (k *keeper) consider() {
	if k.stopping != nil || k.upgrading || k.asked != nil {
		return
	}
	answer := make(chan error, 1)
	k.asked = answer
	if k.Suits == nil {
		answer <- nil
		return
	}
	go func() { answer <- k.Suits(k.Program) }()
}

// replace ends the worker for one of the binary that is installed now, if that suits.
func (k *keeper) replace(unsuited error) {
	k.asked = nil
	if k.stopping != nil {
		return
	}
	installed, err := program{}, unsuited
	if err == nil {
		installed, err = openProgram(k.Program)
	}
	if err != nil {
		k.log.Error("no upgrade: the installed binary does not suit, the worker goes on", zap.String("binary", k.Program), zap.Error(err))
		return
	}
	k.log.Info("upgrade: the worker is replaced", zap.String("binary", k.Program))
	k.setProgram(installed)
	k.unproven = true
	if k.present != nil {
		k.upgrading = true
		_ = k.present.process.Kill()
	}
}

// setProgram has the next worker run p.
func (k *keeper) setProgram(p program) {
	if k.program != k.proven {
		k.program.close()
	}
	k.program = p
}

// bury takes note of how the worker ended, and says whether another is to follow,
// or with which code to exit.
func (k *keeper) bury() (code int, goOn bool) {
	c, died := k.present, time.Now()
	k.present = nil
	cause := k.causeOf(c)
	k.upgrading = false
	if c.code >= 0 {
		if c.code == k.CannotTakeOver && k.unproven {
			k.log.Error("the new binary cannot go on with the mount: back to the one before")
			k.goBack()
			cause = Upgraded
		} else {
			return c.code, false
		}
	}
	if k.stopping != nil && cause == Fault {
		k.log.Error("the worker ended while it was stopping", zap.Stringer("cause", cause))
		return 1, false
	}
	if k.deposits["device"] == nil && k.stopped != nil { // the mount has ended with it
		k.stopped()
		k.stopped = nil
	}
	k.history.Restarts[cause]++
	k.history.Cause, k.history.Died = cause, died
	k.log.Error("the worker has ended and is started again", zap.Stringer("cause", cause), zap.Duration("ran", died.Sub(c.started).Round(time.Millisecond)))
	if cause == Fault || cause == OOM {
		k.rest(died.Sub(c.started))
	}
	return 0, true
}

// goBack makes the last binary that has served the worker's again.
func (k *keeper) goBack() {
	k.setProgram(k.proven)
	k.unproven = false
}

// rest pauses where worker after worker ends by itself, and takes the binary before
// where that began with a new one.
func (k *keeper) rest(ran time.Duration) {
	if ran > shortLife {
		k.quick = 0
	}
	k.quick++
	if k.quick == 1 {
		return
	}
	if k.unproven {
		k.log.Error("the new binary does not come to serve: back to the one before")
		k.goBack()
	}
	k.pause(min(longPause, firstPause<<min(k.quick-2, 10)))
}

// pause waits, but for a signal to stop, for which the next worker has to end the
// mount in order, and for an upgrade, which may be the remedy.
func (k *keeper) pause(length time.Duration) {
	timer := time.NewTimer(length)
	defer timer.Stop()
	for k.stopping == nil {
		select {
		case s := <-k.Signals:
			k.signal(s)
		case err := <-k.asked:
			k.replace(err)
			if k.unproven {
				return
			}
		case <-timer.C:
			return
		}
	}
}

// causeOf reads the exit status of a worker, if it comes.
func (k *keeper) causeOf(c *child) Cause {
	if c.code >= 0 {
		return First
	}
	if k.upgrading {
		return Upgraded
	}
	var state *os.ProcessState
	select {
	case state = <-c.status:
	case <-time.After(cmp.Or(k.StatusWithin, statusWithin)): // a thread of it hangs
	}
	before := k.oomKills
	k.oomKills = oomKills()
	if state == nil {
		if k.oomKills > before {
			return OOM // taking a large process down takes time
		}
		return Killed
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case !ok || !status.Signaled():
		return Fault // it exited without a word, as Go does after a panic
	case status.Signal() == syscall.SIGKILL && k.oomKills > before:
		return OOM
	case slices.Contains([]syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP}, status.Signal()):
		return Killed
	}
	return Fault
}

// letGo closes everything, which ends the mount if it is there still.
func (k *keeper) letGo() {
	close(k.closing)
	for _, f := range k.deposits {
		f.Close()
	}
	for _, fd := range k.held {
		unix.Close(fd)
	}
	if k.stopped != nil {
		k.stopped()
	}
	k.setProgram(k.proven)
	k.proven.close()
}
