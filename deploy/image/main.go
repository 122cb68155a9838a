// Command image builds byokd's container images without a container engine: a static program, the certificates of public
// authorities and an unprivileged user, for amd64 and arm64, with an SBOM of each beside it. The same commit and Go
// make the same digest, wherever and whenever it is built: layers have no times but the commit's, certificates come from a module that
// go.mod pins, and the toolchain is told no paths.
//
// It writes into -out: an OCI layout of everything, an archive for each platform that `docker load`, `podman load` and
// `kind load image-archive` take, the SBOMs, and SHA256SUMS. With -push it uploads to a registry, whose credentials come
// from Docker's configuration.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.SetOutput(stderr)
	name := flags.String("program", "byokd", "the program to build an image of: byokd or devcloud")
	source := flags.String("source", "../..", "the root of byokd's source")
	out := flags.String("out", "../../.cache/image", "the directory to write to; what an earlier run left there is replaced")
	repository := flags.String("repository", "", "the repository that the image is named by, e.g. ghcr.io/byokd/byokd; left out, the program's")
	tag := flags.String("tag", "dev", "the tag of the image")
	push := flags.Bool("push", false, "upload image and SBOMs to the repository, too")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	program, ok := programs[*name]
	if !ok {
		return fmt.Errorf("there is no program %q: byokd or devcloud", *name)
	}
	if *repository == "" {
		*repository = program.repository
	}
	built, err := buildRelease(ctx, program, *source, stderr)
	if err != nil {
		return err
	}
	if err := built.write(*out, *repository, *tag); err != nil {
		return err
	}
	if *push {
		if err := built.push(ctx, *repository, *tag); err != nil {
			return err
		}
	}
	digest, err := built.index.Digest()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s:%s@%s\n", *repository, *tag, digest)
	return err
}
