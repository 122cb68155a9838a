package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/objstore"
)

// decryption is one `byokd decrypt`: what the command line says, and what follows from it.
type decryption struct {
	source      string
	output      string
	recursive   bool
	resume      bool
	metadata    bool
	zeroDamaged bool
	parts       int
	version     string
	region      string
	endpoint    string
	keyring     string
	from        keySource
	given       func(flag string) bool

	environ []string
	stdin   io.Reader
	stdout  io.Writer
	stderr  io.Writer
}

func newDecryptCommand(environ []string) *cobra.Command {
	d := &decryption{environ: environ}
	cmd := &cobra.Command{
		Use: "decrypt SOURCE [-o OUTPUT]", Short: "Turn sealed objects or a volume into plain files, with the key and no running byokd", Args: cobra.ExactArgs(1),
		Long: "SOURCE is s3://BUCKET/KEY, with --recursive s3://BUCKET/PREFIX, a file with the sealed bytes of an object, or - for\n" +
			"standard input. Plain bytes go to standard output, or to the file or directory given with -o, which appears only\n" +
			"when all of it is there and authentic. Needs kms:Decrypt on the key and, for s3://, s3:GetObject and s3:ListBucket.\n" +
			"Either --config names everything (BUCKET is then a bucket as its clients call it, or the upstream one), or --key\n" +
			"does: a KMS key that is merely named in the sealed bytes is not asked, because anybody can write that.\n" +
			"SOURCE may also be the lower directory of a volume that no byokd serves (stopped, or a snapshot): all of it is\n" +
			"restored into the new directory OUTPUT, without mounting. Files with damaged blocks are left out.\n" +
			"A file of an object that was uploaded in parts does not tell how many there were: give --parts if you know.\n" +
			"Exit code 0 only when everything was restored; 9 when sealed bytes are damaged, cut short, foreign or under\n" +
			"another key; 10 when KMS refuses the key.",
		RunE: func(cmd *cobra.Command, args []string) error {
			d.given = cmd.Flags().Changed
			d.source, d.stdin, d.stdout, d.stderr = args[0], cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return d.run(ctx)
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&d.output, "output", "o", "", "file for the plain bytes, with --recursive a directory (default: standard output)")
	flags.BoolVarP(&d.recursive, "recursive", "r", false, "restore every object whose key begins with the given prefix")
	flags.BoolVar(&d.resume, "resume", false, "with --recursive: leave out objects whose file is there already")
	flags.BoolVar(&d.zeroDamaged, "zero-damaged", false, "of a volume: restore damaged files, too, with zeros where they are damaged")
	flags.BoolVar(&d.metadata, "metadata", false, "write content headers and user metadata to OUTPUT.metadata.json as well (s3:// only)")
	flags.StringVar(&d.version, "version-id", "", "restore this version of the object")
	flags.IntVar(&d.parts, "parts", 0, "how many parts a sealed file must have")
	flags.StringVar(&d.keyring, "keyring", "", "file with the bucket's keyring, for sealed files of a bucket that was moved to another key")
	flags.StringVar(&d.region, "region", "", "region of the bucket (default: AWS_REGION, else that of the key)")
	flags.StringVar(&d.endpoint, "endpoint", "", "address of S3 for a store other than AWS")
	d.from.flags(flags)
	return cmd
}

// run restores what was asked for.
func (d *decryption) run(ctx context.Context) error {
	bucket, key, remote := cutS3(d.source)
	var what string
	var idle []string // flags that it has no use for
	var restore func() error
	switch {
	case remote && d.recursive:
		what, idle = "many objects", []string{"version-id", "parts", "keyring", "zero-damaged"}
		restore = func() error { return d.prefix(ctx, bucket, key) }
	case remote:
		what, idle = "an object of a bucket", []string{"resume", "parts", "keyring", "zero-damaged"}
		restore = func() error { return d.object(ctx, bucket, key) }
	case isDirectory(d.source):
		what, idle = "a volume", []string{"recursive", "resume", "metadata", "version-id", "parts", "keyring", "region", "endpoint"}
		restore = func() error { return d.volume(ctx) }
	default:
		what, idle = "a sealed file", []string{"recursive", "resume", "metadata", "version-id", "region", "endpoint", "zero-damaged"}
		restore = func() error { return d.file(ctx) }
	}
	if err := refuseIdle(d.given, what, idle); err != nil {
		return err
	}
	if err := d.from.load(d.environ, d.stderr); err != nil {
		return err
	}
	return explainDecrypt(restore())
}

// refuseIdle refuses flags that would say nothing: who gives one expects something of it.
func refuseIdle(given func(flag string) bool, what string, idle []string) error {
	for _, flag := range idle {
		if given(flag) {
			return exitWith(exitUsage, fmt.Errorf("--%s is not for %s", flag, what))
		}
	}
	return nil
}

func isDirectory(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// cutS3 splits s3://BUCKET/KEY.
func cutS3(source string) (bucket, key string, ok bool) {
	rest, ok := strings.CutPrefix(source, "s3://")
	bucket, key, _ = strings.Cut(rest, "/")
	return bucket, key, ok
}

// explainDecrypt gives an error of any depth its exit code.
func explainDecrypt(err error) error {
	var coded *exitError
	switch {
	case err == nil || errors.As(err, &coded):
		return err
	case objstore.Damaged(err):
		return exitWith(exitDamaged, err)
	case errors.Is(err, context.Canceled): // nobody but who typed it has ended it
		return exitWith(exitFailure, fmt.Errorf("interrupted: %w", err))
	}
	var refused *keyRefusal
	var kms *keyguard.KMSError
	if !errors.As(err, &refused) || !errors.As(err, &kms) {
		return exitWith(exitFailure, err)
	}
	s := keyguard.Status{KeyARN: refused.arn, Endpoint: refused.endpoint, Key: keyguard.StateOf(err), Reason: keyguard.ReasonOf(err), MissingAction: kms.Action, Principal: kms.Principal}
	switch s.Key {
	case keyguard.Misconfigured:
		return exitWith(exitDamaged, fmt.Errorf("KMS cannot open the wrapped data key: the sealed bytes are damaged, or belong to another key, cluster or bucket (--key, --context): %w", err))
	case keyguard.Unreachable:
		return exitWith(exitFailure, fmt.Errorf("KMS cannot be asked: %w\nNext step: %s", err, s.NextStep()))
	}
	return exitWith(exitFrozen, fmt.Errorf("%s: %w\nNext step: %s", s.Headline(), err, s.NextStep()))
}

// upstream finds the bucket that the command line names.
func (d *decryption) upstream(ctx context.Context, bucket string) (objstore.Upstream, error) {
	return d.from.upstream(ctx, bucket, d.region, d.endpoint)
}

func (d *decryption) object(ctx context.Context, bucket, key string) error {
	if key == "" {
		return exitWith(exitUsage, fmt.Errorf("%q names no object; to restore many, give --recursive and -o DIRECTORY", d.source))
	}
	up, err := d.upstream(ctx, bucket)
	if err != nil {
		return err
	}
	ref := objstore.Ref{Key: key, VersionID: d.version}
	var beside func() ([]byte, error)
	if d.metadata {
		if d.output == "" || d.output == "-" {
			return exitWith(exitUsage, errors.New("--metadata needs -o FILE"))
		}
		beside = func() ([]byte, error) { return d.metadataOf(ctx, up, ref) }
	}
	return d.write(func(w io.Writer) (objstore.Restored, error) {
		done, err := objstore.RestoreObject(ctx, up, ref, w, &d.from)
		if err != nil {
			err = fmt.Errorf("%s: %w", d.source, err)
		}
		if up := (*objstore.UpstreamError)(nil); errors.As(err, &up) && up.Code == "NoSuchKey" {
			err = fmt.Errorf("%w; to restore all objects whose keys begin so: --recursive -o DIRECTORY", err)
		}
		return done, err
	}, beside)
}

// file restores a sealed file, or standard input.
func (d *decryption) file(ctx context.Context) error {
	src := d.stdin
	if d.source != "-" {
		f, err := os.Open(d.source)
		if err != nil {
			return err
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil && info.IsDir() {
			return exitWith(exitUsage, fmt.Errorf("%s is a directory: byokd decrypt opens sealed objects, one file each", d.source))
		}
		src = f
	}
	var text []byte
	if d.keyring != "" {
		var err error
		if text, err = os.ReadFile(d.keyring); err != nil {
			return err
		}
	}
	if err := d.from.adopt(ctx, text); err != nil {
		return err
	}
	return d.write(func(w io.Writer) (objstore.Restored, error) {
		done, err := objstore.Restore(ctx, src, w, &d.from, d.parts)
		if err == nil && done.Multipart && d.parts == 0 {
			fmt.Fprintf(d.stderr, "byokd: the object has %d parts; whether more followed, the file does not tell (--parts)\n", done.Parts)
		}
		return done, err
	}, nil)
}

// metadataOf returns what OUTPUT.metadata.json holds.
func (d *decryption) metadataOf(ctx context.Context, up objstore.Upstream, ref objstore.Ref) ([]byte, error) {
	a, err := objstore.RestoreMetadata(ctx, up, ref, d.from.binding.Resource, &d.from)
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	text, err := json.MarshalIndent(struct {
		ContentType        string            `json:"contentType,omitempty"`
		CacheControl       string            `json:"cacheControl,omitempty"`
		ContentDisposition string            `json:"contentDisposition,omitempty"`
		ContentEncoding    string            `json:"contentEncoding,omitempty"`
		ContentLanguage    string            `json:"contentLanguage,omitempty"`
		Expires            string            `json:"expires,omitempty"`
		Metadata           map[string]string `json:"metadata"`
	}{a.ContentType, a.CacheControl, a.ContentDisposition, a.ContentEncoding, a.ContentLanguage, a.Expires, a.Metadata}, "", "  ")
	return append(text, '\n'), err
}

// write gives restore its output: standard output, or a file that appears when it is complete.
// beside, if any, makes what goes to the file of metadata next to it.
func (d *decryption) write(restore func(io.Writer) (objstore.Restored, error), beside func() ([]byte, error)) error {
	if d.output == "" || d.output == "-" {
		done, err := restore(d.stdout)
		if err != nil && done.Plain > 0 {
			return fmt.Errorf("after %d bytes: %w", done.Plain, err)
		}
		return err
	}
	file, err := newOutputFile(d.output)
	if err != nil {
		return err
	}
	file.beside = beside
	done, err := restore(file)
	if err != nil {
		file.Abort()
		return fmt.Errorf("%s is not written: %w", d.output, err)
	}
	if err := file.Commit(); err != nil {
		return err
	}
	fmt.Fprintf(d.stderr, "byokd: %s: %s\n", d.output, bytesInWords(done.Plain))
	return nil
}

// progressEvery is how often progress is told.
const progressEvery = time.Second

// prefix restores every object below a prefix into a directory.
func (d *decryption) prefix(ctx context.Context, bucket, prefix string) error {
	if d.output == "" || d.output == "-" {
		return exitWith(exitUsage, errors.New("--recursive needs -o DIRECTORY"))
	}
	tree, err := newOutputTree(d.output, prefix, d.resume)
	if err != nil {
		return err
	}
	defer tree.Close()
	up, err := d.upstream(ctx, bucket)
	if err != nil {
		return err
	}
	told := time.Now()
	progress, failures, err := objstore.RestoreAll(ctx, objstore.RestoreAllOptions{
		Upstream: up, Prefix: prefix, Keys: &d.from,
		Target: func(e objstore.Entry) (objstore.RestoreTarget, error) {
			if err := d.nameFree(ctx, up, prefix, e.Key); err != nil {
				return nil, err
			}
			file, err := tree.target(e)
			if file == nil || err != nil {
				return nil, err
			}
			if d.metadata {
				file.beside = func() ([]byte, error) { return d.metadataOf(ctx, up, objstore.Ref{Key: e.Key}) }
			}
			return file, nil
		},
		Progress: func(p objstore.RestoreProgress) {
			if time.Since(told) >= progressEvery {
				told = time.Now()
				d.tell(p)
			}
		},
	})
	d.tell(progress)
	for _, f := range failures {
		fmt.Fprintf(d.stderr, "byokd: %s: %v\n", f.Key, f.Err)
	}
	if err != nil {
		return err
	}
	if progress.Failed > 0 {
		all := fmt.Errorf("%d of %d objects could not be restored; the others are in %s", progress.Failed, progress.Failed+progress.Objects+progress.Skipped, d.output)
		if objstore.Damaged(failures[0].Err) {
			return exitWith(exitDamaged, all)
		}
		return exitWith(exitFailure, all)
	}
	if progress.Objects+progress.Skipped == 0 { // a mistyped prefix is no restore
		return exitWith(exitFailure, fmt.Errorf("%s: there is no object whose key begins so", d.source))
	}
	return nil
}

// nameFree refuses an object that has the name of another's file of metadata, whichever of
// the two would be there first.
func (d *decryption) nameFree(ctx context.Context, up objstore.Upstream, prefix, key string) error {
	other, found := strings.CutSuffix(key, metadataSuffix)
	if !d.metadata || !found || !strings.HasPrefix(other, prefix) {
		return nil
	}
	_, err := up.Head(ctx, objstore.GetRequest{Ref: objstore.Ref{Key: other}})
	var answer *objstore.UpstreamError
	if errors.As(err, &answer) && answer.Status == http.StatusNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("its file would have the name of the metadata of %s: restore this object alone, with -o", other)
}

func (d *decryption) tell(p objstore.RestoreProgress) {
	line := fmt.Sprintf("%d objects, %s", p.Objects, bytesInWords(p.Plain))
	if p.Skipped > 0 {
		line += fmt.Sprintf(", %d there already", p.Skipped)
	}
	if p.Failed > 0 {
		line += fmt.Sprintf(", %d failed", p.Failed)
	}
	fmt.Fprintf(d.stderr, "byokd: restored %s\n", line)
}

// bytesInWords is a size for people.
func bytesInWords(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), -1
	for value >= 1<<10 && unit < 4 {
		value /= 1 << 10
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGTP"[unit])
}
