//go:build !race

package fs

// waitingRoom is the most memory that a call may take which waits.
const waitingRoom = 12 << 10
