package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/byokd/byokd/internal/connlimit"
	"github.com/byokd/byokd/internal/keeper"
	"github.com/byokd/byokd/keyguard"
	"github.com/byokd/byokd/keyguard/fleet"
	"github.com/byokd/byokd/metrics"
)

// daemon is one running byokd. The order of its life:
//
//	check → listen → guards → admin page → guards run → S3, volume (each when its own key is usable)
//	…
//	S3 refuses new connections → S3 requests end → flush and unmount → guards stop (keys erased) → admin page
//
// so that the page answers from the first moment to the last.
type daemon struct {
	cfg      Config
	log      *zap.Logger
	environ  []string
	aws      awsConfigs
	worker   *keeper.Worker // what connects this process with its keeper; nil without
	registry *metrics.Registry
	panel    *metrics.Panel
	guards   map[string]*keyguard.Guard // by name; fixed after build
	volume   *volume                    // nil without one; fixed after build
	objects  *objects                   // nil without one; fixed after build
	audit    *auditTrail
	fleet    *fleet.Fleet // nil without peers; fixed after build
	admin    net.Listener
	operator *operator  // nil without a control socket; fixed after build
	failures chan error // the first thing that ends the run

	abandoned atomic.Bool // the stop was cut short
}

func newDaemon(cfg Config, log *zap.Logger, environ []string, w *keeper.Worker) *daemon {
	erasure := erasureLabel()
	return &daemon{cfg: cfg, log: log, environ: environ, failures: make(chan error, 1),
		registry: metrics.NewRegistry(buildVersion(), erasure),
		panel:    metrics.NewPanel(buildVersion(), cfg.Cluster.ID, erasure),
		volume:   newVolume(cfg, log, w), worker: w,
	}
}

// serve runs until ctx ends or something fails, then stops everything in order. It returns nil after ctx.
func (d *daemon) serve(ctx context.Context) error {
	if err := d.build(ctx); err != nil {
		return err
	}
	guardsRun, stopGuards := context.WithCancel(context.WithoutCancel(ctx))
	pageServes, stopPage := context.WithCancel(context.WithoutCancel(ctx))
	defer stopPage()
	defer stopGuards()
	var page, guards sync.WaitGroup
	page.Go(func() { d.panel.Watch(pageServes) })
	page.Go(func() { d.serveAdmin(pageServes) })
	page.Go(func() { d.tellRole(pageServes) })
	for _, g := range d.guards {
		guards.Go(func() { d.runGuard(guardsRun, g) })
	}
	if d.fleet != nil {
		guards.Go(func() { d.fail(d.fleet.Run(guardsRun)) })
	}
	work, stopWork := context.WithCancel(ctx)
	defer stopWork()
	var working sync.WaitGroup
	if d.objects != nil {
		working.Go(func() { d.fail(d.objects.serve(work)) })
	}
	if d.volume != nil {
		working.Go(func() { d.fail(d.volume.serve(work)) })
	}
	if d.operator != nil {
		working.Go(func() { d.fail(exitWith(exitFailure, d.operator.serve(work))) })
	}
	d.log.Info("started", zap.String("version", buildVersion()), zap.String("admin", "http://"+d.admin.Addr().String()))

	var err error
	select {
	case <-ctx.Done():
	case err = <-d.failures:
	}
	d.panel.Stopping()
	stopWork() // the volume and the proxy end by themselves now, each within its part of stopTimeout
	working.Wait()
	stopGuards()
	guards.Wait()
	err = errors.Join(err, exitWith(exitFailure, d.audit.close()))
	stopPage()
	page.Wait()
	if err == nil && !d.abandoned.Load() {
		d.log.Info("stopped, everything flushed")
	}
	return err
}

// fail ends the run with the first error reported; later ones are consequences.
func (d *daemon) fail(err error) {
	if err == nil {
		return
	}
	select {
	case d.failures <- err:
	default:
	}
}

// build checks everything that can be checked before the key is asked, listens, and connects the parts.
func (d *daemon) build(ctx context.Context) (err error) {
	if d.audit, err = openAudit(d.cfg.Audit.File, d.cfg.Audit.MaxSize.Bytes, d.log); err != nil {
		return failure(d.log, "the audit file cannot be opened", exitConfig, err)
	}
	if d.volume != nil {
		if err := d.volume.inspect(); err != nil {
			return err
		}
	}
	if d.admin, err = d.listen("admin", d.cfg.Admin.Listen); err != nil {
		return failure(d.log, "the admin listener cannot start", exitListen, err)
	}
	if d.cfg.Admin.ReadyWhileFrozen {
		d.panel.KeepReady()
	}
	d.admin = connlimit.New(d.admin, connectionLimit(maxAdminConnections), nil)
	if d.operator, err = newOperator(d); err != nil {
		return failure(d.log, "admin.socket", exitListen, err)
	}
	if err := d.buildGuards(ctx); err != nil {
		return err
	}
	if d.volume != nil {
		d.volume.connect(d)
	}
	if d.cfg.Objects != nil {
		d.objects, err = newObjects(ctx, d)
	}
	return err
}

// joinFleet opens the socket for hints.
func (d *daemon) joinFleet() error {
	cfg := d.cfg.Fleet
	if cfg == nil {
		return nil
	}
	secret, err := readPrivate("fleet.secretFile", cfg.SecretFile)
	if err != nil {
		return failure(d.log, "the fleet's secret cannot be read", exitConfig, err)
	}
	socket, err := fleet.Listen(cfg.Listen)
	if err != nil {
		return failure(d.log, "the fleet's socket cannot be opened", exitListen, fmt.Errorf("fleet.listen: %w", err))
	}
	d.fleet, err = fleet.Join(fleet.Options{Peers: cfg.Peers, Socket: socket, Secret: bytes.TrimSpace(secret), Logger: d.log.Named("fleet")})
	if err != nil {
		socket.Close()
		return failure(d.log, "the fleet cannot be joined", exitConfig, err)
	}
	return nil
}

func (d *daemon) buildGuards(ctx context.Context) error {
	if err := d.joinFleet(); err != nil {
		return err
	}
	observers := d.registry.NewGuards()
	d.guards = make(map[string]*keyguard.Guard, len(d.cfg.Keys))
	for _, name := range slices.Sorted(maps.Keys(d.cfg.Keys)) {
		key := d.cfg.Keys[name]
		kms, err := d.aws.newKMS(ctx, key)
		if err != nil {
			return failure(d.log, "keys."+name, exitMisconfigured, err)
		}
		options := keyguard.Options{
			Name: name, ProbeInterval: key.ProbeInterval.Duration, OutageGrace: key.OutageGrace.Duration,
			ProbeBinding: keyguard.Binding{Cluster: d.cfg.Cluster.ID, Resource: "probe/" + name, Tenant: d.cfg.Cluster.Tenant},
			Held:         d.operator != nil && d.operator.held[name],
			Endpoint:     key.Endpoint, Socket: socketToTell(d.cfg.Admin.Socket),
			Observer: observers.Observer(name), Audit: d.audit.record, Logger: d.log.Named("keyguard"),
		}
		if d.volume != nil && d.cfg.Volume.Key == name {
			options.ProbeBinding, options.Probe = d.volume.binding, d.volume.probe
			options.Resumes = d.volume.takesOver()
		}
		var g *keyguard.Guard
		if d.fleet != nil {
			options.Fleet, options.StretchTo = d.fleet.Member(key.ARN, func() { g.Poke() }), key.StretchTo.Duration
		}
		g, err = keyguard.New(kms, options)
		if err != nil {
			return failure(d.log, "keys."+name, exitConfig, err)
		}
		d.guards[name] = g
		d.registry.AddGuard(g)
		d.panel.AddGuard(g)
	}
	return nil
}

func (d *daemon) runGuard(ctx context.Context, g *keyguard.Guard) {
	err := g.Run(ctx)
	if err == nil || ctx.Err() != nil {
		return
	}
	s := g.Status()
	code := exitFailure
	if errors.Is(err, keyguard.ErrMisconfigured) {
		code = exitMisconfigured
	}
	if step := s.NextStep(); step != "" {
		err = fmt.Errorf("%w\nNext step: %s", err, step)
	}
	d.fail(failure(d.log, s.Headline(), code, err))
}

func (d *daemon) serveAdmin(ctx context.Context) {
	server := metrics.NewServer(d.panel, d.registry, d.cfg.Admin.Hosts, d.log.Named("admin"))
	d.fail(exitWith(exitFailure, server.Serve(ctx, d.admin)))
}

// rolePause is how long after a failure AWS is asked again who we are.
const rolePause = time.Minute

// tellRole asks AWS which role we run as, for the page: it is what a key policy must name. Nothing depends on
// it, and STS may be out of reach where KMS is not, so failures are not worth more than a debug line.
func (d *daemon) tellRole(ctx context.Context) {
	first := d.cfg.Keys[slices.Min(slices.Collect(maps.Keys(d.cfg.Keys)))]
	for {
		id, err := whoAmI(ctx, &d.aws, regionOfARN(first.ARN), first.Endpoint, d.environ)
		if err == nil {
			d.panel.RunsAs(id.Role)
			return
		}
		d.log.Debug("the page cannot tell the role", zap.Error(err))
		select {
		case <-time.After(rolePause):
		case <-ctx.Done():
			return
		}
	}
}

// abandon leaves nothing mounted, whatever the rest does. It tells whether something was that may not be flushed.
func (d *daemon) abandon() bool {
	d.abandoned.Store(true)
	return d.volume != nil && d.volume.abandon()
}

// waitReady waits until the guard admits work; false when ctx ended first.
func waitReady(ctx context.Context, g *keyguard.Guard) bool {
	for {
		changed := g.Changed() // before Status, so that no change falls between
		if g.Status().Ready() {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// listen opens a TCP listener, or goes on with the one that the worker before has left with the keeper: who
// connects meanwhile waits in its queue.
func (d *daemon) listen(section, address string) (net.Listener, error) {
	if d.worker == nil {
		return listen(section, address)
	}
	if fd := d.worker.Take(section); fd >= 0 {
		file := os.NewFile(uintptr(fd), section)
		l, err := net.FileListener(file)
		file.Close()
		if err == nil && sameAddress(l.Addr(), address) {
			return l, nil
		}
		if err == nil {
			l.Close() // the configuration names another now
		}
	}
	l, err := listen(section, address)
	if err != nil {
		return nil, err
	}
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err == nil {
		var sent error
		err = errors.Join(raw.Control(func(fd uintptr) { sent = d.worker.Deposit(section, int(fd)) }), sent)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("%s.listen: the keeper does not take the listener: %w", section, err)
	}
	return l, nil
}

// sameAddress says whether a listener is at the address that the configuration gives.
func sameAddress(is net.Addr, wanted string) bool {
	want, err := net.ResolveTCPAddr("tcp", wanted)
	got, ok := is.(*net.TCPAddr)
	if err != nil || !ok {
		return false
	}
	everywhere := (want.IP == nil || want.IP.IsUnspecified()) && got.IP.IsUnspecified()
	return (want.Port == 0 || want.Port == got.Port) && (everywhere || want.IP.Equal(got.IP))
}

// listen opens a TCP listener and says in whose way it is when it cannot.
func listen(section, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s.listen: %w; is another byokd running? To see who listens: ss -ltnp", section, err)
	}
	return l, nil
}

// share splits the time to stop: the proxy gets a third to finish its requests, the volume the rest.
func (c Config) share(third int) time.Duration {
	return c.StopTimeout.Duration * time.Duration(third) / 3
}
