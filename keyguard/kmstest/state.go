package kmstest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Key states as AWS names them.
const (
	stateEnabled                = "Enabled"
	stateDisabled               = "Disabled"
	statePendingDeletion        = "PendingDeletion"
	statePendingReplicaDeletion = "PendingReplicaDeletion"
	statePendingImport          = "PendingImport"
	stateUnavailable            = "Unavailable"
	stateCreating               = "Creating"
	stateUpdating               = "Updating"
)

// stateVersion is written to the state file; another one is refused.
const stateVersion = 1

const (
	stateFile = "kms.json"
	callsFile = "calls.jsonl"
)

// state is everything that survives a restart. A published state is never
// changed: writers work on a clone.
type state struct {
	Version  int                  `json:"version"`
	Keys     map[string]*key      `json:"keys"`     // by key ARN
	Families map[string]*family   `json:"families"` // by key id
	Aliases  map[string]*keyAlias `json:"aliases"`  // by alias ARN
}

// key is one KMS key in one region.
type key struct {
	ID          string     `json:"id"`
	ARN         string     `json:"arn"`
	Region      string     `json:"region"`
	Account     string     `json:"account"`
	Description string     `json:"description,omitempty"`
	State       string     `json:"state"`
	Created     time.Time  `json:"created"`
	Deletion    *time.Time `json:"deletion,omitempty"`     // while PendingDeletion
	Ready       *time.Time `json:"ready,omitempty"`        // while Creating: when it is Enabled
	PendingDays int        `json:"pending_days,omitempty"` // while PendingDeletion or PendingReplicaDeletion
	MultiRegion bool       `json:"multi_region,omitempty"`
	Spec        string     `json:"spec"`
	Usage       string     `json:"usage"`
	Origin      string     `json:"origin"`
	Policy      string     `json:"policy"`
	Tags        []tag      `json:"tags,omitempty"`
	Grants      []*grant   `json:"grants,omitempty"`
}

// family is what a key shares with its multi-Region siblings: material and
// rotation. A single-Region key is a family of one.
type family struct {
	PrimaryRegion string      `json:"primary_region"`
	Materials     []material  `json:"materials"` // the last one is current
	Rotation      rotation    `json:"rotation"`
	Rotations     []rotations `json:"rotations,omitempty"`
}

// material is one generation of key material.
type material struct {
	ID     string    `json:"id"` // 64 hexadecimal digits
	Secret []byte    `json:"secret"`
	Made   time.Time `json:"made"`
}

type rotation struct {
	Enabled    bool      `json:"enabled,omitempty"`
	PeriodDays int       `json:"period_days,omitempty"`
	Next       time.Time `json:"next,omitzero"`
}

// rotations is one carried out rotation.
type rotations struct {
	Date time.Time `json:"date"`
	Type string    `json:"type"` // AUTOMATIC or ON_DEMAND
}

type keyAlias struct {
	Name    string    `json:"name"`
	Region  string    `json:"region"`
	KeyARN  string    `json:"key_arn"`
	Created time.Time `json:"created"`
	Updated time.Time `json:"updated"`
}

type tag struct {
	Key   string `json:"TagKey"`
	Value string `json:"TagValue"`
}

func newState() *state {
	return &state{Version: stateVersion, Keys: map[string]*key{}, Families: map[string]*family{}, Aliases: map[string]*keyAlias{}}
}

func (st *state) clone() *state {
	raw, err := json.Marshal(st)
	if err != nil {
		panic(fmt.Sprintf("kmstest: state does not marshal: %v", err)) // plain data always does
	}
	out := newState()
	if err := json.Unmarshal(raw, out); err != nil {
		panic(fmt.Sprintf("kmstest: state does not unmarshal: %v", err))
	}
	return out
}

func (f *family) current() material { return f.Materials[len(f.Materials)-1] }

// siblings returns the keys that share k's material, in order of their ARNs.
func (st *state) siblings(k *key) []*key {
	var out []*key
	for _, other := range st.Keys {
		if other.ID == k.ID && other != k {
			out = append(out, other)
		}
	}
	slices.SortFunc(out, func(a, b *key) int { return strings.Compare(a.ARN, b.ARN) })
	return out
}

func (st *state) primary(k *key) bool {
	return st.Families[k.ID].PrimaryRegion == k.Region
}

// sortedKeys returns the keys of a region ("" means all) in order of creation.
func (st *state) sortedKeys(region string) []*key {
	var out []*key
	for _, k := range st.Keys {
		if region == "" || k.Region == region {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b *key) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.ARN, b.ARN)
	})
	return out
}

// sortedAliases returns the aliases of a region ("" means all) by name.
func (st *state) sortedAliases(region string) []*keyAlias {
	var out []*keyAlias
	for _, a := range st.Aliases {
		if region == "" || a.Region == region {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b *keyAlias) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.Region, b.Region)
	})
	return out
}

// remove deletes a key for good: its aliases, and with the last key of the
// family the material.
func (st *state) remove(k *key) {
	delete(st.Keys, k.ARN)
	for arn, a := range st.Aliases {
		if a.KeyARN == k.ARN {
			delete(st.Aliases, arn)
		}
	}
	if len(st.siblings(k)) == 0 {
		delete(st.Families, k.ID)
	}
}

// nextDue is the earliest time at which something happens by itself; zero if nothing does.
func (st *state) nextDue() time.Time {
	var due time.Time
	earliest := func(t time.Time) {
		if !t.IsZero() && (due.IsZero() || t.Before(due)) {
			due = t
		}
	}
	for _, k := range st.Keys {
		if k.State == statePendingDeletion && k.Deletion != nil {
			earliest(*k.Deletion)
		}
		if k.State == stateCreating && k.Ready != nil {
			earliest(*k.Ready)
		}
	}
	for _, f := range st.Families {
		if f.Rotation.Enabled {
			earliest(f.Rotation.Next)
		}
	}
	return due
}

// advance carries out what is due at now: deletions, replicas that become ready, the waiting primaries
// behind them, automatic rotations.
func (st *state) advance(now time.Time) {
	for _, k := range st.sortedKeys("") {
		if k.State == statePendingDeletion && k.Deletion != nil && !now.Before(*k.Deletion) {
			st.remove(k)
		}
	}
	for _, k := range st.Keys {
		if k.State == stateCreating && k.Ready != nil && !now.Before(*k.Ready) {
			k.State, k.Ready = stateEnabled, nil
		}
		if k.State == statePendingReplicaDeletion && len(st.siblings(k)) == 0 {
			at := now.AddDate(0, 0, k.PendingDays)
			k.State, k.Deletion = statePendingDeletion, &at
		}
	}
	for _, f := range st.Families {
		if f.Rotation.Enabled && !now.Before(f.Rotation.Next) {
			f.rotate(now, automatic)
			f.Rotation.Next = now.AddDate(0, 0, f.Rotation.PeriodDays)
		}
	}
}

func (f *family) rotate(now time.Time, kind string) {
	f.Materials = append(f.Materials, newMaterial(now))
	f.Rotations = append(f.Rotations, rotations{Date: now, Type: kind})
}

// loadState reads the state file of dir; a missing one is an empty state.
func loadState(dir string) (*state, error) {
	raw, err := os.ReadFile(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return newState(), nil
	}
	if err != nil {
		return nil, err
	}
	st := newState()
	if err := json.Unmarshal(raw, st); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, stateFile), err)
	}
	if st.Version != stateVersion {
		return nil, fmt.Errorf("%s: version %d, want %d", filepath.Join(dir, stateFile), st.Version, stateVersion)
	}
	return st, nil
}

// save replaces the state file so that a crash leaves the old or the new one.
func (st *state) save(dir string) error {
	raw, err := json.MarshalIndent(st, "", " ")
	if err != nil {
		return err
	}
	temp := filepath.Join(dir, stateFile+".new")
	if err := writeSynced(temp, raw); err != nil {
		return err
	}
	if err := os.Rename(temp, filepath.Join(dir, stateFile)); err != nil {
		return err
	}
	return syncDir(dir)
}

func writeSynced(path string, raw []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(raw); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
