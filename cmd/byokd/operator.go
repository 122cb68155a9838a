package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/internal/control"
	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/keyguard"
)

const (
	// thawWait bounds how long a thaw is waited for before it is told as recorded: it is promised within 2 s.
	thawWait = 10 * time.Second
	// quiesceTries bounds how often a freeze is repeated that could not take everything from the kernel in
	// time. Between two of them the volume serves, and the next drain begins with less.
	quiesceTries = 5
	// quiesceFlush bounds one write-back before such a freeze: the kernel holds volume.dirtyLimit dirty, and a
	// disk that takes longer than this for them is ill.
	quiesceFlush = 30 * time.Second
	// askGuard bounds how long a guard may take to carry out a request: a freeze is done within a second, and
	// waits for at most one other.
	askGuard = 10 * time.Second
	// maxHeld bounds the file of held keys: a list of their names.
	maxHeld = 64 << 10
)

// operator carries out what people ask for on the control socket.
type operator struct {
	d        *daemon
	listener net.Listener
	heldFile string

	rewrapping sync.Mutex // one rewrap at a time
	checking   sync.Mutex // one check at a time

	mu   sync.Mutex      // one freeze or thaw at a time
	held map[string]bool // guarded by mu: the keys whose freeze outlives a restart
}

// operatorRequest asks for a freeze or a thaw.
type operatorRequest struct {
	Keys    []string `json:"keys,omitempty"` // by name; none stands for all
	Quiesce bool     `json:"quiesce,omitempty"`
}

// operatorReport is what came of it.
type operatorReport struct {
	Keys     []keyOutcome `json:"keys"`
	Quiesced bool         `json:"quiesced,omitempty"` // the lower disk is consistent, a snapshot may be taken
}

// keyOutcome is what came of it for one key.
type keyOutcome struct {
	Name    string             `json:"name"`
	KeyARN  string             `json:"keyArn"`
	Key     keyguard.KeyState  `json:"key"`
	Gate    keyguard.GateState `json:"gate"`
	Pending keyguard.Intent    `json:"pending,omitempty"` // recorded: carried out when the key is back
	Cause   string             `json:"cause"`
}

// recorded tells whether anything waits for a key.
func (r operatorReport) recorded() bool {
	return slices.ContainsFunc(r.Keys, func(k keyOutcome) bool { return k.Pending != keyguard.NoIntent })
}

// newOperator listens at the control socket; nil without one.
func newOperator(d *daemon) (*operator, error) {
	path := d.cfg.Admin.Socket
	if path == "" {
		return nil, nil
	}
	o := &operator{d: d, heldFile: path + ".held", held: map[string]bool{}}
	if err := o.recall(); err != nil {
		return nil, err
	}
	var err error
	o.listener, err = control.Listen(path)
	return o, err
}

// serve answers until ctx ends.
func (o *operator) serve(ctx context.Context) error {
	operations := map[string]control.Operation{"freeze": o.freeze, "thaw": o.thaw, "rewrap": o.rewrap, "check": o.check,
		"worker": o.worker, "upgrade": o.upgrade}
	return control.NewServer(operations, o.d.log.Named("control")).Serve(ctx, o.listener)
}

// recall reads which keys an earlier run was asked to keep frozen: a byokd that dies and is started anew in
// the middle of a snapshot must not go on writing.
func (o *operator) recall() error {
	text, err := durable.ReadFile(o.heldFile, maxHeld)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var names []string
	decoder := json.NewDecoder(bytes.NewReader(text))
	if err := decoder.Decode(&names); err != nil {
		return fmt.Errorf("%s is damaged; it lists the keys that an operator has frozen. Remove it to start without such a freeze: %w", o.heldFile, err)
	}
	for _, name := range names {
		if _, known := o.d.cfg.Keys[name]; known {
			o.held[name] = true
		}
	}
	return nil
}

// remember writes which keys are to stay frozen over a restart. It is called with mu held.
func (o *operator) remember() error {
	if len(o.held) == 0 {
		if err := os.Remove(o.heldFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.Marshal(slices.Sorted(maps.Keys(o.held)))
	if err != nil {
		return err
	}
	return durable.WriteFile(o.heldFile, append(text, '\n'), 0o600)
}

// guards are those that a request names.
func (o *operator) guards(request json.RawMessage) (operatorRequest, []*keyguard.Guard, error) {
	var q operatorRequest
	decoder := json.NewDecoder(bytes.NewReader(request))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&q); err != nil {
		return q, nil, &control.Failure{Code: exitUsage, Text: "the request cannot be read: " + err.Error()}
	}
	known := slices.Sorted(maps.Keys(o.d.guards))
	if len(q.Keys) == 0 {
		q.Keys = known
	}
	var guards []*keyguard.Guard
	for _, name := range q.Keys {
		g := o.d.guards[name]
		if g == nil {
			return q, nil, &control.Failure{Code: exitUsage, Text: fmt.Sprintf("there is no key called %q; there are: %s", name, strings.Join(known, ", "))}
		}
		guards = append(guards, g)
	}
	return q, guards, nil
}

// freeze closes the gates of the named keys.
func (o *operator) freeze(ctx context.Context, from control.Peer, request json.RawMessage, progress func(any)) (any, error) {
	q, guards, err := o.guards(request)
	if err != nil {
		return nil, err
	}
	if err := o.quiescible(q); err != nil {
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, name := range q.Keys {
		o.held[name] = true
	}
	if err := o.remember(); err != nil {
		// The freeze itself needs no file, and is worth more than its memory.
		o.d.log.Error("the freeze will not outlive a restart", zap.Error(err))
	}
	volume := o.volumeOf(guards)
	if !q.Quiesce || volume == nil {
		statuses, err := onEach(ctx, guards, from.String(), (*keyguard.Guard).OperatorFreeze)
		if err != nil {
			return nil, errors.Join(err, o.forget(ctx, guards, from))
		}
		return reportOf(statuses, q.Quiesce), nil
	}
	return o.quiesce(ctx, volume, guards, from, progress)
}

// quiescible refuses to call a disk consistent that the freeze would leave out, or of which nobody knows what the kernel
// still holds for it.
func (o *operator) quiescible(q operatorRequest) error {
	v := o.d.volume
	switch {
	case !q.Quiesce || v == nil:
		return nil
	case !slices.Contains(q.Keys, v.cfg.Volume.Key):
		return &control.Failure{Code: exitUsage, Text: fmt.Sprintf("--quiesce is about the volume, which is under the key %s: say --key %s, too", v.cfg.Volume.Key, v.cfg.Volume.Key)}
	case v.mounted.Load() == nil && (v.takesOver() || v.passed()):
		return errors.New("nothing is frozen on request: the mount is not served yet, and the kernel may hold writes for it that are not on the lower disk. Bring the key back first, or freeze without --quiesce")
	}
	return nil
}

// volumeOf is the volume, if it is mounted and one of the guards is its.
func (o *operator) volumeOf(guards []*keyguard.Guard) *volume {
	v := o.d.volume
	if v == nil || v.mounted.Load() == nil || !slices.Contains(guards, v.guard) {
		return nil
	}
	return v
}

// quiesce freezes so that all data is on the lower disk. A drain that ran out of time is repeated, since a
// freeze has no other chance to flush; one that was in force before, and left something, cannot be.
func (o *operator) quiesce(ctx context.Context, v *volume, guards []*keyguard.Guard, from control.Peer, progress func(any)) (any, error) {
	served := v.guard.Status().Ready()
	for try := 1; ; try++ {
		flush, cancel := context.WithTimeout(ctx, quiesceFlush)
		if v.guard.Status().Ready() {
			if err := v.mounted.Load().Flush(flush); err != nil {
				cancel()
				return nil, fmt.Errorf("nothing is frozen, since what is dirty cannot be written to the lower disk: %w", errors.Join(err, o.forget(ctx, guards, from)))
			}
		}
		cancel()
		statuses, err := onEach(ctx, guards, from.String(), (*keyguard.Guard).OperatorFreeze)
		if err != nil {
			return nil, errors.Join(err, o.forget(ctx, guards, from))
		}
		err = v.mounted.Load().Settled()
		if err == nil {
			return reportOf(statuses, true), nil
		}
		progress(fmt.Sprintf("try %d: %v", try, err))
		if !served {
			return nil, fmt.Errorf("frozen, but not consistent on the lower disk, and it was frozen before: thaw (and bring the key back), then freeze with --quiesce: %w", err)
		}
		if try == quiesceTries {
			return nil, fmt.Errorf("nothing is frozen any more: %w; try again when less is being written", errors.Join(err, o.forget(ctx, guards, from)))
		}
		if _, err := onEach(ctx, guards, from.String(), (*keyguard.Guard).OperatorThaw); err != nil {
			return nil, err
		}
		if !waitReady(ctx, v.guard) {
			return nil, ctx.Err()
		}
	}
}

// forget takes a freeze back that did not come to what was asked for. It is called with mu held.
func (o *operator) forget(ctx context.Context, guards []*keyguard.Guard, from control.Peer) error {
	for _, g := range guards {
		delete(o.held, g.Status().Name)
	}
	_, err := onEach(ctx, guards, from.String(), (*keyguard.Guard).OperatorThaw)
	return errors.Join(err, o.remember())
}

// thaw takes freezes back, and waits until the gates are open or it is clear that a key is away.
func (o *operator) thaw(ctx context.Context, from control.Peer, request json.RawMessage, _ func(any)) (any, error) {
	q, guards, err := o.guards(request)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, name := range q.Keys {
		delete(o.held, name)
	}
	if err := o.remember(); err != nil {
		return nil, fmt.Errorf("nothing is thawed, since a restart would freeze again: %w", err)
	}
	if _, err := onEach(ctx, guards, from.String(), (*keyguard.Guard).OperatorThaw); err != nil {
		return nil, err
	}
	limit, cancel := context.WithTimeout(ctx, thawWait)
	defer cancel()
	var statuses []keyguard.Status
	for _, g := range guards {
		statuses = append(statuses, settled(limit, g))
	}
	return reportOf(statuses, false), nil
}

// settled waits until a guard is open, or KMS is known to withhold its key, or ctx ends.
func settled(ctx context.Context, g *keyguard.Guard) keyguard.Status {
	for {
		changed := g.Changed()
		s := g.Status()
		if s.Ready() || s.Key != keyguard.Enabled && s.Key != keyguard.Unknown || s.OperatorFreeze {
			return s
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return s
		}
	}
}

// onEach asks all guards at the same time. A client that leaves does not end it half-way: what is written down
// about a freeze and what is done must be the same.
func onEach(ctx context.Context, guards []*keyguard.Guard, by string, ask func(*keyguard.Guard, context.Context, string) (keyguard.Status, error)) ([]keyguard.Status, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askGuard)
	defer cancel()
	statuses, errs := make([]keyguard.Status, len(guards)), make([]error, len(guards))
	var all sync.WaitGroup
	for i, g := range guards {
		all.Go(func() { statuses[i], errs[i] = ask(g, ctx, by) })
	}
	all.Wait()
	err := errors.Join(errs...)
	if errors.Is(err, keyguard.ErrStopped) {
		return nil, &control.Failure{Code: exitStopping, Text: "byokd is stopping"}
	}
	return statuses, err
}

func reportOf(statuses []keyguard.Status, quiesced bool) operatorReport {
	r := operatorReport{Quiesced: quiesced}
	for _, s := range statuses {
		r.Keys = append(r.Keys, keyOutcome{Name: s.Name, KeyARN: s.KeyARN, Key: s.Key, Gate: s.Gate, Pending: s.OperatorPending, Cause: s.Cause()})
	}
	return r
}
