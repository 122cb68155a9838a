package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
	utilversion "k8s.io/apimachinery/pkg/util/version"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/byokd/byokd/deploy/seccomp"
	"github.com/byokd/byokd/internal/inject"
	"github.com/byokd/byokd/metrics"
)

// injectFlags are those of `byokd inject`.
type injectFlags struct {
	sidecar                            sidecarFlags
	listen, adminListen                string
	namespace, service, secret, config string
	names                              []string
	tls                                TLSConfig
	kubeconfig                         string
	log                                LogConfig
}

func newInjectCommand() *cobra.Command {
	var f injectFlags
	cmd := &cobra.Command{
		Use: "inject", Short: "Serve the webhook that puts byokd into labelled pods (Kubernetes)", Args: cobra.NoArgs,
		Long: `Serves the mutating admission webhook at /inject. Pods with the label byokd.io/inject: "true" get byokd as a native
sidecar, and the encrypted filesystem in place of their claim; docs/KUBERNETES.md lists the annotations. A labelled pod
that cannot be injected as it is gets denied, with the reason.

The certificate is made and renewed here, kept in a Secret that all replicas share, and its authority is written into
the webhook configuration. With --tls-cert and --tls-key it comes from files instead, which are read again when they
change, and the configuration is left alone (for cert-manager and the like).

The admin listener answers /livez, /readyz and /metrics. SIGTERM ends the requests that have begun, then byokd.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd) },
	}
	flags := cmd.Flags()
	f.sidecar.add(flags, "auto")
	flags.StringVar(&f.listen, "listen", ":9443", "address of the webhook")
	flags.StringVar(&f.adminListen, "admin-listen", ":9180", "address of health and metrics")
	flags.StringVar(&f.namespace, "namespace", "byokd-system", "namespace of Service and Secret")
	flags.StringVar(&f.service, "service", "byokd-inject", "Service by which API servers reach the webhook: the name in the certificate")
	flags.StringSliceVar(&f.names, "name", nil, "further DNS names or addresses for the certificate")
	flags.StringVar(&f.secret, "secret", "byokd-inject-tls", "Secret with the certificates; made when there is none and that is allowed")
	flags.StringVar(&f.config, "webhook", "byokd-inject", "MutatingWebhookConfiguration to write the authority into")
	flags.StringVar(&f.tls.Certificate, "tls-cert", "", "PEM file with a certificate from elsewhere")
	flags.StringVar(&f.tls.Key, "tls-key", "", "PEM file with its key")
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server, outside of a cluster")
	flags.StringVar(&f.log.Level, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&f.log.Format, "log-format", "json", "json or console")
	cmd.MarkFlagsRequiredTogether("tls-cert", "tls-key")
	cmd.AddCommand(newInjectCheckCommand())
	return cmd
}

func (f *injectFlags) run(cmd *cobra.Command) error {
	if err := f.check(); err != nil {
		return exitWith(exitUsage, err)
	}
	log := newLogger(f.log, cmd.ErrOrStderr())
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := f.serve(ctx, log); err != nil {
		return failure(log, "byokd inject ends", codeFor(err), err)
	}
	log.Info("stopped")
	return nil
}

func (f *injectFlags) check() error {
	var c checker
	c.oneOf("--log-level", f.log.Level, "debug", "info", "warn", "error")
	c.oneOf("--log-format", f.log.Format, "json", "console")
	for flag, name := range map[string]string{"--namespace": f.namespace, "--service": f.service, "--secret": f.secret, "--webhook": f.config} {
		if faults := validation.IsDNS1123Subdomain(name); len(faults) > 0 {
			c.fail(flag, "%q: %s", name, faults[0])
		}
	}
	if len(c.problems) > 0 {
		return &configError{c.problems}
	}
	_, err := f.sidecar.settings()
	return err
}

// codeFor is exitListen for an address that cannot be listened at.
func codeFor(err error) int {
	var coded *exitError
	if errors.As(err, &coded) {
		return coded.code
	}
	return exitFailure
}

func (f *injectFlags) serve(ctx context.Context, log *zap.Logger) error {
	settings, err := f.sidecar.settings()
	if err != nil {
		return err
	}
	config, err := kubeConfig(f.kubeconfig)
	if err != nil {
		return err
	}
	kube, err := inject.NewKube(config, inject.Objects{Namespace: f.namespace, Secret: f.secret, Webhook: f.config}, log.Named("kube"))
	if err != nil {
		return err
	}
	defer kube.Close()
	if f.sidecar.restartAll == "auto" {
		settings.RestartAll = knowsRestartAll(ctx, kube, log)
	}
	webhook, err := listen("webhook", f.listen)
	if err != nil {
		return exitWith(exitListen, err)
	}
	admin, err := listen("admin", f.adminListen)
	if err != nil {
		return exitWith(exitListen, err)
	}
	log.Info("started", zap.String("version", buildVersion()), zap.Stringer("webhook", webhook.Addr()), zap.Stringer("admin", admin.Addr()),
		zap.String("image", settings.Image), zap.Bool("restartAllContainers", settings.RestartAll))
	registry := metrics.NewRegistry(buildVersion(), erasureLabel())
	observer := registry.NewInjector()
	server := &inject.Server{Metrics: registry.Handler(), Log: log.Named("http"),
		Reviewer: &inject.Reviewer{Settings: settings, Cluster: kube, Observer: observer, Log: log.Named("inject")}}
	if f.tls.Certificate != "" {
		files, err := newCertificate(f.tls, log)
		if err != nil {
			return err
		}
		server.Certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return files.current(), nil }
		server.Ready = func() error { return nil }
		return server.Serve(ctx, webhook, admin)
	}
	rotator := &inject.Rotator{Store: kube, Names: f.dnsNames(), Observer: observer, Log: log.Named("certificates"), Now: time.Now}
	server.Certificate, server.Ready = rotator.Certificate, rotator.Ready
	rotating, stop := context.WithCancel(context.WithoutCancel(ctx)) // also while the last requests end
	done := make(chan struct{})
	go func() { defer close(done); rotator.Run(rotating) }()
	err = server.Serve(ctx, webhook, admin)
	stop()
	<-done
	return err
}

// dnsNames are those by which API servers may call the Service.
func (f *injectFlags) dnsNames() []string {
	name := f.service + "." + f.namespace + ".svc"
	return append([]string{name, name + ".cluster.local"}, f.names...)
}

// knowsRestartAll tells whether the API takes the rule that restarts all containers of a pod.
func knowsRestartAll(ctx context.Context, kube *inject.Kube, log *zap.Logger) bool {
	text, err := kube.Version(ctx)
	if err != nil {
		log.Warn("the version of Kubernetes is not known; the death of a sidecar will not restart its pod's containers", zap.Error(err))
		return false
	}
	v, err := utilversion.ParseGeneric(strings.SplitN(text, "-", 2)[0])
	return err == nil && v.AtLeast(utilversion.MajorMinor(1, 36))
}

// sidecarFlags are those that inject and render have in common: what pods get.
type sidecarFlags struct {
	image, cpu, memory string
	repositories       []string
	restartAll         string
	restartAllowed     []string
	seccomp            string
}

// defaultSidecarImage is that of this release; other builds have none.
func defaultSidecarImage() string {
	if v := buildVersion(); releaseVersion.MatchString(v) {
		return "ghcr.io/byokd/byokd:" + v
	}
	return ""
}

var releaseVersion = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+$`)

func (f *sidecarFlags) add(flags *pflag.FlagSet, restartAll string) {
	flags.StringVar(&f.image, "image", defaultSidecarImage(), "image of the sidecar; left out, that of this release")
	flags.StringSliceVar(&f.repositories, "allow-image-repository", nil, "repository of images that pods may name besides that of --image")
	flags.StringVar(&f.cpu, "sidecar-cpu", "100m", "CPU that the sidecar requests")
	flags.StringVar(&f.memory, "sidecar-memory", "384Mi", "memory that the sidecar requests and is limited to")
	f.restartAllowed = []string{"on", "off"}
	allowed := "on or off"
	if restartAll == "auto" {
		f.restartAllowed = append(f.restartAllowed, "auto")
		allowed = "on, off, or auto: from Kubernetes 1.36 on"
	}
	flags.StringVar(&f.restartAll, "restart-all-containers", restartAll, "whether, in mount mode privileged, the death of the sidecar restarts the pod's containers in place; nodes have to know it, too ("+allowed+")")
	flags.StringVar(&f.seccomp, "sidecar-seccomp", seccompDefault, "seccomp profile of the sidecar in mount mode csi: RuntimeDefault, or Localhost for byokd's own, which byokd node puts onto every node")
}

const (
	seccompDefault   = string(corev1.SeccompProfileTypeRuntimeDefault)
	seccompLocalhost = string(corev1.SeccompProfileTypeLocalhost)
)

func (f *sidecarFlags) settings() (inject.Settings, error) {
	s := inject.Settings{Version: buildVersion(), Image: f.image, Repositories: f.repositories, RestartAll: f.restartAll == "on"}
	if !slices.Contains(f.restartAllowed, f.restartAll) {
		return s, fmt.Errorf("--restart-all-containers: %q is none of %s", f.restartAll, strings.Join(f.restartAllowed, ", "))
	}
	switch f.seccomp {
	case seccompDefault:
	case seccompLocalhost:
		s.LocalhostSeccomp = seccomp.Path
	default:
		return s, fmt.Errorf("--sidecar-seccomp: %q is neither %s nor %s", f.seccomp, seccompDefault, seccompLocalhost)
	}
	if f.image == "" {
		return s, errors.New("--image: this is no release of byokd, so the sidecar's image has to be named")
	}
	for flag, q := range map[string]struct {
		text string
		into *resource.Quantity
	}{"--sidecar-cpu": {f.cpu, &s.CPU}, "--sidecar-memory": {f.memory, &s.Memory}} {
		quantity, err := resource.ParseQuantity(q.text)
		if err != nil || quantity.Sign() <= 0 {
			return s, fmt.Errorf("%s: %q is not a quantity above zero, such as 100m or 384Mi", flag, q.text)
		}
		*q.into = quantity
	}
	if s.Memory.Cmp(resource.MustParse(inject.MinMemory)) < 0 {
		return s, fmt.Errorf("--sidecar-memory: %s is less than the %s that byokd needs", f.memory, inject.MinMemory)
	}
	return s, nil
}

// kubeConfig is how to reach the API server.
func kubeConfig(file string) (*rest.Config, error) {
	if file != "" {
		return clientcmd.BuildConfigFromFlags("", file)
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("%w; outside of a cluster, say --kubeconfig", err)
	}
	return config, nil
}
