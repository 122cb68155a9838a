//go:build linux

package test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/kmstest"
	"github.com/byokd/byokd/metrics"
)

// This file tests the promise: with readers and writers flat out on the mount and
// on the proxy, the key is taken away in every way there is; no plaintext byte
// leaves later than promised, everything hangs and nothing fails, no key is left
// in memory, and when the key is back, so is every acknowledged byte.

// The promises, docs/ARCHITECTURE.md.
const (
	freezeLimit = time.Second     // first refusal (or end of the lease) → last plaintext byte
	thawLimit   = 2 * time.Second // key usable → first plaintext byte
)

// rounds is how often each revocation is made, unless roundsVariable says.
const (
	rounds         = 3
	roundsVariable = "BYOKD_ROUNDS"
)

// revocation is one way to take a key away, and back.
type revocation struct {
	name     string
	refuse   func(s *stack, round int)
	restore  func(s *stack, round int) // returns when KMS grants again; nil: never
	cache    string                    // of the volume, if not the default
	alone    bool                      // byokd has no keeper
	key      keyguard.KeyState
	cause    string // in the status' cause …
	nextStep string // … and next step
	lease    bool   // not refused but unreachable: measured from the end of the lease
}

var revocations = []revocation{
	{
		name: "disable", key: keyguard.Disabled, cause: "is disabled", nextStep: "enable-key",
		refuse:  func(s *stack, _ int) { s.key(kmstest.KeyCommand{Do: "disable"}) },
		restore: func(s *stack, _ int) { s.key(kmstest.KeyCommand{Do: "enable"}) },
	},
	{
		name: "disable, write-through", cache: "writethrough", alone: true, key: keyguard.Disabled, cause: "is disabled", nextStep: "enable-key",
		refuse:  func(s *stack, _ int) { s.key(kmstest.KeyCommand{Do: "disable"}) },
		restore: func(s *stack, _ int) { s.key(kmstest.KeyCommand{Do: "enable"}) },
	},
	{
		name: "schedule deletion", key: keyguard.PendingDeletion, cause: "scheduled for deletion on ", nextStep: "cancel-key-deletion",
		refuse: func(s *stack, _ int) { s.key(kmstest.KeyCommand{Do: "schedule-deletion"}) },
		restore: func(s *stack, _ int) {
			s.key(kmstest.KeyCommand{Do: "cancel-deletion"})
			s.awaitKey(keyguard.Disabled) // cancelling leaves it disabled: nothing thaws yet
			s.key(kmstest.KeyCommand{Do: "enable"})
		},
	},
	{
		name: "deny", key: keyguard.AccessDenied, cause: "kms:Decrypt is denied to arn:aws:", nextStep: "put-key-policy",
		refuse: (*stack).deny,
		restore: func(s *stack, round int) {
			if round == 1 {
				s.putPolicy(kmstest.DocumentedPolicy(kmstest.DefaultAccount, kmstest.TenantRole))
				return
			}
			s.key(kmstest.KeyCommand{Do: "allow", Action: "*"})
		},
	},
	{
		name: "network", alone: true, key: keyguard.Unreachable, cause: "cannot be asked", nextStep: "goes on by itself", lease: true,
		refuse: func(s *stack, round int) {
			kinds := []kmstest.FaultKind{kmstest.FaultCut, kmstest.FaultHang, kmstest.FaultError}
			if _, err := s.control.Inject(s.t.Context(), kmstest.Fault{Kind: kinds[round%len(kinds)]}); err != nil {
				s.t.Fatal(err)
			}
		},
		restore: func(s *stack, _ int) {
			if _, err := s.control.Clear(s.t.Context(), 0); err != nil {
				s.t.Fatal(err)
			}
		},
	},
	{
		name: "delete", key: keyguard.Deleted, cause: "This is final", nextStep: "no way back",
		refuse: func(s *stack, _ int) { s.key(kmstest.KeyCommand{Do: "delete"}) },
	},
}

// deny takes the permission away: by an explicit denial of one action, by a
// policy of the key's owner without the role, by a denial of everything.
func (s *stack) deny(round int) {
	s.t.Helper()
	switch round {
	case 0:
		s.key(kmstest.KeyCommand{Do: "deny", Action: "Decrypt"})
	case 1:
		s.putPolicy(`{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::` +
			kmstest.DefaultAccount + `:root"}, "Action": "kms:*", "Resource": "*"}]}`)
	default:
		s.key(kmstest.KeyCommand{Do: "deny", Action: "*"})
	}
}

// putPolicy replaces the key's policy through the AWS interface.
func (s *stack) putPolicy(text string) {
	s.t.Helper()
	_, err := s.kms.PutKeyPolicy(s.t.Context(), &kms.PutKeyPolicyInput{KeyId: aws.String(s.arn), PolicyName: aws.String("default"), Policy: aws.String(text)})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) awaitKey(want keyguard.KeyState) {
	s.t.Helper()
	s.await("the key state "+want.String(), s.daemon, func() bool {
		r, ok := s.report()
		if ok && r.Keys[0].Gate.Admits() {
			s.t.Fatalf("the gate is open while the key is %v", r.Keys[0].Key)
		}
		return ok && r.Keys[0].Key == want
	})
}

func TestRevocation(t *testing.T) {
	rounds := rounds
	if n, err := strconv.Atoi(os.Getenv(roundsVariable)); err == nil {
		rounds = n
	}
	for _, r := range revocations {
		t.Run(r.name, func(t *testing.T) {
			if r.restore != nil {
				r.run(t, rounds)
				return
			}
			for range rounds { // what cannot be undone begins anew each time
				r.run(t, 1)
			}
		})
	}
}

// load is everything that runs on a stack.
type load struct {
	workers []*writerState
	clients []*client
}

// boards of the mount, of the proxy, of both.
func (l load) mount() []*board {
	var all []*board
	for _, w := range l.workers {
		all = append(all, w.board)
	}
	return all
}

func (l load) proxy() []*board {
	var all []*board
	for _, c := range l.clients {
		all = append(all, &c.board)
	}
	return all
}

func (l load) all() []*board { return append(l.mount(), l.proxy()...) }

// name is whose board it is.
func (l load) name(b *board) string {
	for _, w := range l.workers {
		if w.board == b {
			return w.name
		}
	}
	for _, c := range l.clients {
		if &c.board == b {
			return "the client " + c.name
		}
	}
	return "?"
}

// assertUnharmed checks that no call has failed.
func (l load) assertUnharmed(t *testing.T, when string) {
	t.Helper()
	for _, w := range l.workers {
		if w.ended() {
			t.Fatalf("%s: %s failed: %s", when, w.name, w.tail())
		}
	}
	for _, c := range l.clients {
		if err := c.failed(); err != nil {
			t.Fatalf("%s: the client %s failed: %v", when, c.name, err)
		}
	}
}

// startLoad runs everything flat out.
func (s *stack) startLoad() load {
	s.t.Helper()
	return load{workers: s.workers(slices.Concat(readers(), writers())...), clients: s.clients()}
}

// run makes one kind of revocation on a stack of its own.
func (r revocation) run(t *testing.T, rounds int) {
	s := newStack(t, shipped, withCache(r.cache), func(s *stack) { s.alone = r.alone })
	l := s.startLoad()
	s.awaitProgress(l)
	root, data := s.secrets()
	s.assertKeysInMemory(root, data)
	for round := range rounds {
		f := r.freeze(s, l, round)
		r.assertTold(s)
		s.assertErased(root, data)
		if r.restore == nil {
			s.assertHangs(l, thawLimit)
			s.assertHeld(l)
			t.Logf("%s: %v; for good", r.name, f)
			s.giveUp(l)
			return
		}
		r.thaw(s, l, round, &f)
		t.Logf("%s: %v", r.name, f)
		s.awaitProgress(l)
		l.assertUnharmed(t, "after the thaw")
	}
	s.finish(l)
}

// awaitProgress waits until every loop has done something since.
func (s *stack) awaitProgress(l load) {
	s.t.Helper()
	for _, b := range l.all() {
		before := b.Ops.Load()
		s.await("every loop to go on", s.daemon, func() bool {
			l.assertUnharmed(s.t, "going on")
			return b.Ops.Load() > before
		})
	}
}

// figures are the times of one freeze and thaw.
type figures struct {
	changed, refused, closed, erased, lastMount, lastProxy time.Time
	restored, opened, firstMount, firstProxy               time.Time
	from                                                   string // what refused is the moment of
}

func (f figures) String() string {
	ms := func(from, to time.Time) string { return fmt.Sprintf("%d ms", to.Sub(from).Milliseconds()) }
	text := fmt.Sprintf("%s → closed %s, last byte on the mount %s, on the proxy %s, erased %s; change → closed %s",
		f.from, ms(f.refused, f.closed), ms(f.refused, f.lastMount), ms(f.refused, f.lastProxy), ms(f.refused, f.erased), ms(f.changed, f.closed))
	if !f.restored.IsZero() {
		text += fmt.Sprintf("; usable → open %s, first byte on the mount %s, on the proxy %s",
			ms(f.restored, f.opened), ms(f.restored, f.firstMount), ms(f.restored, f.firstProxy))
	}
	return text
}

// freeze takes the key away and checks that everything stops in time and then hangs.
func (r revocation) freeze(s *stack, l load, round int) (f figures) {
	s.t.Helper()
	before, err := s.control.Status(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	f.changed = time.Now()
	r.refuse(s, round)
	var degraded time.Time
	if r.lease {
		degraded = s.awaitGate(keyguard.Degraded).Since
	}
	report := s.awaitGate(keyguard.Frozen)
	f.closed = report.Since
	if f.from, f.refused = "end of the lease", report.LastSuccess.Add(outageGrace); !r.lease {
		f.from, f.refused = "refusal", s.firstRefusal(before.LastCall)
	}
	s.await("the promised second to pass", s.daemon, func() bool { return time.Since(f.refused) > freezeLimit })
	s.assertHangs(l, settle)
	if r.lease {
		s.assertServedDuringLease(l, degraded)
	}
	f.lastMount, f.lastProxy = last(l.mount()), last(l.proxy())
	f.erased = s.awaitErased()
	for what, at := range map[string]time.Time{"the gate closed": f.closed, "the last byte left the mount": f.lastMount, "the last byte left the proxy": f.lastProxy} {
		if late := at.Sub(f.refused); late > freezeLimit {
			s.t.Errorf("%s: %s %v after the %s; promised %v", r.name, what, late, f.from, freezeLimit)
		}
		if late := at.Sub(f.changed); !r.lease && late > probeInterval+freezeLimit {
			s.t.Errorf("%s: %s %v after the change of the key; promised %v", r.name, what, late, probeInterval+freezeLimit)
		}
	}
	return f
}

// assertServedDuringLease checks that the outage stopped nothing before the lease
// ended. degraded is when byokd noticed it.
func (s *stack) assertServedDuringLease(l load, degraded time.Time) {
	s.t.Helper()
	for _, b := range l.all() {
		if b.Done.Load() < degraded.UnixNano() {
			s.t.Errorf("the lease ran from %v on, but %s stood still", degraded, l.name(b))
		}
	}
}

// firstRefusal finds in devcloud's call log when KMS first refused byokd after a call.
func (s *stack) firstRefusal(after uint64) time.Time {
	s.t.Helper()
	page, err := s.control.Calls(s.t.Context(), after, 0, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	refusals := []string{"DisabledException", "KMSInvalidStateException", "AccessDeniedException", "NotFoundException"}
	for _, c := range page.Calls {
		if c.AccessKey == kmstest.TenantAccessKey && slices.Contains(refusals, c.Error) {
			return c.Time
		}
	}
	s.t.Fatalf("byokd froze, but KMS has refused nothing in %d calls", len(page.Calls))
	return time.Time{}
}

// last is when the last call of any board ended.
func last(boards []*board) time.Time {
	at := int64(0)
	for _, b := range boards {
		at = max(at, b.Done.Load())
	}
	return time.Unix(0, at)
}

// assertHangs checks that for some time nothing ends, and nothing stands still
// for another reason than a call that hangs.
func (s *stack) assertHangs(l load, length time.Duration) {
	s.t.Helper()
	var before []uint64
	for _, b := range l.all() {
		before = append(before, b.Ops.Load())
	}
	time.Sleep(length) // nothing can be waited for: nothing happens
	l.assertUnharmed(s.t, "while frozen")
	for i, b := range l.all() {
		if n := b.Ops.Load() - before[i]; n > 0 {
			s.t.Errorf("while frozen, %s went on: %d calls", l.name(b), n)
		}
		if !b.hanging() {
			s.t.Errorf("while frozen, no call of %s hangs", l.name(b))
		}
	}
}

// thaw gives the key back and checks that everything goes on in time.
func (r revocation) thaw(s *stack, l load, round int, f *figures) {
	s.t.Helper()
	l.assertUnharmed(s.t, "before the thaw")
	for _, b := range l.all() {
		b.Resumed.Store(0)
	}
	r.restore(s, round)
	f.restored = time.Now()
	f.opened = s.awaitGate(keyguard.Open).Since
	f.firstMount, f.firstProxy = s.first(l, l.mount()), s.first(l, l.proxy())
	for what, at := range map[string]time.Time{"the gate opened": f.opened, "the first byte came from the mount": f.firstMount, "the first byte came from the proxy": f.firstProxy} {
		if late := at.Sub(f.restored); late > thawLimit {
			s.t.Errorf("%s: %s %v after the key was usable; promised %v", r.name, what, late, thawLimit)
		}
	}
}

// first is when the first call of any board ended that the freeze had held.
func (s *stack) first(l load, boards []*board) time.Time {
	s.t.Helper()
	at := int64(0)
	s.await("calls to come back", s.daemon, func() bool {
		l.assertUnharmed(s.t, "thawing")
		for _, b := range boards {
			if back := b.Resumed.Load(); back > 0 && (at == 0 || back < at) {
				at = back
			}
		}
		return at > 0
	})
	return time.Unix(0, at)
}

// finish ends the load and checks that all that was acknowledged is there, now
// and for a byokd that was started anew, and that nothing plain lies below.
func (s *stack) finish(l load) {
	s.t.Helper()
	s.retire(l.workers)
	s.retireClients(l.clients)
	told := claims(l.workers)
	s.once(task{Role: "list", Dir: s.mount})
	s.once(task{Role: "verify", Claims: told})
	s.verifyObjects(l.clients)
	s.stopDaemon()
	s.assertSealed()
	s.assertAuditJoins()
	s.startDaemon()
	s.awaitState(metrics.StateReady)
	s.once(task{Role: "verify", Claims: told})
	s.verifyObjects(l.clients)
}

// giveUp ends the load on a byokd that will never thaw, and byokd.
func (s *stack) giveUp(l load) {
	s.t.Helper()
	for _, w := range l.workers {
		w.kill()
	}
	for _, c := range l.clients {
		c.stop()
		<-c.done
	}
	s.stopDaemon()
	s.assertSealed()
	if _, err := s.kms.DescribeKey(context.Background(), &kms.DescribeKeyInput{KeyId: &s.arn}); err == nil {
		s.t.Error("the key is still there")
	}
}
