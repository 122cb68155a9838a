// Package fleet lets the byokd processes that watch one KMS key help each other:
// who sees a refusal hints the others, and each knows its place among them, so
// that their probes are spread over the interval.
//
// # Trust
//
// A hint says "look now" and nothing else. It opens nothing and closes nothing: it
// makes the receiver ask KMS itself, at most once a second for each key however
// many hints come. A forged hint costs a KMS call; so hints are authenticated with
// a secret that the members share, are good for a few seconds, and are never
// answered: the port cannot be used to find out anything or to amplify traffic.
//
// # Wire
//
// A hint is one UDP datagram of 73 bytes:
//
//	magic "byokdH1" 7 | sender 16 | key 16 | time 8 | first 26 bytes of the MAC
//
// sender is random for each process. key is the beginning of the SHA-256 of the
// key's ARN. time is Unix milliseconds, big-endian. The MAC is HMAC-SHA-256 of
// everything before it. A datagram lost costs the receiver what it would have had
// without hints: its own interval.
//
// # Concurrency
//
// Run owns the socket and the list of members. Member methods are safe for
// concurrent use and never block.
package fleet
