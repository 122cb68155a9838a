package metrics

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/byokd/byokd/keyguard"
)

// historyLimit bounds the freeze history: the last twenty freezes with the four or five states that each
// freeze and thaw pass. Older ones are in the audit file.
const historyLimit = 100

// Panel gathers what is known about guards and resources. Safe for concurrent use.
type Panel struct {
	version, cluster, erasure string
	now                       func() time.Time

	guards    []Watched   // fixed before Watch
	resources []*Resource // fixed before Watch
	stopping  atomic.Bool
	keepReady bool // a freeze alone does not end readiness; fixed before Watch
	role      atomic.Pointer[string]

	mu      sync.Mutex
	history []Event                    // oldest first; guarded by mu
	last    map[string]keyguard.Status // by guard, what the history knows; guarded by mu
	changed chan struct{}              // closed at the next change; guarded by mu
}

// NewPanel returns an empty panel. erasure is "guaranteed" or "best_effort".
func NewPanel(version, cluster, erasure string) *Panel {
	return &Panel{version: version, cluster: cluster, erasure: erasure, now: time.Now,
		last: map[string]keyguard.Status{}, changed: make(chan struct{})}
}

// AddGuard adds a guard. Before Watch.
func (p *Panel) AddGuard(g Watched) { p.guards = append(p.guards, g) }

// KeepReady says that a freeze alone does not end readiness. Before Watch.
func (p *Panel) KeepReady() { p.keepReady = true }

// Resource is a protected resource. The zero state is waiting.
type Resource struct {
	panel             *Panel
	name, kind, where string
	guard             Watched

	mu     sync.Mutex
	state  State  // StateWaiting, StateReady, StateImpaired or StateFailed; guarded by mu
	note   string // guarded by mu
	next   string // the next step; guarded by mu
	facts  []Fact // guarded by mu
	served bool   // has been StateReady once; guarded by mu
}

// What a resource is.
const (
	KindVolume = "volume"
	KindBucket = "bucket"
)

// AddResource adds a resource that depends on guard. Before Watch. kind is KindVolume or KindBucket, where is
// shown to people.
func (p *Panel) AddResource(name, kind, where string, guard Watched) *Resource {
	r := &Resource{panel: p, name: name, kind: kind, where: where, guard: guard, state: StateWaiting}
	p.resources = append(p.resources, r)
	return r
}

// Serving says that the resource serves as far as its key allows.
func (r *Resource) Serving() { r.set(StateReady, "", "") }

// Waiting says what the resource waits for.
func (r *Resource) Waiting(note string) { r.set(StateWaiting, note, "") }

// Impaired says that the resource serves and is not well all the same, and what to do.
func (r *Resource) Impaired(note, nextStep string) { r.set(StateImpaired, note, nextStep) }

// Failed says that the resource does not serve for a reason other than its key, and what to do.
func (r *Resource) Failed(note, nextStep string) { r.set(StateFailed, note, nextStep) }

// Describe says how the resource is sealed.
func (r *Resource) Describe(facts ...Fact) {
	r.mu.Lock()
	r.facts = facts
	r.mu.Unlock()
	r.panel.announce()
}

func (r *Resource) set(s State, note, nextStep string) {
	r.mu.Lock()
	r.state, r.note, r.next = s, note, nextStep
	r.served = r.served || s == StateReady || s == StateImpaired
	r.mu.Unlock()
	r.panel.announce()
}

func (r *Resource) report() ResourceReport {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.guard.Status()
	out := ResourceReport{Name: r.name, Kind: r.kind, Key: s.Name, State: r.state, Where: r.where, Note: r.note, Next: r.next, Facts: r.facts}
	if key := stateOf(s.Gate, s.Key); key.worse(out.State) {
		out.State = key
	}
	return out
}

// RunsAs says which IAM role the key policies must allow.
func (p *Panel) RunsAs(role string) {
	p.role.Store(&role)
	p.announce()
}

// Stopping says that the daemon is on its way out: never ready again.
func (p *Panel) Stopping() {
	p.stopping.Store(true)
	p.announce()
}

// Changed returns a channel that is closed at the next change of anything reported.
func (p *Panel) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

func (p *Panel) announce() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.changed)
	p.changed = make(chan struct{})
}

// Watch follows all guards until ctx ends, keeping the history and announcing changes.
func (p *Panel) Watch(ctx context.Context) {
	var all sync.WaitGroup
	for _, g := range p.guards {
		all.Go(func() {
			for {
				changed := g.Changed() // before Status: a change in between is seen at once, not missed
				p.record(g.Status())
				select {
				case <-changed:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	all.Wait()
}

// record appends to the history when gate or key changed.
func (p *Panel) record(s keyguard.Status) {
	p.mu.Lock()
	last, known := p.last[s.Name]
	if !known || last.Gate != s.Gate || last.Key != s.Key {
		at := s.Since
		if known && last.Gate == s.Gate || at.IsZero() {
			at = p.now() // only the key changed: Since is older than that
		}
		reason := s.Reason
		if reason == keyguard.ReasonNone && s.OperatorFreeze {
			reason = keyguard.ReasonOperator
		}
		p.history = append(p.history, Event{At: at, Guard: s.Name, Gate: s.Gate, Key: s.Key, Reason: reason})
		if len(p.history) > historyLimit {
			p.history = append([]Event(nil), p.history[1:]...)
		}
	}
	p.last[s.Name] = s
	p.mu.Unlock()
	p.announce()
}

// Report gathers the present state of everything.
func (p *Panel) Report() Report {
	r := Report{Version: p.version, Cluster: p.cluster, Erasure: p.erasure, Time: p.now().UTC(), State: StateReady,
		Keys: []KeyReport{}, Resources: []ResourceReport{}, History: []Event{}}
	for i, g := range p.guards {
		key := keyReport(g.Status())
		r.Keys = append(r.Keys, key)
		if state := stateOf(key.Gate, key.Key); i == 0 || state.worse(r.State) {
			r.State, r.Headline, r.Cause, r.NextStep = state, key.Headline, key.Cause, key.NextStep
		}
	}
	for _, resource := range p.resources {
		one := resource.report()
		r.Resources = append(r.Resources, one)
		if one.State.worse(r.State) {
			// The keys are well, so it is the resource itself, or a call that its key's policy does not allow.
			r.State, r.Headline, r.Cause, r.NextStep = one.State, headlineOf(one), one.Note, one.Next
			if s := resource.guard.Status(); one.State == StateWaiting && s.Warning != "" {
				r.Cause, r.NextStep = one.Note+". "+s.Cause(), s.NextStep()
			}
		}
	}
	if p.stopping.Load() {
		r.State, r.Headline, r.Cause, r.NextStep = StateStopping, "byokd is stopping", "", ""
	}
	if role := p.role.Load(); role != nil {
		r.Role = *role
	}
	p.mu.Lock()
	for i := len(p.history) - 1; i >= 0; i-- {
		r.History = append(r.History, p.history[i])
	}
	p.mu.Unlock()
	return r
}

// headlineOf is the first line where a resource is to blame.
func headlineOf(r ResourceReport) string {
	name := "The " + r.Name
	if r.Kind == KindBucket {
		name = "The bucket " + r.Name
	}
	if r.State == StateImpaired {
		return name + " serves, but is not well"
	}
	return name + " is not ready"
}

// Ready reports whether every resource serves, with the report that says why not. After KeepReady, it is true while
// frozen, too, once everything has served.
func (p *Panel) Ready() (Report, bool) {
	r := p.Report()
	if p.keepReady && r.State == StateFrozen {
		_, started := p.Started()
		return r, started
	}
	return r, r.State == StateReady || r.State == StateImpaired || r.State == StateDegraded
}

// Started reports whether every resource has served at least once since the start. Once true it stays
// true: a freeze is no reason to start again.
func (p *Panel) Started() (Report, bool) {
	started := true
	for _, r := range p.resources {
		r.mu.Lock()
		started = started && r.served
		r.mu.Unlock()
	}
	return p.Report(), started
}
