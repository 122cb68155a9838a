package kmstest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// KeyInfo is a key as the control interface shows it.
type KeyInfo struct {
	ARN         string     `json:"arn"`
	ID          string     `json:"id"`
	Region      string     `json:"region"`
	State       string     `json:"state"` // as AWS names it
	Deletion    *time.Time `json:"deletion,omitempty"`
	Description string     `json:"description,omitempty"`
	Aliases     []string   `json:"aliases"`
	MultiRegion bool       `json:"multi_region"`
	Primary     bool       `json:"primary"`
	Spec        string     `json:"spec"`
	Usage       string     `json:"usage"`
	Created     time.Time  `json:"created"`
	Material    string     `json:"material"` // id of the current key material
	Grants      int        `json:"grants"`
	Denied      []string   `json:"denied"` // what Deny statements of the control interface forbid, as "action for principal"
}

// Control methods act on a key by themselves: no credentials, no policy, no
// faults. ref is a key ARN, a key id or an alias; without a region in it the
// alias or id is looked for in eu-central-1 first and then in the other regions.
// Each returns when the change is durable and visible to the next call.

// find resolves a reference of the control interface.
func (s *Server) find(st *state, ref string) (*key, error) {
	if strings.HasPrefix(ref, "arn:") {
		parts := strings.SplitN(ref, ":", 6)
		if len(parts) == 6 {
			k, aerr := s.resolve(st, parts[3], ref, aliasAllowed)
			if aerr == nil {
				return k, nil
			}
		}
		return nil, fmt.Errorf("no key %s", ref)
	}
	regions := []string{DefaultRegion}
	for _, k := range st.sortedKeys("") {
		if !slices.Contains(regions, k.Region) {
			regions = append(regions, k.Region)
		}
	}
	for _, region := range regions {
		if k, aerr := s.resolve(st, region, ref, aliasAllowed); aerr == nil {
			return k, nil
		}
	}
	return nil, fmt.Errorf("no key %s", ref)
}

// control changes one key outside of the AWS interface and logs it.
func (s *Server) control(what, ref string, f func(st *state, k *key) error) error {
	event := Call{Time: s.now(), Service: "devcloud", Operation: what, Key: ref, RequestID: newRequestID()}
	err := s.update(func(st *state) error {
		k, err := s.find(st, ref)
		if err != nil {
			return err
		}
		event.Key = k.ARN
		return f(st, k)
	})
	var aerr *apiError
	switch {
	case errors.As(err, &aerr):
		event.Error, event.Message = aerr.Code, aerr.Message
	case err != nil:
		event.Error, event.Message = "ControlError", err.Error()
	}
	s.calls.add(event)
	return err
}

// Disable disables a key.
func (s *Server) Disable(ref string) error {
	return s.control("Disable", ref, func(_ *state, k *key) error { return switchState(k, stateDisabled) })
}

// Enable enables a disabled key; a key that waits for its deletion must be cancelled first.
func (s *Server) Enable(ref string) error {
	return s.control("Enable", ref, func(_ *state, k *key) error { return switchState(k, stateEnabled) })
}

func switchState(k *key, to string) error {
	if k.State == statePendingDeletion || k.State == statePendingReplicaDeletion {
		return badState(k)
	}
	k.State = to
	return nil
}

// ScheduleDeletion puts a key into PendingDeletion; unlike AWS it takes any
// waiting period. The key is destroyed when the period has passed.
func (s *Server) ScheduleDeletion(ref string, after time.Duration) error {
	return s.control("ScheduleDeletion", ref, func(st *state, k *key) error {
		if k.State == statePendingDeletion || k.State == statePendingReplicaDeletion {
			return badState(k)
		}
		st.schedule(k, s.now().Add(after), int(after.Hours()+23)/24)
		return nil
	})
}

// CancelDeletion ends the waiting period and leaves the key Disabled.
func (s *Server) CancelDeletion(ref string) error {
	return s.control("CancelDeletion", ref, func(_ *state, k *key) error {
		if k.State != statePendingDeletion && k.State != statePendingReplicaDeletion {
			return errInvalidState(k.ARN, "is not pending deletion")
		}
		k.cancel()
		return nil
	})
}

// Delete destroys a key at once and for good, with its aliases. What was
// encrypted under it never decrypts again, unless a multi-Region sibling lives.
func (s *Server) Delete(ref string) error {
	return s.control("Delete", ref, func(st *state, k *key) error {
		st.remove(k)
		return nil
	})
}

// SetState forces a state that AWS reaches on other ways: Unavailable (custom
// key store down), PendingImport (imported material expired), Creating, Updating.
func (s *Server) SetState(ref, to string) error {
	return s.control("SetState", ref, func(_ *state, k *key) error {
		switch to {
		case stateEnabled, stateDisabled, stateUnavailable, statePendingImport, stateCreating, stateUpdating:
			k.State, k.Deletion, k.PendingDays = to, nil, 0
			return nil
		}
		return fmt.Errorf("cannot set state %q", to)
	})
}

// Rotate gives a key new material; old ciphertexts still open.
func (s *Server) Rotate(ref string) error {
	return s.control("Rotate", ref, func(st *state, k *key) error {
		st.Families[k.ID].rotate(s.now(), onDemand)
		return nil
	})
}

// Policy returns a key's policy document.
func (s *Server) Policy(ref string) (string, error) {
	st, err := s.snapshot()
	if err != nil {
		return "", err
	}
	k, err := s.find(st, ref)
	if err != nil {
		return "", err
	}
	return k.Policy, nil
}

// PutPolicy replaces a key's policy without the lockout check.
func (s *Server) PutPolicy(ref, text string) error {
	return s.control("PutPolicy", ref, func(_ *state, k *key) error {
		if _, aerr := parsePolicy(text); aerr != nil {
			return aerr
		}
		k.Policy = text
		return nil
	})
}

// CreateKey makes an enabled symmetric key in a region ("" means eu-central-1)
// with a policy ("" means DocumentedPolicy) and, unless empty, an alias, and
// returns its ARN.
func (s *Server) CreateKey(region, alias, policy string, multiRegion bool) (string, error) {
	if region == "" {
		region = DefaultRegion
	}
	if policy == "" {
		policy = DocumentedPolicy(s.account, TenantRole)
	}
	if _, aerr := parsePolicy(policy); aerr != nil {
		return "", aerr
	}
	var arn string
	err := s.update(func(st *state) error {
		c := &call{s: s, st: st, now: s.now(), region: region}
		k := c.addKey(&createKeyInput{KeySpec: symmetricDefault, KeyUsage: "ENCRYPT_DECRYPT", Origin: "AWS_KMS", MultiRegion: multiRegion, Policy: policy})
		arn = k.ARN
		if alias == "" {
			return nil
		}
		if aerr := checkAliasName(alias); aerr != nil {
			return aerr
		}
		name := aliasARN(region, s.account, alias)
		if _, ok := st.Aliases[name]; ok {
			return clientError("AlreadyExistsException", "An alias with the name %s already exists", name)
		}
		st.Aliases[name] = &keyAlias{Name: alias, Region: region, KeyARN: arn, Created: c.now, Updated: c.now}
		return nil
	})
	return arn, err
}

// Keys lists every key of every region in order of creation.
func (s *Server) Keys() ([]KeyInfo, error) {
	st, err := s.snapshot()
	if err != nil {
		return nil, err
	}
	out := []KeyInfo{}
	for _, k := range st.sortedKeys("") {
		info := KeyInfo{ARN: k.ARN, ID: k.ID, Region: k.Region, State: k.State, Deletion: k.Deletion, Description: k.Description,
			Aliases: []string{}, MultiRegion: k.MultiRegion, Primary: st.primary(k), Spec: k.Spec, Usage: k.Usage, Created: k.Created,
			Material: st.Families[k.ID].current().ID, Grants: len(k.Grants), Denied: deniedByControl(k.Policy)}
		for _, a := range st.sortedAliases(k.Region) {
			if a.KeyARN == k.ARN {
				info.Aliases = append(info.Aliases, a.Name)
			}
		}
		out = append(out, info)
	}
	return out, nil
}

// Inject adds a fault and returns it with its id and defaults.
func (s *Server) Inject(f Fault) (Fault, error) {
	added, err := s.faults.add(f)
	if err == nil {
		s.calls.add(Call{Time: s.now(), Service: "devcloud", Operation: "Inject", Fault: string(f.Kind), RequestID: newRequestID()})
	}
	return added, err
}

// Faults lists the active faults.
func (s *Server) Faults() []Fault { return s.faults.list() }

// ClearFault ends one fault; false if there is none with this id.
func (s *Server) ClearFault(id int) bool { return id > 0 && s.faults.remove(id) > 0 }

// Clear ends every fault and returns how many. Calls that hang go on.
func (s *Server) Clear() int {
	n := s.faults.remove(0)
	s.calls.add(Call{Time: s.now(), Service: "devcloud", Operation: "Clear", RequestID: newRequestID()})
	return n
}

// Throttle, Latency, ServerError, Hang and Cut inject a fault for the named KMS
// operations (none means all) until Clear.

// Throttle answers ThrottlingException.
func (s *Server) Throttle(operations ...string) {
	s.must(Fault{Kind: FaultThrottle, Operations: operations})
}

// Latency delays calls by d, 1 ms at least.
func (s *Server) Latency(d time.Duration, operations ...string) {
	s.must(Fault{Kind: FaultLatency, DelayMillis: max(1, d.Milliseconds()), Operations: operations})
}

// ServerError answers KMSInternalException with HTTP 500.
func (s *Server) ServerError(operations ...string) {
	s.must(Fault{Kind: FaultError, Operations: operations})
}

// Hang leaves calls without an answer.
func (s *Server) Hang(operations ...string) { s.must(Fault{Kind: FaultHang, Operations: operations}) }

// Cut resets the connections of calls.
func (s *Server) Cut(operations ...string) { s.must(Fault{Kind: FaultCut, Operations: operations}) }

func (s *Server) must(f Fault) {
	if _, err := s.Inject(f); err != nil {
		panic(err) // a caller's programming error: a delay out of range
	}
}

// AwaitCalls waits until n calls of an operation have succeeded or failed after seq.
func (s *Server) AwaitCalls(ctx context.Context, seq uint64, operation string, n int) error {
	_, err := s.WaitCall(ctx, seq, func(c Call) bool {
		if c.Operation == operation {
			n--
		}
		return n <= 0
	})
	return err
}
