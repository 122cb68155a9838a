package csinode

import (
	"context"
	"errors"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/byokd/byokd/internal/fusemount"
)

// Keys of the volume's attributes: kubelet's own (podInfoOnMount), and ours.
const (
	keyEphemeral    = "csi.storage.k8s.io/ephemeral"
	keyPodName      = "csi.storage.k8s.io/pod.name"
	keyPodNamespace = "csi.storage.k8s.io/pod.namespace"
	keyPodUID       = "csi.storage.k8s.io/pod.uid"
	keyRunVolume    = "runVolume" // the pod's in-memory volume
	keyVolume       = "volume"    // the volume that is sealed, for people
)

// GetPluginInfo implements csi.IdentityServer.
func (d *Driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: Name, VendorVersion: d.options.Version}, nil
}

// GetPluginCapabilities implements csi.IdentityServer: there is no controller.
func (d *Driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{}, nil
}

// Probe implements csi.IdentityServer.
func (d *Driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

// NodeGetInfo implements csi.NodeServer.
func (d *Driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.options.NodeName}, nil
}

// NodeGetCapabilities implements csi.NodeServer: no staging, and no statistics, for
// which kubelet would look into mounts.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{}, nil
}

// NodePublishVolume implements csi.NodeServer.
func (d *Driver) NodePublishVolume(_ context.Context, req *csi.NodePublishVolumeRequest) (answer *csi.NodePublishVolumeResponse, err error) {
	defer func() { d.options.Published("publish", err) }()
	r, err := d.recordOf(req)
	if err != nil {
		return nil, err
	}
	if !d.begin(r.ID) {
		return nil, status.Error(codes.Aborted, "the volume is being published or unpublished")
	}
	defer d.end(r.ID)
	if v := d.volume(r.ID); v != nil {
		if v.record != r {
			return nil, status.Errorf(codes.AlreadyExists, "the volume is published at %s", v.Target)
		}
		_, mounted, err := fusemount.At(r.Target)
		serving, _ := v.server.Serving()
		if err == nil && mounted && (serving || v.server.HasDevice()) {
			return &csi.NodePublishVolumeResponse{}, nil
		}
		d.forget(r.ID)
	}
	if _, mounted, _ := fusemount.At(r.Target); mounted { // dead: nobody has its device
		if err := fusemount.End(r.Target); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
	}
	v, err := d.mount(r)
	switch {
	case errors.Is(err, errNotYet):
		return nil, status.Errorf(codes.Unavailable, "%v: an emptyDir called %q with medium Memory, which the injector adds", err, r.Run)
	case err != nil:
		return nil, status.Error(codes.Internal, err.Error())
	}
	d.mu.Lock()
	d.volumes[r.ID] = v
	d.mu.Unlock()
	d.log.Info("mounted for a pod", zap.String("pod", r.Pod))
	return &csi.NodePublishVolumeResponse{}, nil
}

// recordOf checks a request.
func (d *Driver) recordOf(req *csi.NodePublishVolumeRequest) (record, error) {
	bad := func(format string, args ...any) (record, error) {
		return record{}, status.Errorf(codes.InvalidArgument, format, args...)
	}
	about := req.GetVolumeContext()
	switch {
	case !volumeID().MatchString(req.GetVolumeId()):
		return bad("the volume id %q is not one of kubelet's", req.GetVolumeId())
	case req.GetTargetPath() == "":
		return bad("there is no target path")
	case req.GetVolumeCapability() == nil:
		return bad("there is no volume capability")
	case req.GetVolumeCapability().GetBlock() != nil:
		return bad("%s has no block volumes", Name)
	case req.GetReadonly():
		return bad("the volume is readOnly: mount it so in the containers that shall only read")
	case about[keyEphemeral] != "true":
		return bad("%s has inline volumes only, with podInfoOnMount", Name)
	case !dnsLabel().MatchString(about[keyRunVolume]):
		return bad("the attribute %s names no volume of the pod: %q", keyRunVolume, about[keyRunVolume])
	}
	uid, err := d.targetOf(req.GetTargetPath())
	if err != nil {
		return bad("%v", err)
	}
	if uid != about[keyPodUID] {
		return bad("the target is of pod %s, the volume of pod %s", uid, about[keyPodUID])
	}
	return record{ID: req.GetVolumeId(), Target: req.GetTargetPath(), PodUID: uid, Run: about[keyRunVolume],
		Pod: about[keyPodNamespace] + "/" + about[keyPodName] + "/" + about[keyVolume]}, nil
}

// NodeUnpublishVolume implements csi.NodeServer. It waits for nobody who serves or
// uses the mount.
func (d *Driver) NodeUnpublishVolume(_ context.Context, req *csi.NodeUnpublishVolumeRequest) (answer *csi.NodeUnpublishVolumeResponse, err error) {
	defer func() { d.options.Published("unpublish", err) }()
	if !volumeID().MatchString(req.GetVolumeId()) {
		return nil, status.Errorf(codes.InvalidArgument, "the volume id %q is not one of kubelet's", req.GetVolumeId())
	}
	if _, err := d.targetOf(req.GetTargetPath()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if !d.begin(req.GetVolumeId()) {
		return nil, status.Error(codes.Aborted, "the volume is being published or unpublished")
	}
	defer d.end(req.GetVolumeId())
	d.forget(req.GetVolumeId())
	if err := unmount(req.GetTargetPath()); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	if err := os.Remove(d.recordFile(req.GetVolumeId())); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, status.Error(codes.Internal, err.Error())
	}
	d.log.Info("unmounted", zap.String("target", req.GetTargetPath()))
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// begin and end keep two calls for one volume apart.
func (d *Driver) begin(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, busy := d.busy[id]; busy {
		return false
	}
	d.busy[id] = struct{}{}
	return true
}

func (d *Driver) end(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.busy, id)
}

func (d *Driver) volume(id string) *volume {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.volumes[id]
}

// forget gives up what is held for a volume.
func (d *Driver) forget(id string) {
	d.mu.Lock()
	v := d.volumes[id]
	delete(d.volumes, id)
	d.mu.Unlock()
	if v != nil {
		v.close()
	}
}
