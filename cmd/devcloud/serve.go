package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/byokd/byokd/keyguard/kmstest"
)

const (
	defaultListen   = "127.0.0.1:4566"
	defaultEndpoint = "http://" + defaultListen

	// shutdownGrace is how long calls under way may take after SIGTERM before
	// their connections are closed. Injected hangs end at once.
	shutdownGrace = 3 * time.Second
)

type serveFlags struct {
	dir, listen  string
	setup        bool
	replicaDelay time.Duration
	tlsListen    string
	tlsNames     []string
}

func (a *app) serveCommand() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve --dir DIR",
		Short: "Serve KMS, STS and S3 from a directory until SIGINT or SIGTERM",
		Long: `Serves KMS, STS and S3 at one loopback endpoint, with a control page at /.
All state lies in DIR (DIR/kms, DIR/s3), in clear, and survives restarts.
Injected faults do not: they end with the process.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.serve(cmd.Context(), f) },
	}
	cmd.Flags().StringVar(&f.dir, "dir", "", "state directory, made if missing (required)")
	cmd.Flags().StringVar(&f.listen, "listen", defaultListen, "loopback address to listen on; port 0 takes a free one")
	cmd.Flags().StringVar(&f.tlsListen, "tls-listen", "", "any address to listen on as well, by TLS, for AWS calls only: for a cluster to try byokd in")
	cmd.Flags().StringSliceVar(&f.tlsNames, "tls-name", []string{"localhost"}, "DNS names of the certificate, which is made and kept in DIR (see devcloud certificate)")
	cmd.Flags().BoolVar(&f.setup, "setup", false, "make the key alias/byokd and the buckets, as devcloud setup does")
	cmd.Flags().DurationVar(&f.replicaDelay, "replica-delay", 0, "how long a new replica of a multi-Region key stays in the state Creating, as on AWS")
	return cmd
}

// listenLoopback refuses every address that another machine could reach.
func listenLoopback(address string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, usageError{fmt.Errorf("--listen %s: %w", address, err)}
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.IsLoopback() {
		return nil, usageError{fmt.Errorf("--listen %s: devcloud has fixed credentials and listens on loopback only (127.0.0.1 or [::1])", address)}
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(ip.String(), port))
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s is taken, perhaps by another devcloud: stop that or choose another --listen: %w", address, err)
	}
	return listener, err
}

// serve builds KMS and S3, serves them and closes in reverse order.
func (a *app) serve(ctx context.Context, f serveFlags) (err error) {
	if f.dir == "" {
		return usageError{errors.New("serve needs --dir DIR, a directory for its state")}
	}
	dir, err := filepath.Abs(f.dir) // before S3 changes the working directory
	if err != nil {
		return err
	}
	keys, err := kmstest.New(kmstest.Options{Dir: filepath.Join(dir, "kms"), ReplicaDelay: f.replicaDelay})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, keys.Close()) }()
	listener, err := listenLoopback(f.listen)
	if err != nil {
		return err
	}
	endpoint := "http://" + listener.Addr().String()
	objects, err := openS3(filepath.Join(dir, "s3"))
	if err != nil {
		listener.Close()
		return err
	}
	defer func() { err = errors.Join(err, objects.Close()) }()

	server := &http.Server{Handler: front(keys, objects), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10}
	served := make(chan error, 2)
	go func() { served <- server.Serve(listener) }()
	if f.tlsListen != "" {
		stop, err := a.serveTLS(f, dir, remote(server.Handler), served)
		if err != nil {
			server.Close()
			return err
		}
		defer stop()
	}
	if f.setup {
		if err := a.setup(ctx, endpoint, false); err != nil {
			server.Close()
			return err
		}
	}
	a.greet(endpoint, dir, keys)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	keys.Interrupt()
	grace, cancel := context.WithTimeout(context.Background(), shutdownGrace)
	defer cancel()
	if server.Shutdown(grace) != nil {
		server.Close()
	}
	fmt.Fprintln(a.stdout, "devcloud: stopped")
	return nil
}

// serveTLS serves others than this machine until stop is called.
func (a *app) serveTLS(f serveFlags, dir string, handler http.Handler, served chan<- error) (stop func() error, err error) {
	pair, err := certificate(dir, f.tlsNames, time.Now())
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", f.tlsListen)
	if err != nil {
		return nil, fmt.Errorf("--tls-listen: %w", err)
	}
	fmt.Fprintf(a.stdout, "tls          https://%s, for %s\n", listener.Addr(), strings.Join(f.tlsNames, ", "))
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}}
	go func() { served <- server.ServeTLS(listener, "", "") }()
	return server.Close, nil
}

// front tells the services apart. S3 is what is left.
func front(keys *kmstest.Server, objects http.Handler) http.Handler {
	objects = keys.FaultyS3(objects)
	page := newPage()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case kmstest.IsKMS(r), kmstest.IsSTS(r), kmstest.IsControl(r):
			keys.ServeHTTP(w, r)
		case isPage(r):
			page.ServeHTTP(w, r)
		default:
			objects.ServeHTTP(w, r)
		}
	})
}

func (a *app) greet(endpoint, dir string, keys *kmstest.Server) {
	fmt.Fprintf(a.stdout, `devcloud: a stand-in for AWS, for trying and testing only
  endpoint     %s  (KMS, STS and S3; account %s, region %s)
  page         %s/
  state        %s
  credentials  %s / %s  (administrator)
               %s / %s  (%s)
`, endpoint, kmstest.DefaultAccount, kmstest.DefaultRegion, endpoint, dir,
		kmstest.AdminAccessKey, kmstest.AdminSecret, kmstest.TenantAccessKey, kmstest.TenantSecret, kmstest.TenantRole)
	list, err := keys.Keys()
	if err != nil {
		fmt.Fprintln(a.stderr, "devcloud:", err)
	}
	if len(list) == 0 {
		fmt.Fprintln(a.stdout, "  key          none yet: devcloud setup makes alias/byokd and the buckets")
	}
	for _, k := range list {
		fmt.Fprintf(a.stdout, "  key          %s  %s  %s\n", k.ARN, aliasText(k), k.State)
	}
	fmt.Fprintln(a.stdout, "devcloud: ready")
}
