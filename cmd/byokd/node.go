package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/deploy/seccomp"
	"github.com/byokd/byokd/internal/csinode"
	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/metrics"
)

// nodeFlags are those of byokd node.
type nodeFlags struct {
	endpoint, nodeName, kubeletDir, stateDir, adminListen string
	log                                                   LogConfig
}

func newNodeCommand() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use: "node", Short: "Mount for the pods of a node and pass the mounts to their sidecars (Kubernetes, CSI)", Args: cobra.NoArgs,
		Long: `Serves kubelet as the CSI node driver ` + csinode.Name + `. It mounts byokd's filesystem for pods and passes the mount
to their sidecar, so that sidecar and workload need no privilege. It needs root, a writable /sys, the node's PID
namespace and kubelet's directory with Bidirectional propagation; it has no credential and no key.

A restart ends no mount. The admin listener answers /livez, /readyz and /metrics.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	flags := cmd.Flags()
	flags.StringVar(&f.endpoint, "endpoint", "unix:///csi/csi.sock", "the CSI socket")
	flags.StringVar(&f.nodeName, "node-name", "", "name of the node (required)")
	flags.StringVar(&f.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "kubelet's root directory")
	flags.StringVar(&f.stateDir, "state-dir", "", "where it remembers what is mounted (default: mounts, beside the CSI socket)")
	flags.StringVar(&f.adminListen, "admin-listen", ":9180", "address of health and metrics")
	flags.StringVar(&f.log.Level, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&f.log.Format, "log-format", "json", "json or console")
	if err := cmd.MarkFlagRequired("node-name"); err != nil {
		panic(err) // the flag was just made
	}
	return cmd
}

func (f *nodeFlags) run(cmd *cobra.Command) error {
	var c checker
	c.oneOf("--log-level", f.log.Level, "debug", "info", "warn", "error")
	c.oneOf("--log-format", f.log.Format, "json", "console")
	if len(c.problems) > 0 {
		return exitWith(exitUsage, &configError{c.problems})
	}
	if f.stateDir == "" {
		f.stateDir = filepath.Join(filepath.Dir(strings.TrimPrefix(f.endpoint, "unix://")), "mounts")
	}
	log := newLogger(f.log, cmd.ErrOrStderr())
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := f.serve(ctx, log); err != nil {
		return failure(log, "byokd node ends", codeFor(err), err)
	}
	log.Info("stopped; the mounts stay")
	return nil
}

func (f *nodeFlags) serve(ctx context.Context, log *zap.Logger) error {
	if err := refuseRequestTimeouts(fuseSysctls); err != nil {
		return exitWith(exitMount, err)
	}
	if err := existingDirectory(f.kubeletDir); err != nil {
		return exitWith(exitUsage, fmt.Errorf("%w: --kubelet-dir must be kubelet's root directory (its --root-dir), mounted into this container at the same path", err))
	}
	registry := metrics.NewRegistry(buildVersion(), erasureLabel())
	observer := registry.NewNode()
	driver, err := csinode.New(csinode.Options{Endpoint: f.endpoint, NodeName: f.nodeName, KubeletDir: f.kubeletDir, StateDir: f.stateDir,
		Version: buildVersion(), Log: log.Named("node"), Published: observer.Published})
	if err != nil {
		return exitWith(exitUsage, err)
	}
	observer.Follow(driver.Mounts)
	if err := installSeccomp(f.kubeletDir); err != nil { // only sidecars that ask for it need it
		log.Warn("the seccomp profile is not on this node: sidecars with --sidecar-seccomp=Localhost do not start", zap.Error(err))
	}
	admin, err := listen("admin", f.adminListen)
	if err != nil {
		return exitWith(exitListen, err)
	}
	health := &http.Server{Handler: nodeHealth(driver, registry.Handler()), ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: 90 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: zap.NewStdLog(log.Named("http"))}
	ended := make(chan error, 1)
	go func() { ended <- health.Serve(admin) }()
	log.Info("started", zap.String("version", buildVersion()), zap.String("endpoint", f.endpoint), zap.Stringer("admin", admin.Addr()))
	err = driver.Run(ctx)
	err = errors.Join(err, health.Close())
	if stopped := <-ended; !errors.Is(stopped, http.ErrServerClosed) {
		err = errors.Join(err, stopped)
	}
	return err
}

// existingDirectory says why path is none. What is missing is not made: mounts below a
// directory that kubelet does not know would reach no pod.
func existingDirectory(path string) error {
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() {
		err = &os.PathError{Op: "open", Path: path, Err: unix.ENOTDIR}
	}
	return err
}

// installSeccomp puts the sidecars' seccomp profile where kubelet looks for profiles.
func installSeccomp(kubeletDir string) error {
	path := filepath.Join(kubeletDir, "seccomp", seccomp.Path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(path, seccomp.Profile(), 0o644)
}

// nodeHealth answers kubelet and Prometheus.
func nodeHealth(driver *csinode.Driver, series http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", series)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !driver.Ready() {
			http.Error(w, "the CSI socket is not served", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	return mux
}
