//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/byokd/byokd/keyguard"
)

// gateGoal is what Enter, Err and Exit may take together on one core, in nanoseconds.
const gateGoal = 15

// gateCost is what the gate takes from each request, in nanoseconds for Enter, Err
// and Exit.
type gateCost struct {
	OneCore  float64 `json:"oneCore"`
	Parallel float64 `json:"parallel"` // on all cores at once, a lane each
	Cores    int     `json:"cores"`
	Goal     float64 `json:"goal"`
}

// measureGate measures an open gate.
func measureGate(ctx context.Context, o options, stdout io.Writer) (_ *gateCost, err error) {
	guard, err := keyguard.New(willing{}, keyguard.Options{Name: "bench", ProbeBinding: keyguard.Binding{Cluster: "bench"}})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = guard.Run(ctx) })
	defer running.Wait()
	defer stop()
	if err := await(func() bool { return guard.Status().Gate == keyguard.Open }); err != nil {
		return nil, fmt.Errorf("the gate does not open: %w", err)
	}
	cost := &gateCost{Cores: runtime.GOMAXPROCS(0), Goal: gateGoal}
	var one, all []float64
	o.progress.step("the gate")
	for range 2*o.rounds + 1 {
		one = append(one, passes(ctx, guard, 1))
		all = append(all, passes(ctx, guard, cost.Cores))
	}
	cost.OneCore, cost.Parallel = middle(one), middle(all)
	late := ""
	if cost.OneCore > cost.Goal {
		late = " ▼"
	}
	fmt.Fprintf(stdout, "\nGate: %.1f ns for Enter, Err and Exit on one core%s (goal: %.0f), %.1f ns for each of %d cores at once\n", cost.OneCore, late, cost.Goal, cost.Parallel, cost.Cores)
	return cost, nil
}

func middle(all []float64) float64 {
	slices.Sort(all)
	return (all[len(all)/2] + all[(len(all)-1)/2]) / 2
}

// passes returns the nanoseconds of a pass, on so many cores at once.
func passes(ctx context.Context, guard *keyguard.Guard, cores int) float64 {
	const each = 4_000_000
	var working sync.WaitGroup
	began := time.Now()
	for lane := range cores {
		working.Go(func() {
			for range each {
				pass, err := guard.Enter(ctx, keyguard.Work, uint32(lane))
				if err != nil || pass.Err() != nil {
					panic("the gate closed")
				}
				pass.Exit()
			}
		})
	}
	working.Wait()
	return float64(time.Since(began).Nanoseconds()) / each
}

// willing is a key that nobody takes away, and that protects nothing.
type willing struct{}

var errNothingWrapped = errors.New("this key has wrapped nothing")

func (willing) ARN() string {
	return "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-000000000000"
}

func (k willing) GenerateProbe(context.Context, keyguard.Binding) ([]byte, keyguard.Receipt, error) {
	return []byte("probe"), keyguard.Receipt{KeyARN: k.ARN()}, nil
}

func (k willing) Probe(context.Context, []byte, keyguard.Binding) (keyguard.Receipt, error) {
	return keyguard.Receipt{KeyARN: k.ARN()}, nil
}

func (willing) GenerateDataKey(context.Context, keyguard.Binding, func([]byte) error) ([]byte, keyguard.Receipt, error) {
	return nil, keyguard.Receipt{}, errNothingWrapped
}

func (willing) Unwrap(context.Context, []byte, keyguard.Binding, func([]byte) error) (keyguard.Receipt, error) {
	return keyguard.Receipt{}, errNothingWrapped
}

func (willing) Describe(context.Context) (keyguard.Description, error) {
	return keyguard.Description{State: keyguard.Enabled, Raw: "Enabled"}, nil
}
