package csinode

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/fusemount"
)

// A mount whose sidecar has died waits for the next one, and so do its callers. That
// must not keep them alive: where the pod is deleted meanwhile, its containers have to
// end, or kubelet never unpublishes.

const (
	// desertedEvery is how often callers are looked at that wait for nobody, and
	// desertedLater after desertedSoon.
	desertedEvery = 500 * time.Millisecond
	desertedLater = 2 * time.Second
	desertedSoon  = 10 * time.Second
	// desertedMax is how long every process of the pod that uses the mount may be being
	// killed, in vain, until the mount is made anew: they hang in the kernel behind
	// pages that only a sidecar could write.
	desertedMax = 5 * time.Second
)

// deserted looks after a mount without a sidecar, until there is one, or no mount.
func (d *Driver) deserted(v *volume) {
	began := time.Now()
	var hanging time.Time // since when nobody but hanging processes uses it; zero for not
	warned := false
	for pause := time.Duration(0); ; pause = desertedEvery {
		if time.Since(began) > desertedSoon {
			pause = desertedLater
		}
		select {
		case <-v.ended:
			return
		case <-time.After(pause):
		}
		gone, alone, err := v.letKilledGo()
		switch {
		case !alone:
			return
		case err != nil && !warned:
			warned = true
			v.log.Warn("callers of a mount without a sidecar cannot be let go when they are killed", zap.Error(err))
		case gone > 0:
			v.log.Info("let go of callers that were killed while there was no sidecar", zap.Int("calls", gone))
		}
		if !onlyKilled(v.PodUID, v.device) {
			hanging = time.Time{}
		} else if hanging.IsZero() {
			hanging = time.Now()
		} else if time.Since(hanging) > desertedMax {
			go d.renew(v) // not here: it waits for this to end
			return
		}
	}
}

// letKilledGo lets callers go that are being killed. alone is false when there is a
// sidecar, or no mount, any more.
func (v *volume) letKilledGo() (gone int, alone bool, err error) {
	alone = v.server.Alone(func(device int) { gone, err = fusemount.LetKilledGo(device) })
	return gone, alone, err
}

// renew makes the mount of a volume anew. Nobody uses the old one who is not being
// killed; what they had not synced goes with them.
func (d *Driver) renew(v *volume) {
	if !d.begin(v.ID) {
		return // it is being unpublished
	}
	defer d.end(v.ID)
	if d.volume(v.ID) != v {
		return
	}
	v.log.Warn("every process of the pod that uses the mount is being killed and hangs, and there is no sidecar: the mount is made anew")
	d.forget(v.ID)
	renewed, err := d.remount(v.record)
	if err != nil {
		v.log.Warn("there is no mount any more; delete the pod", zap.Error(err))
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.volumes[v.ID] = renewed
}

func (d *Driver) remount(r record) (*volume, error) {
	if err := fusemount.End(r.Target); err != nil {
		return nil, err
	}
	return d.mount(r)
}

// onlyKilled reports whether processes of a pod have a mount of the device, and all of
// them are being killed. The pod is known by its uid, which kubelet puts into the names
// of its control groups; systemd writes it with other dashes.
func onlyKilled(uid string, device uint64) bool {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		panic(err) // the pattern is constant
	}
	mount := fmt.Sprintf(" %d:%d ", unix.Major(device), unix.Minor(device))
	found := false
	for _, dir := range processes {
		group, err := os.ReadFile(dir + "/cgroup")
		if err != nil || !strings.Contains(strings.ReplaceAll(string(group), "_", "-"), uid) || !hasMount(dir, mount) {
			continue
		}
		var tid uint32
		if _, err := fmt.Sscan(filepath.Base(dir), &tid); err != nil || !fusemount.BeingKilled(tid) {
			return false
		}
		found = true
	}
	return found
}

// hasMount looks at the mounts of a process: those of a thread that has not ended.
func hasMount(dir, mount string) bool {
	threads, err := os.ReadDir(dir + "/task")
	if err != nil {
		return false
	}
	for _, thread := range threads {
		text, err := os.ReadFile(filepath.Join(dir, "task", thread.Name(), "mountinfo"))
		if err == nil {
			return strings.Contains(string(text), mount)
		}
		if errors.Is(err, os.ErrPermission) {
			return false
		}
	}
	return false
}
