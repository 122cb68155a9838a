package keeper

import "golang.org/x/sys/unix"

// closingMost is how many descriptors wait to be closed before the worker waits for it.
const closingMost = 4096

// closeAll closes descriptors, apart from who attends to the worker: the last close of a
// large deleted file gives its blocks back, which takes the disk seconds.
func closeAll(fds <-chan int) {
	for fd := range fds {
		unix.Close(fd)
	}
}
