package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/byokd/byokd/fs"
	"github.com/byokd/byokd/internal/control"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/awskms"
	"github.com/byokd/byokd/objstore"
)

// rewrapPatience is how long a step of a volume's rewrap is repeated while KMS gives no answer; rewrapPause lies
// between two tries.
const (
	rewrapPatience = time.Minute
	rewrapPause    = time.Second
)

// rewrapRequest says which key moves where.
type rewrapRequest struct {
	Key    string `json:"key,omitempty"`  // name in the configuration; the only one when left out
	To     string `json:"to"`             // ARN of the KMS key to move to
	From   string `json:"from,omitempty"` // ARN of the present one, where neither configuration nor header tell
	Finish bool   `json:"finish,omitempty"`
	DryRun bool   `json:"dryRun,omitempty"`
	Scan   bool   `json:"scan,omitempty"`
}

// rewrapReport is what was found and done.
type rewrapReport struct {
	Key      string         `json:"key"`
	From     string         `json:"from,omitempty"` // empty where nothing is under another key any more
	To       string         `json:"to"`
	Volume   *volumeRewrap  `json:"volume,omitempty"`
	Buckets  []bucketRewrap `json:"buckets,omitempty"`
	Needs    []string       `json:"needs"`    // what still needs another key than To, in words
	Finished bool           `json:"finished"` // nothing is wrapped by another key than To
}

// volumeRewrap is the volume's part.
type volumeRewrap struct {
	Lower string `json:"lower"`
	fs.RewrapReport
}

// bucketRewrap is one bucket's part.
type bucketRewrap struct {
	Name       string   `json:"name"`
	Keys       int      `json:"keys"`    // data keys in the keyring
	Waiting    int      `json:"waiting"` // of them, those that To does not wrap
	KMS        []string `json:"kms"`     // that wrap any of them
	Objects    int64    `json:"objects,omitempty"`
	Unreadable []string `json:"unreadable,omitempty"`
}

// rewrapJob moves everything that one key of the configuration protects. It is the same in a running byokd and
// without one; the difference is in volume and watched.
type rewrapJob struct {
	aws      awsConfigs
	cfg      Config
	request  rewrapRequest
	progress func(string)
	audit    func(keyguard.AuditRecord)
	// volume moves the volume; nil where there is none yet.
	volume func(context.Context, fs.RewrapOptions) (fs.RewrapReport, error)
	// running says that the configuration is that of a running byokd.
	running bool

	to   *boundedKMS
	from string
}

// run does what was asked for. The report is also there beside an error.
func (j *rewrapJob) run(ctx context.Context) (*rewrapReport, error) {
	report, err := j.move(ctx)
	return report, j.explain(err)
}

// explain adds what to do about a refusal of KMS, for the key that it is about.
func (j *rewrapJob) explain(err error) error {
	var k *keyguard.KMSError
	if !errors.As(err, &k) {
		return err
	}
	s := keyguard.Status{KeyARN: j.request.To, Endpoint: j.endpoint(j.request.To), Key: k.State, Reason: k.Reason, MissingAction: k.Action, Principal: k.Principal}
	if j.from != "" && strings.Contains(k.Error(), j.from) {
		s.KeyARN = j.from
	}
	if step := s.NextStep(); step != "" {
		return fmt.Errorf("%w\nNext step: %s", err, step)
	}
	return err
}

// move does the work of run.
func (j *rewrapJob) move(ctx context.Context) (*rewrapReport, error) {
	if err := j.resolve(ctx); err != nil {
		return nil, err
	}
	if j.request.DryRun {
		return j.status(ctx)
	}
	if err := j.refuseUnusable(ctx); err != nil {
		return nil, err
	}
	if err := j.each(ctx, false); err != nil {
		return nil, err
	}
	report, err := j.status(ctx)
	if err != nil || !j.request.Finish {
		return report, err
	}
	if len(report.Needs) > 0 {
		return report, &control.Failure{Code: exitStillNeeded, Text: fmt.Sprintf("everything is under\n  %s\nas well, and nothing was taken from\n  %s\nsince these still need it:\n  - %s",
			report.To, report.From, strings.Join(report.Needs, "\n  - "))}
	}
	if err := j.each(ctx, true); err != nil {
		return report, err
	}
	report, err = j.status(ctx)
	if err == nil && !report.Finished {
		err = fmt.Errorf("data keys were made under another key meanwhile; rewrap once more")
	}
	return report, err
}

// resolve finds out which key moves from where, and makes the client of the one it moves to.
func (j *rewrapJob) resolve(ctx context.Context) error {
	q := &j.request
	names := slices.Sorted(maps.Keys(j.cfg.Keys))
	if q.Key == "" {
		for _, name := range names {
			if len(names) == 1 || j.cfg.Keys[name].ARN == q.To {
				q.Key = name
			}
		}
	}
	key, known := j.cfg.Keys[q.Key]
	if !known {
		return &control.Failure{Code: exitUsage, Text: fmt.Sprintf("which key moves? Say --key with one of: %s", strings.Join(names, ", "))}
	}
	var err error
	if j.to, err = j.client(ctx, q.To); err != nil {
		return &control.Failure{Code: exitUsage, Text: "--to: " + err.Error()}
	}
	j.from = q.From
	if j.from == "" && key.ARN != q.To {
		j.from = key.ARN
	}
	if v, err := j.volumeStatus(); err == nil && v != nil && j.from == "" {
		for _, arn := range v.KMS {
			if arn != q.To {
				j.from = arn
			}
		}
	}
	return nil
}

// endpoint is the address of a key's KMS: that of its entry in the configuration, else, in the same region or on
// this machine, that of the key that moves.
func (j *rewrapJob) endpoint(arn string) string {
	for _, entry := range j.cfg.Keys {
		if entry.ARN == arn {
			return entry.Endpoint
		}
	}
	moving := j.cfg.Keys[j.request.Key]
	if regionOfARN(arn) == regionOfARN(moving.ARN) || isLocal(moving.Endpoint) {
		return moving.Endpoint
	}
	return ""
}

// client makes the client of a key.
func (j *rewrapJob) client(ctx context.Context, arn string) (*boundedKMS, error) {
	client, err := j.aws.newKMS(ctx, KeyConfig{ARN: arn, Endpoint: j.endpoint(arn)})
	if err != nil {
		return nil, err
	}
	return &boundedKMS{client}, nil
}

// refuseUnusable looks at the new key before anything is asked of the old one.
func (j *rewrapJob) refuseUnusable(ctx context.Context) error {
	d, err := j.to.Describe(ctx)
	if keyguard.StateOf(err) == keyguard.AccessDenied {
		return nil // the smallest policy may leave DescribeKey out; the rewrap itself will tell
	}
	if err != nil {
		return &control.Failure{Code: exitMisconfigured, Text: fmt.Sprintf("the key to move to, %s, cannot be looked at: %v", j.request.To, err)}
	}
	if d.State != keyguard.Enabled {
		return &control.Failure{Code: exitMisconfigured, Text: fmt.Sprintf("the key to move to, %s, is %s%s", j.request.To, d.State, prefixed(": ", d.Problem))}
	}
	return nil
}

// each moves the volume and every bucket; with finish, it takes their forms under other keys away.
func (j *rewrapJob) each(ctx context.Context, finish bool) error {
	for _, name := range j.buckets() {
		if err := j.bucket(ctx, name, finish); err != nil {
			return fmt.Errorf("bucket %s: %w", name, err)
		}
	}
	if j.volume == nil || !j.protectsVolume() {
		return nil
	}
	return j.moveVolume(ctx, finish)
}

func (j *rewrapJob) moveVolume(ctx context.Context, finish bool) error {
	o := fs.RewrapOptions{To: j.to, Finish: finish, Rewrap: j.wrap, Step: func(s fs.RewrapStep) error {
		j.progress("volume: " + string(s))
		return ctx.Err()
	}}
	deadline := time.Now().Add(rewrapPatience)
	for {
		_, err := j.volume(ctx, o)
		var kms *keyguard.KMSError
		if err == nil || !errors.As(err, &kms) || keyguard.StateOf(err) != keyguard.Unreachable || time.Now().After(deadline) {
			return err
		}
		j.progress("KMS does not answer, once more: " + err.Error())
		select {
		case <-time.After(rewrapPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// wrap wraps under the new key what another has wrapped, and records that.
func (j *rewrapJob) wrap(ctx context.Context, fromARN string, wrapped []byte, b keyguard.Binding) ([]byte, error) {
	from, err := j.client(ctx, fromARN)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	again, op, receipt, err := awskms.Rewrap(ctx, from.Client, j.to.Client, wrapped, b)
	if err != nil {
		return nil, err
	}
	j.audit(keyguard.AuditRecord{Time: time.Now(), Event: keyguard.AuditRewrap, Guard: j.request.Key, KeyARN: j.request.To, Key: keyguard.Enabled,
		Operation: op, RequestID: receipt.RequestID, Binding: b.Context(), Detail: "from " + fromARN})
	return again, nil
}

// buckets are those that the key protects.
func (j *rewrapJob) buckets() (names []string) {
	if j.cfg.Objects == nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(j.cfg.Objects.Buckets)) {
		if j.cfg.Objects.Buckets[name].Key == j.request.Key {
			names = append(names, name)
		}
	}
	return names
}

// bucketOptions are those of objstore's rewrap.
func (j *rewrapJob) bucketOptions(ctx context.Context, name string) (objstore.RewrapOptions, error) {
	b := j.cfg.Objects.Buckets[name]
	up, err := j.aws.newUpstream(ctx, b.Upstream)
	if err != nil {
		return objstore.RewrapOptions{}, err
	}
	o := objstore.RewrapOptions{Upstream: up, Binding: bucketBinding(j.cfg, b), To: j.to, Scan: j.request.Scan,
		Progress: func(p objstore.RewrapProgress) {
			j.progress(fmt.Sprintf("bucket %s: %d of %d data keys", name, p.Rewrapped, p.Keys))
		}}
	if j.from != "" {
		from, err := j.client(ctx, j.from)
		if err != nil {
			return o, err
		}
		o.From = from
		o.ReEncrypt = func(ctx context.Context, wrapped []byte, b keyguard.Binding) ([]byte, error) {
			return j.wrap(ctx, j.from, wrapped, b)
		}
	}
	return o, nil
}

// bucket moves one bucket. One that has no keyring has no data keys, and gets none.
func (j *rewrapJob) bucket(ctx context.Context, name string, finish bool) error {
	o, err := j.bucketOptions(ctx, name)
	if err != nil {
		return err
	}
	status, err := objstore.RewrapStatus(ctx, o)
	if err != nil || status.Keys == 0 && status.Found == 0 {
		return err
	}
	o.DropOld = finish
	_, err = objstore.Rewrap(ctx, o)
	return err
}

func (j *rewrapJob) protectsVolume() bool {
	return j.cfg.Volume != nil && j.cfg.Volume.Key == j.request.Key
}

// volumeStatus is nil where the key protects no volume, or one that was not made yet.
func (j *rewrapJob) volumeStatus() (*volumeRewrap, error) {
	if !j.protectsVolume() {
		return nil, nil
	}
	status, err := fs.RewrapStatus(j.cfg.Volume.Lower)
	if errors.Is(err, fs.ErrNotInitialised) {
		return nil, nil
	}
	if err != nil {
		return nil, &control.Failure{Code: exitLower, Text: err.Error()}
	}
	return &volumeRewrap{Lower: j.cfg.Volume.Lower, RewrapReport: status}, nil
}

// status looks at everything and writes nothing.
func (j *rewrapJob) status(ctx context.Context) (*rewrapReport, error) {
	report := &rewrapReport{Key: j.request.Key, From: j.from, To: j.request.To, Needs: []string{}}
	wrapping := map[string]bool{} // ARNs of all keys that wrap anything
	var err error
	if report.Volume, err = j.volumeStatus(); err != nil {
		return nil, err
	}
	if v := report.Volume; v != nil {
		if !v.Under(report.To) {
			report.Needs = append(report.Needs, fmt.Sprintf("the root key of the volume in %s", v.Lower))
		}
		for _, arn := range v.KMS {
			wrapping[arn] = true
		}
	}
	for _, name := range j.buckets() {
		b, err := j.bucketStatus(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("bucket %s: %w", name, err)
		}
		report.Buckets = append(report.Buckets, b)
		report.Needs = append(report.Needs, b.needs()...)
		for _, arn := range b.KMS {
			wrapping[arn] = true
		}
	}
	if arn := j.cfg.Keys[j.request.Key].ARN; arn != report.To {
		who := "the configuration: set keys.%s.arn to %s"
		if j.running {
			who = "the running byokd: set keys.%s.arn to %s in its configuration and restart it"
		}
		report.Needs = append(report.Needs, fmt.Sprintf(who, j.request.Key, report.To))
	}
	delete(wrapping, report.To)
	report.Finished = len(wrapping) == 0 && len(report.Needs) == 0
	return report, nil
}

func (j *rewrapJob) bucketStatus(ctx context.Context, name string) (bucketRewrap, error) {
	o, err := j.bucketOptions(ctx, name)
	if err != nil {
		return bucketRewrap{}, err
	}
	s, err := objstore.RewrapStatus(ctx, o)
	if err != nil {
		return bucketRewrap{}, err
	}
	return bucketRewrap{Name: name, Keys: s.Keys, Waiting: len(s.Waiting), KMS: s.KMS, Objects: s.Objects, Unreadable: s.Unreadable}, nil
}

// needs tells in words what of a bucket the new key does not open.
func (b bucketRewrap) needs() (needs []string) {
	if b.Waiting > 0 {
		needs = append(needs, fmt.Sprintf("bucket %s: %d of %d data keys", b.Name, b.Waiting, max(b.Keys, b.Waiting)))
	}
	if len(b.Unreadable) > 0 {
		needs = append(needs, fmt.Sprintf("bucket %s: objects whose headers cannot be read, the first: %s", b.Name, b.Unreadable[0]))
	}
	return needs
}
