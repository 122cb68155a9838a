package keyguard

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func openGate(n uint64) (*gate, *epoch) {
	g := newGate()
	e := newEpoch(n, newKeys())
	g.open(e)
	return g, e
}

func TestEnterAdmitsByClass(t *testing.T) {
	g, _ := openGate(1)
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	enter := func(class Class) error {
		p, err := g.enter(ended, class, 3)
		if err == nil {
			p.Exit()
		}
		return err
	}
	for _, class := range []Class{Work, Drain} {
		if err := enter(class); err != nil {
			t.Errorf("open gate, class %d: %v", class, err)
		}
	}
	held, err := g.enter(context.Background(), Work, 3)
	if err != nil {
		t.Fatal(err)
	}
	g.drain()
	if err := enter(Work); !errors.Is(err, context.Canceled) {
		t.Errorf("draining gate, class Work: %v, want the context's error", err)
	}
	if err := enter(Drain); err != nil {
		t.Errorf("draining gate, class Drain: %v", err)
	}
	if err := held.Err(); err != nil {
		t.Errorf("a pass in use while draining: %v", err)
	}
	e := g.close()
	for _, class := range []Class{Work, Drain} {
		if err := enter(class); !errors.Is(err, context.Canceled) {
			t.Errorf("closed gate, class %d: %v, want the context's error", class, err)
		}
	}
	if err := held.Err(); !errors.Is(err, ErrFrozen) {
		t.Errorf("a pass in use after closing: %v, want ErrFrozen", err)
	}
	if err := e.waitIdle(ended); err == nil {
		t.Error("idle while a pass is in use")
	}
	held.Exit()
	if err := e.waitIdle(context.Background()); err != nil {
		t.Error(err)
	}
	g.open(newEpoch(2, newKeys()))
	if err := held.Err(); !errors.Is(err, ErrFrozen) {
		t.Errorf("a pass of an older epoch after a thaw: %v, want ErrFrozen", err)
	}
	if g.close(); g.close() != nil {
		t.Error("closing a closed gate ended an epoch")
	}
}

func TestEnterParksUntilOpenOrStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		results := make(chan error, 3)
		wait := func(ctx context.Context) {
			p, err := g.enter(ctx, Work, 1)
			if err == nil {
				p.Exit()
			}
			results <- err
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		go wait(t.Context())
		go wait(ctx)
		synctest.Wait()
		if n := g.waiting.Load(); n != 2 {
			t.Fatalf("%d calls wait, want 2", n)
		}
		time.Sleep(2 * time.Hour)
		if err := <-results; !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("call with a deadline: %v", err)
		}
		g.open(newEpoch(1, newKeys()))
		if err := <-results; err != nil {
			t.Fatalf("call without a deadline: %v", err)
		}
		g.close()
		go wait(t.Context())
		synctest.Wait()
		g.stop()
		if err := <-results; !errors.Is(err, ErrStopped) {
			t.Fatalf("after stop: %v", err)
		}
		synctest.Wait()
		if n := g.waiting.Load(); n != 0 {
			t.Fatalf("%d calls wait, want none", n)
		}
	})
}

func TestExitTwiceIsFound(t *testing.T) {
	g, e := openGate(1)
	p, _ := g.enter(context.Background(), Work, 5)
	p.Exit()
	p.Exit()
	defer func() {
		if recover() == nil {
			t.Error("a pass given back twice was not noticed")
		}
	}()
	e.stragglers()
}

// The interleaving that everything hangs on, made by hand: an Enter that loaded
// the epoch before it ended must not get in after nobody was found in use.
func TestEnterThatCameTooLateIsRefused(t *testing.T) {
	for _, class := range []Class{Work, Drain} {
		g, _ := openGate(1)
		e := g.admit[class].Load()
		if class == Work {
			g.drain()
		}
		g.close()
		if err := e.waitIdle(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.open(newEpoch(2, newKeys()))
		if g.admitTo(e, class, 3) {
			t.Errorf("class %d: admitted to an epoch that has ended", class)
		}
		if n := e.stragglers(); n != 0 {
			t.Errorf("class %d: %d passes in use", class, n)
		}
	}
}

// An opening must not slip between looking and parking. The opener waits a
// little longer each time, so that every moment of the other's way is tried.
func TestNoOpeningIsMissed(t *testing.T) {
	g := newGate()
	var round atomic.Uint64
	entered := make(chan struct{})
	const rounds = 30_000
	go func() {
		for n := uint64(1); n <= rounds; n++ {
			for spins := 0; round.Load() != n; spins++ {
				if spins > 10_000 { // the opener does not run beside us
					runtime.Gosched()
				}
			}
			if p, err := g.enter(context.Background(), Work, 0); err == nil {
				p.Exit()
			}
			entered <- struct{}{}
		}
	}()
	for n := uint64(1); n <= rounds; n++ {
		round.Store(n)
		for spin := uint64(0); spin < n%200; spin++ {
			round.Load()
		}
		g.open(newEpoch(n, newKeys()))
		<-entered
		g.close()
	}
}

// TestFreezeExcludesUse is the property behind erasure: after close and waitIdle
// nobody uses the keys of the epoch, and nobody's Err is nil after close. The
// epoch's guinea pig is written after each freeze without any lock, so that the
// race detector sees every use that overlaps.
func TestFreezeExcludesUse(t *testing.T) {
	const users, freezes = 8, 300
	g := newGate()
	var closedUpTo atomic.Uint64 // epochs up to this one have been closed
	secrets := make(map[uint64]*int)
	var mu sync.Mutex
	secret := func(n uint64) *int {
		mu.Lock()
		defer mu.Unlock()
		return secrets[n]
	}
	var stop atomic.Bool
	var used atomic.Int64
	var wg sync.WaitGroup
	for i := range users {
		class := Class(i % 2)
		wg.Go(func() {
			for !stop.Load() {
				p, err := g.enter(context.Background(), class, uint32(i))
				if err != nil {
					return
				}
				if value := secret(p.e.n); *value != 1 {
					t.Errorf("epoch %d: used after it was erased", p.e.n)
				}
				done := closedUpTo.Load() >= p.e.n
				if err := p.Err(); done && err == nil {
					t.Errorf("epoch %d is closed and Err is nil", p.e.n)
				}
				used.Add(1)
				p.Exit()
			}
		})
	}
	for n := uint64(1); n <= freezes; n++ {
		value := 1
		mu.Lock()
		secrets[n] = &value
		mu.Unlock()
		before := used.Load()
		g.open(newEpoch(n, newKeys()))
		for used.Load() < before+users { // let some work through
			runtime.Gosched()
		}
		if n%2 == 0 {
			g.drain()
		}
		e := g.close()
		closedUpTo.Store(n)
		if err := e.waitIdle(context.Background()); err != nil {
			t.Fatal(err)
		}
		value = 0 // a plain write: a race with any use that is left
	}
	stop.Store(true)
	g.stop()
	wg.Wait()
}

func TestEnterDoesNotAllocate(t *testing.T) {
	g, _ := openGate(1)
	ctx := context.Background()
	if n := testing.AllocsPerRun(1000, func() {
		p, err := g.enter(ctx, Work, 7)
		if err != nil || p.Err() != nil {
			t.Fatal("not admitted")
		}
		p.Exit()
	}); n != 0 {
		t.Errorf("%v allocations for Enter, Err and Exit", n)
	}
}

func BenchmarkGate(b *testing.B) {
	g := &Guard{gate: newGate()}
	g.gate.open(newEpoch(1, newKeys()))
	ctx := context.Background()
	b.Run("one core", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			p, err := g.Enter(ctx, Work, 7)
			if err != nil || p.Err() != nil {
				b.Fatal("not admitted")
			}
			p.Exit()
		}
	})
	b.Run("parallel, a lane each", func(b *testing.B) {
		b.ReportAllocs()
		var lanes atomic.Uint32
		b.RunParallel(func(pb *testing.PB) {
			lane := lanes.Add(1)
			for pb.Next() {
				p, _ := g.Enter(ctx, Work, lane)
				if p.Err() != nil {
					return
				}
				p.Exit()
			}
		})
	})
	b.Run("parallel, one lane", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				p, _ := g.Enter(ctx, Work, 7)
				if p.Err() != nil {
					return
				}
				p.Exit()
			}
		})
	})
	var mu sync.RWMutex
	b.Run("RWMutex, one core", func(b *testing.B) {
		for range b.N {
			mu.RLock()
			mu.RUnlock() //lint:ignore SA2001 its price is what is measured
		}
	})
	b.Run("RWMutex, parallel", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				mu.RLock()
				mu.RUnlock() //lint:ignore SA2001 its price is what is measured
			}
		})
	})
}
