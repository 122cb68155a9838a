package fs

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
	"golang.org/x/sys/unix"
)

// RewrapOptions say to which KMS key a volume moves.
type RewrapOptions struct {
	// To is the KMS key that shall wrap the root key.
	To keyguard.KMS
	// Rewrap wraps under To what the KMS key of that ARN has wrapped, in the same
	// encryption context. It is not called when To wraps the root key already.
	Rewrap func(ctx context.Context, fromARN string, wrapped []byte, b keyguard.Binding) ([]byte, error)
	// Finish forgets the form under every other KMS key.
	Finish bool
	// Step is told before each step; an error ends the rewrap there. May be nil.
	Step func(RewrapStep) error
}

// RewrapStep is one step of a rewrap. It may end after any of them, by a kill too,
// and be begun anew.
type RewrapStep string

// The steps, in their order; the last three come once more when it finishes.
const (
	StepRead        RewrapStep = "read the header"
	StepWrap        RewrapStep = "wrap the root key under the new KMS key"
	StepProbe       RewrapStep = "make a probe under the new KMS key"
	StepVerify      RewrapStep = "unwrap with the new KMS key and compare"
	StepWriteHeader RewrapStep = "write the header"
	StepWriteMark   RewrapStep = "write the record of its generation"
)

// RewrapReport says which KMS keys open a volume.
type RewrapReport struct {
	Volume     string   `json:"volume"`
	Generation uint64   `json:"generation"` // of the header
	KMS        []string `json:"kms"`        // ARNs of the KMS keys that wrap the root key, one or two
	Changed    bool     `json:"changed"`    // by this run
}

// Under reports whether a KMS key wraps the root key.
func (r RewrapReport) Under(keyARN string) bool { return slices.Contains(r.KMS, keyARN) }

func reportOf(h seal.VolumeHeader) RewrapReport {
	r := RewrapReport{Volume: h.Volume.String(), Generation: h.Generation}
	for _, form := range h.Forms() {
		r.KMS = append(r.KMS, form.KeyARN)
	}
	return r
}

// RewrapStatus tells which KMS keys open the volume in a lower directory, without
// asking any of them: the header is not authenticated.
func RewrapStatus(lower string) (RewrapReport, error) {
	header, err := ReadHeader(lower)
	if err != nil {
		return RewrapReport{}, err
	}
	return reportOf(header), nil
}

// Rewrap puts the root key of a volume under another KMS key beside the present
// one, or with Finish under that one alone. No data is written. The directory must
// not be in use (ErrBusy): a running byokd does this itself, see Filesystem.Rewrap.
func Rewrap(ctx context.Context, lower string, o RewrapOptions) (RewrapReport, error) {
	fd, err := openLower(lower)
	if err != nil {
		return RewrapReport{}, err
	}
	defer unix.Close(fd)
	return rewrap(ctx, lower, 0, o)
}

// Rewrap is Rewrap for the volume while it is served.
func (f *Filesystem) Rewrap(ctx context.Context, o RewrapOptions) (RewrapReport, error) {
	f.rewrapping.Lock()
	defer f.rewrapping.Unlock()
	report, err := rewrap(ctx, f.lower, f.generation, o)
	f.generation = max(f.generation, report.Generation)
	return report, err
}

// rewrapper is one run. It belongs to the goroutine that began it.
type rewrapper struct {
	lower  string
	o      RewrapOptions
	header seal.VolumeHeader
	mark   *seal.VolumeMark
}

// rewrap works on a locked directory. floor is the newest generation known. The
// report is of the header that is on disk, also beside an error.
func rewrap(ctx context.Context, lower string, floor uint64, o RewrapOptions) (RewrapReport, error) {
	r := &rewrapper{lower: lower, o: o}
	if r.o.Step == nil {
		r.o.Step = func(RewrapStep) error { return nil }
	}
	if err := r.read(floor); err != nil {
		return RewrapReport{}, err
	}
	before := r.header.Generation
	err := r.add(ctx)
	if err == nil && o.Finish && r.header.Next != nil {
		err = r.finish(ctx)
	}
	report := reportOf(r.header)
	report.Changed = r.header.Generation != before
	return report, err
}

func (r *rewrapper) read(floor uint64) (err error) {
	if err := r.o.Step(StepRead); err != nil {
		return err
	}
	if r.header, err = ReadHeader(r.lower); err != nil {
		return err
	}
	if r.mark, err = readMark(r.lower); err != nil {
		return err
	}
	return refuseOlder(r.header.Generation, floor)
}

// add puts the form under To beside the present one.
func (r *rewrapper) add(ctx context.Context) error {
	to := r.o.To.ARN()
	if reportOf(r.header).Under(to) {
		return nil
	}
	if next := r.header.Next; next != nil {
		return fmt.Errorf("%w: it is on its way from %s to %s. Finish that first, or take it back: byokd key rewrap --finish --to one of the two", ErrMoving, r.header.KeyARN, next.KeyARN)
	}
	binding := keyguard.BindingOf(r.header.Binding)
	form := seal.KeyForm{KeyARN: to}
	var err error
	if err = r.o.Step(StepWrap); err != nil {
		return err
	}
	if form.WrappedRoot, err = r.o.Rewrap(ctx, r.header.KeyARN, r.header.WrappedRoot, binding); err != nil {
		return err
	}
	if err = r.o.Step(StepProbe); err != nil {
		return err
	}
	if form.Probe, _, err = r.o.To.GenerateProbe(ctx, binding); err != nil {
		return err
	}
	changed := r.header
	changed.Next = &form
	return r.replace(ctx, changed, form)
}

// finish forgets every form but that under To.
func (r *rewrapper) finish(ctx context.Context) error {
	forms := r.header.Forms()
	kept := forms[slices.IndexFunc(forms, func(f seal.KeyForm) bool { return f.KeyARN == r.o.To.ARN() })]
	changed := r.header
	changed.KeyARN, changed.WrappedRoot, changed.Probe, changed.Next = kept.KeyARN, kept.WrappedRoot, kept.Probe, nil
	return r.replace(ctx, changed, kept)
}

// replace writes a changed header once To has shown that it opens the volume:
// form gives the very root key under which the present header is authentic, and
// its probe is granted. The header comes before the record of its generation, so
// that a crash between the two leaves a header that is newer, which is right.
func (r *rewrapper) replace(ctx context.Context, changed seal.VolumeHeader, form seal.KeyForm) error {
	if err := r.o.Step(StepVerify); err != nil {
		return err
	}
	binding := keyguard.BindingOf(r.header.Binding)
	if _, err := r.o.To.Probe(ctx, form.Probe, binding); err != nil {
		return err
	}
	changed.Generation++
	mark := seal.VolumeMark{Volume: changed.Volume, Generation: changed.Generation}
	_, err := r.o.To.Unwrap(ctx, form.WrappedRoot, binding, func(plain []byte) error {
		root, err := seal.NewRoot(changed.Volume, plain)
		if err != nil {
			return err
		}
		defer root.Wipe()
		if err := checkMark(root, r.header, r.mark); err != nil {
			return err
		}
		if changed, err = root.SignVolumeHeader(changed); err != nil {
			return err
		}
		mark, err = root.SignVolumeMark(mark)
		return err
	})
	if errors.Is(err, seal.ErrTampered) {
		return fmt.Errorf("what %s unwraps is not the root key of this volume, or the header was changed: %w", r.o.To.ARN(), err)
	}
	if err != nil {
		return err
	}
	text, err := changed.Marshal()
	if err != nil {
		return err
	}
	if err := r.o.Step(StepWriteHeader); err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(r.lower, seal.VolumeHeaderName), text, 0o600); err != nil {
		return err
	}
	r.header = changed
	if err := r.o.Step(StepWriteMark); err != nil {
		return err
	}
	r.mark = &mark
	return writeMark(r.lower, mark)
}

// FormUnder returns the form of a volume's root key that a KMS key opens. The
// error, ErrOtherKey, tells the way out.
func FormUnder(h seal.VolumeHeader, keyARN string) (seal.KeyForm, error) {
	for _, form := range h.Forms() {
		if keyguard.SameKey(form.KeyARN, keyARN) {
			return form, nil
		}
	}
	return seal.KeyForm{}, fmt.Errorf("%w: it is wrapped by\n  %s\nthe configuration names\n  %s", ErrOtherKey, h.KeyARN, keyARN)
}
