package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
)

// sealing is one `byokd seal`.
type sealing struct {
	aws    awsConfigs
	cfg    Config
	bucket string
	o      objstore.ConvertOptions
	stdout io.Writer
	stderr io.Writer
}

func newSealCommand(environ []string) *cobra.Command {
	var file string
	var s sealing
	cmd := &cobra.Command{
		Use: "seal --bucket NAME --config FILE", Short: "Seal the objects that were in a bucket before byokd", Args: cobra.NoArgs,
		Long: "Seals every plain object of a bucket in place; byokd refuses to serve such objects until then. An object is replaced\n" +
			"only after its sealed copy was read back and compared, and only if nobody has replaced it meanwhile: a writer who\n" +
			"comes between wins. byokd may serve the bucket at the same time. Stop it at any time and start it again: it goes on\n" +
			"with what is left. Content headers, metadata and tags are kept, and so are locks and, where s3:GetObjectAcl is\n" +
			"allowed, ACLs. Noncurrent versions stay as they are;\n" +
			"they are counted, and deleting them is yours.\n" +
			"Each plain object is read once and its sealed copy written twice and read four times. Needs s3:GetObject,\n" +
			"s3:PutObject, s3:DeleteObject, s3:ListBucket, s3:GetObjectTagging and s3:PutObjectTagging,\n" +
			"in a bucket with Object Lock s3:GetObjectRetention, s3:GetObjectLegalHold, s3:PutObjectRetention and\n" +
			"s3:PutObjectLegalHold, too.\n" +
			"Exit code 0 when no plain object is left, 1 when some could not be sealed (each is told), 9 when one of them is\n" +
			"damaged, 10 when KMS refuses the key.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkWorkers(s.o.Workers); err != nil {
				return err
			}
			cfg, _, err := loadConfig(file, environ)
			if err != nil {
				return exitWith(exitConfig, err)
			}
			s.cfg, s.stdout, s.stderr = cfg, cmd.OutOrStdout(), cmd.ErrOrStderr()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return s.run(ctx)
		},
	}
	configFlag(cmd, &file)
	flags := cmd.Flags()
	flags.StringVar(&s.bucket, "bucket", "", "the bucket, as its clients call it (required)")
	flags.StringVar(&s.o.Prefix, "prefix", "", "only objects whose key begins so")
	flags.BoolVar(&s.o.DryRun, "dry-run", false, "count the plain objects, and write nothing")
	flags.IntVar(&s.o.Workers, "workers", 4, "objects at once")
	if err := cmd.MarkFlagRequired("bucket"); err != nil {
		panic(err) // the flag was just made
	}
	return cmd
}

// sealHold is how long one step may wait for a frozen key: as good as for ever, for nobody waits for an
// answer, and the operator may end it.
const sealHold = 30 * 24 * time.Hour

func (s *sealing) run(ctx context.Context) error {
	if s.cfg.Objects == nil {
		return exitWith(exitConfig, errors.New("the configuration has no buckets (objects.buckets)"))
	}
	b, ok := s.cfg.Objects.Buckets[s.bucket]
	if !ok {
		return exitWith(exitConfig, fmt.Errorf("the configuration knows no bucket %q (objects.buckets)", s.bucket))
	}
	log := newLogger(LogConfig{Level: "warn", Format: s.cfg.Log.Format}, s.stderr)
	audit, err := openAudit(s.cfg.Audit.File, s.cfg.Audit.MaxSize.Bytes, log)
	if err != nil {
		return exitWith(exitConfig, err)
	}
	guard, stop, err := s.startGuard(ctx, b, audit)
	if err != nil {
		return errors.Join(err, audit.close())
	}
	up, err := s.aws.newUpstream(ctx, b.Upstream)
	if err == nil {
		err = s.convert(ctx, objstore.Options{
			Buckets:     map[string]objstore.Bucket{s.bucket: {Upstream: up, Guard: guard, Binding: bucketBinding(s.cfg, b), ClearMetadata: b.Metadata == metadataClear, Compress: b.Compression == compressionZstd}},
			Credentials: objstore.StaticCredentials{}, HoldFor: sealHold, Logger: log.Named("objstore"),
		})
	}
	stop()
	return errors.Join(err, exitWith(exitFailure, audit.close()))
}

// startGuard watches the bucket's key. A key that is refused at the start is told at once; one that is
// taken away later only makes the work wait.
func (s *sealing) startGuard(ctx context.Context, b BucketConfig, audit *auditTrail) (*keyguard.Guard, func(), error) {
	key := s.cfg.Keys[b.Key]
	kms, err := s.aws.newKMS(ctx, key)
	if err != nil {
		return nil, nil, exitWith(exitMisconfigured, err)
	}
	guard, err := keyguard.New(kms, keyguard.Options{
		Name: b.Key, Endpoint: key.Endpoint, ProbeInterval: key.ProbeInterval.Duration, OutageGrace: key.OutageGrace.Duration,
		ProbeBinding: keyguard.Binding{Cluster: s.cfg.Cluster.ID, Resource: "probe/" + b.Key, Tenant: s.cfg.Cluster.Tenant}, Audit: audit.record,
	})
	if err != nil {
		return nil, nil, exitWith(exitConfig, err)
	}
	runs, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- guard.Run(runs) }()
	stop := func() {
		cancel()
		<-ended
	}
	for {
		changed := guard.Changed()
		st := guard.Status()
		switch {
		case st.Ready():
			return guard, stop, nil
		case st.Key != keyguard.Unknown && st.Key != keyguard.Enabled:
			stop()
			return nil, nil, exitWith(exitFrozen, fmt.Errorf("%s: %s\nNext step: %s", st.Headline(), st.Cause(), st.NextStep()))
		}
		select {
		case <-changed:
		case err := <-ended:
			cancel()
			return nil, nil, exitWith(exitMisconfigured, err)
		case <-ctx.Done():
			stop()
			return nil, nil, exitWith(exitFailure, context.Cause(ctx))
		}
	}
}

// convert does the work and tells how far it is.
func (s *sealing) convert(ctx context.Context, o objstore.Options) error {
	proxy, err := objstore.New(o)
	if err != nil {
		return exitWith(exitConfig, err)
	}
	told := time.Now()
	s.o.Progress = func(r objstore.ConvertReport) {
		if time.Since(told) >= progressEvery {
			told = time.Now()
			s.tell(r)
		}
	}
	report, err := proxy.Convert(ctx, s.bucket, s.o)
	s.tell(report)
	for _, f := range report.Failures {
		fmt.Fprintf(s.stderr, "byokd: %s: %v\n", f.Key, f.Err)
	}
	switch {
	case err != nil:
		return exitWith(exitFailure, fmt.Errorf("ended early, run it again to go on: %w", err))
	case s.o.DryRun:
		return nil
	case report.Failed > 0 && objstore.Damaged(report.Failures[0].Err):
		return exitWith(exitDamaged, fmt.Errorf("%d objects are not sealed or damaged", report.Failed))
	case report.Failed > 0 || report.Plain > report.Converted:
		return exitWith(exitFailure, fmt.Errorf("%d objects are not sealed: run it again", report.Failed+report.Plain-report.Converted))
	case report.OldVersions > 0:
		return exitWith(exitFailure, fmt.Errorf("%d noncurrent versions are plain, and stay so until you delete them (a lifecycle rule for noncurrent versions does)", report.OldVersions))
	}
	return nil
}

func (s *sealing) tell(r objstore.ConvertReport) {
	what := fmt.Sprintf("%d sealed now", r.Converted)
	if s.o.DryRun {
		what = "nothing written"
	}
	line := fmt.Sprintf("%s: %d objects seen, %d sealed before, %d plain (%s), %s", s.bucket, r.Objects, r.Sealed, r.Plain, bytesInWords(r.PlainBytes), what)
	if r.Changed > 0 {
		line += fmt.Sprintf(", %d replaced by others meanwhile", r.Changed)
	}
	if r.Failed > 0 {
		line += fmt.Sprintf(", %d failed", r.Failed)
	}
	fmt.Fprintf(s.stderr, "byokd: %s\n", line)
}
