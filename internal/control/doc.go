// Package control carries requests of an operator to a running byokd and its
// answers back, over a unix socket that nobody else may use.
//
// # Who may ask
//
// The socket has mode 0600 from before anybody can connect, and the kernel names
// the process at the other end (SO_PEERCRED): root and the user that byokd runs
// as are heard, others are refused even where a file system ignores modes.
//
// # Form
//
// A request is one POST of JSON to /v1/OPERATION. The answer is a stream of JSON
// lines: any number of {"progress": …} and then one {"result": …} or {"error": …}.
// A stream without such an end was cut off. An operation ends early when its
// client leaves.
//
// # Ownership
//
// Listen clears away the socket of a byokd that was killed, never that of a
// living one. Serve removes the socket when it ends.
package control
