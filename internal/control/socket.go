package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path of a unix socket on Linux: 108 bytes with the zero.
const maxPath = 107

// dialTimeout bounds connecting: the other end is this machine.
const dialTimeout = 5 * time.Second

// ErrInUse is returned by Listen when a living process listens there.
var ErrInUse = errors.New("control: another process listens at this socket")

// Listen makes the socket at path, with mode 0600, in an existing directory.
func Listen(path string) (net.Listener, error) {
	if err := clearAway(path); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("control: socket: %w", err)
	}
	if err := bind(fd, path); err != nil {
		unix.Close(fd)
		return nil, err
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close() // FileListener has its own descriptor
	listener, err := net.FileListener(file)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("control: %w", err), os.Remove(path))
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(true)
	return listener, nil
}

// bind gives the socket its name and mode. Nobody can connect before listen, so
// that there is no moment at which the mode is another.
func bind(fd int, path string) error {
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return noDirectory(filepath.Dir(path))
		}
		return fmt.Errorf("control: bind %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(fmt.Errorf("control: %w", err), os.Remove(path))
	}
	if err := unix.Listen(fd, 16); err != nil {
		return errors.Join(fmt.Errorf("control: listen at %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// clearAway removes the socket that a killed process left behind.
func clearAway(path string) error {
	_, left, err := look(path)
	if err != nil || !left {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("control: %w", err)
	}
	return nil
}

// Look tells, changing nothing, whether Listen could make the socket at path: the
// error is the one that Listen would return. With ErrInUse comes who listens there.
func Look(path string) (listener Peer, err error) {
	if listener, _, err = look(path); err != nil {
		return listener, err
	}
	dir := filepath.Dir(path)
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); errors.Is(err, unix.ENOENT) {
		return listener, noDirectory(dir)
	} else if err != nil {
		return listener, fmt.Errorf("control: nothing can be made in %s: %w", dir, err)
	}
	return listener, nil
}

func noDirectory(dir string) error {
	return fmt.Errorf("control: the directory %s does not exist; type: mkdir -p %s", dir, dir)
}

// look looks at what is at path. It may be a socket that a killed process has left.
func look(path string) (listener Peer, left bool, err error) {
	if len(path) > maxPath {
		return Peer{}, false, fmt.Errorf("control: the path of a socket has at most %d bytes, %s has %d", maxPath, path, len(path))
	}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Peer{}, false, nil
	}
	if err != nil {
		return Peer{}, false, fmt.Errorf("control: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return Peer{}, false, fmt.Errorf("control: %s exists and is no socket; move it away", path)
	}
	conn, err := net.DialTimeout("unix", path, dialTimeout)
	if errors.Is(err, unix.ECONNREFUSED) {
		return Peer{}, true, nil
	}
	if err != nil {
		return Peer{}, false, fmt.Errorf("control: %w", err)
	}
	defer conn.Close()
	if listener, err = peerOf(conn); err != nil {
		return Peer{}, false, err
	}
	return listener, false, fmt.Errorf("%w: %s (%v); is another byokd running? To see which process it is: ss -xlp", ErrInUse, path, listener)
}

// Peer is the process at the other end of a connection, as the kernel knows it.
type Peer struct {
	UID uint32
	PID int32 // 0 when it lives in a PID namespace that we cannot see
}

// String names the peer in audit and status.
func (p Peer) String() string {
	if p.PID == 0 {
		return fmt.Sprintf("uid %d", p.UID)
	}
	return fmt.Sprintf("uid %d, pid %d", p.UID, p.PID)
}

// peerOf asks the kernel who connected.
func peerOf(conn net.Conn) (Peer, error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return Peer{}, fmt.Errorf("control: %T is no unix socket", conn)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Peer{}, err
	}
	if credErr != nil {
		return Peer{}, fmt.Errorf("control: SO_PEERCRED: %w", credErr)
	}
	return Peer{UID: cred.Uid, PID: cred.Pid}, nil
}
