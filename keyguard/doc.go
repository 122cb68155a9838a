// Package keyguard decides whether the keys below one KMS key may be used right
// now, holds them while they may, and erases them when they may not.
//
// # Job
//
// A Guard watches one KMS key. Two facts are kept apart: KeyState is what KMS
// says, GateState is what the guard does. Run is the only writer of both; it
// feeds what it sees (answers, silence, time) to the pure function step and does
// what step asks for.
//
//	Starting ──► Thawing ──► Open ◄──► Degraded      Degraded: KMS cannot be asked, the lease runs
//	    ▲           │  ▲       │          │
//	    └───────────┤  │       ▼          ▼
//	     (refused)  │  └──── Frozen ◄── Draining
//	                └──────────▲
//
// A clear refusal (disabled, pending deletion, deleted, material gone) closes at
// once. AccessDenied is asked about once more, since fresh grants give it for a
// moment; an invalid state that KMS does not name is settled by DescribeKey;
// either is confirmed within 400 ms or counts as confirmed. Everything else (no
// answer, throttling, credentials, faults nobody knows) is an outage: work goes on
// until the lease ends, counted from the start of the last granted call on a
// clock that also runs during suspend.
//
// # Guarantees
//
//   - From the first refusal to a closed gate at most 1 s; from the moment KMS
//     starts refusing at most the probe interval + 1 s, if KMS answers within
//     250 ms. Open again at most 2 s after KMS grants calls again.
//   - After the gate closed, Pass.Err is ErrFrozen for every pass of the epoch,
//     for ever. When Status.Erased is true, no key is referenced; where
//     Status.ErasureCertain, no copy is left in memory.
//   - Enter waits; it fails only with its context or with ErrStopped.
//   - Nothing but an unwrap of the pinned roots (or, without pins, a granted
//     probe) opens a closed gate.
//   - A wrapped key that KMS cannot open fails its own Load and moves no state:
//     whoever can write the storage must not be able to freeze anyone.
//   - Logging, audit and subscribers cannot delay the closing of the gate beyond
//     their deadlines: the first two are written by a goroutine of their own.
//
// # Using keys
//
//	for {
//		p, err := guard.Enter(ctx, keyguard.Work, lane)
//		if err != nil {
//			return err
//		}
//		root := p.Keys().Root(id)
//		if root == nil {
//			p.Exit() // never wait for the network with a pass in hand
//			if err := guard.Load(ctx, id, wrapped, binding); err != nil {
//				return err
//			}
//			continue
//		}
//		… work inside seal.Do …
//		if p.Err() == nil { reply(); p.Exit(); return nil }
//		p.Exit() // the result must not leave: drop it and wait
//	}
//
// # Order of a freeze
//
//  1. Gate Draining: class Work waits, class Drain passes.
//  2. Subscribers' Draining, in parallel, at most 500 ms; where a LateDrainer has
//     something left, at most 2 s more.
//  3. Gate Frozen: the epoch ends, calls of KMS for it are cut.
//  4. Subscribers' Frozen, in parallel, at most 500 ms.
//  5. In the background: wait until no pass of the epoch is in use, wipe and drop
//     the keys, run the collector three times, Status.Erased.
//
// # Order of a thaw
//
//  1. One granted probe, or three within a second if KMS refused in the last ten.
//  2. Gate Thawing: the pinned roots are unwrapped for a new epoch.
//  3. Subscribers' Thawed, in parallel, at most 250 ms.
//  4. Gate Open.
//
// # On request
//
// OperatorFreeze and OperatorThaw are observations like any other (operator.go).
// Held, the machine freezes as for a refusal, and granted calls tell that the key
// is there without opening. What is asked for while the key is away is pending until
// it is back, and then carried out.
//
// # Files
//
// gate.go holds the only lock-free code; transition.go is pure; guard.go is the
// interface to users, run.go, probe.go and freeze.go belong to Run's goroutine.
package keyguard
