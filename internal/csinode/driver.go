package csinode

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Name is the driver's, as in CSIDriver objects and volumes.
const Name = "csi.byokd.io"

// Options of a Driver. All are required but Published.
type Options struct {
	Endpoint   string // unix:///PATH of the CSI socket
	NodeName   string
	KubeletDir string // kubelet's root directory, /var/lib/kubelet
	StateDir   string // where the driver remembers what is published
	Version    string
	Log        *zap.Logger
	// Published is told of each answer to kubelet: op is publish or unpublish.
	Published func(op string, err error)
}

// Driver is the node driver.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer

	options Options
	log     *zap.Logger

	mu      sync.Mutex
	volumes map[string]*volume  // guarded by mu
	busy    map[string]struct{} // ids being published or unpublished; guarded by mu
	ready   bool                // guarded by mu
}

// New makes a driver; Run runs it.
func New(o Options) (*Driver, error) {
	if !filepath.IsAbs(o.KubeletDir) || !filepath.IsAbs(o.StateDir) || o.NodeName == "" {
		return nil, errors.New("the node's name and absolute paths of kubelet's directory and of the state are needed")
	}
	o.KubeletDir = filepath.Clean(o.KubeletDir)
	if o.Published == nil {
		o.Published = func(string, error) {}
	}
	return &Driver{options: o, log: o.Log, volumes: map[string]*volume{}, busy: map[string]struct{}{}}, nil
}

// stopWithin is how long calls of kubelet that have begun may take at the end.
const stopWithin = 5 * time.Second

// Run takes up what is published and serves kubelet until ctx ends. Mounts stay.
func (d *Driver) Run(ctx context.Context) error {
	if err := os.MkdirAll(d.options.StateDir, 0o700); err != nil {
		return err
	}
	if err := d.recover(); err != nil {
		return err
	}
	defer d.letGo()
	l, err := listenCSI(d.options.Endpoint)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(d.logged))
	csi.RegisterIdentityServer(server, d)
	csi.RegisterNodeServer(server, d)
	d.setReady(true)
	defer d.setReady(false)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("the CSI socket ended: %w", err)
	case <-ctx.Done():
	}
	stopped := make(chan struct{})
	go func() { server.GracefulStop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(stopWithin):
		server.Stop()
	}
	return nil
}

// letGo ends the connections; sidecars keep their mounts and wait for the next driver.
func (d *Driver) letGo() {
	d.mu.Lock()
	volumes := slices.Collect(maps.Values(d.volumes))
	clear(d.volumes)
	d.mu.Unlock()
	var closing sync.WaitGroup
	for _, v := range volumes {
		closing.Go(v.close)
	}
	closing.Wait()
}

func listenCSI(endpoint string) (net.Listener, error) {
	path, ok := strings.CutPrefix(endpoint, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return nil, fmt.Errorf("the endpoint %q is not unix:///PATH", endpoint)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", path)
}

func (d *Driver) logged(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	answer, err := handler(ctx, req)
	if err != nil {
		d.log.Warn("kubelet was refused", zap.String("call", info.FullMethod), zap.Error(err))
	}
	return answer, err
}

func (d *Driver) setReady(ready bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ready = ready
}

// Ready reports whether kubelet is served.
func (d *Driver) Ready() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ready
}

// Mounts counts the published volumes: those that a sidecar serves, and those that
// wait for one.
func (d *Driver) Mounts() (served, waiting int) {
	d.mu.Lock()
	volumes := slices.Collect(maps.Values(d.volumes))
	d.mu.Unlock()
	for _, v := range volumes {
		if now, _ := v.server.Serving(); now {
			served++
		} else {
			waiting++
		}
	}
	return served, waiting
}
