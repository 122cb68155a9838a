//go:build race

package fs

// waitingRoom is the most memory that a call may take which waits; the race detector
// doubles and trebles what it sees.
const waitingRoom = 48 << 10
