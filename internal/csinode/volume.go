package csinode

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/internal/durable"
	"github.com/byokd/byokd/internal/fusemount"
	"github.com/byokd/byokd/internal/handover"
)

// record is what the driver knows of a published volume after its restart.
type record struct {
	ID     string `json:"id"`
	Target string `json:"target"`
	PodUID string `json:"podUID"`
	Run    string `json:"runVolume"`
	Pod    string `json:"pod"` // NAMESPACE/NAME/VOLUME, for people
}

// volume is one published volume.
type volume struct {
	record
	server   *handover.Server
	listener *net.UnixListener
	device   uint64 // st_dev of what is in the mount
	log      *zap.Logger
	serving  sync.WaitGroup
	left     chan struct{} // a connection has ended since deserted looked; of one
	ended    chan struct{} // closed by close
}

// mount mounts a volume and waits for its sidecar. Nothing is left after an error.
func (d *Driver) mount(r record) (_ *volume, err error) {
	run, err := d.openRun(r.PodUID, r.Run)
	if err != nil {
		return nil, err
	}
	defer unix.Close(run)
	if err := os.Mkdir(r.Target, 0o750); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	dev, err := fusemount.Open()
	if err != nil {
		return nil, err
	}
	if err := fusemount.Mount(dev, r.Target); err != nil {
		unix.Close(dev)
		return nil, err
	}
	v, err := d.offer(r, run, dev)
	if err == nil {
		err = d.remember(r)
	}
	if err != nil {
		if v != nil {
			v.close()
		}
		return nil, errors.Join(err, fusemount.End(r.Target))
	}
	return v, nil
}

// offer listens for the sidecar of a mount. dev becomes the volume's; -1 when the
// sidecar has it.
func (d *Driver) offer(r record, run, dev int) (*volume, error) {
	mounted, found, err := fusemount.At(r.Target)
	if err != nil || !found {
		if dev >= 0 {
			unix.Close(dev)
		}
		return nil, errors.Join(fmt.Errorf("there is no mount at %s", r.Target), err)
	}
	log := d.log.With(zap.String("pod", r.Pod))
	if err := fusemount.WidenReadAhead(mounted.Device); err != nil {
		log.Warn("the read-ahead window stays small: sequential reads are slower", zap.Error(err))
	}
	v := &volume{record: r, log: log, server: handover.NewServer(r.Pod, mounted, dev), device: mounted.Device,
		left: make(chan struct{}, 1), ended: make(chan struct{})}
	if v.listener, err = listenIn(run); err != nil {
		v.server.Close()
		return nil, err
	}
	v.serving.Go(v.accept)
	v.serving.Go(func() { d.attend(v) })
	return v, nil
}

// connectionsMax is how many connections a mount has at a time, of which one serves it
// and the others are being refused. More wait in the kernel.
const connectionsMax = 8

// acceptAgainAfter is the pause after a connection that could not be accepted.
const acceptAgainAfter = time.Second

// accept serves one sidecar after the other.
func (v *volume) accept() {
	turns := make(chan struct{}, connectionsMax)
	for {
		c, err := v.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // such as no descriptor left, for a while
			v.log.Error("a sidecar cannot be let in; it is tried again", zap.Error(err))
			select {
			case <-time.After(acceptAgainAfter):
				continue
			case <-v.ended:
				return
			}
		}
		select {
		case turns <- struct{}{}:
		case <-v.ended:
			_ = c.Close()
			return
		}
		v.serving.Go(func() {
			switch err := v.server.Serve(c); {
			case err != nil:
				v.log.Warn("a connection of the sidecar ended", zap.Error(err))
			default:
				v.log.Info("the sidecar has gone; calls of the mount wait for the next")
			}
			<-turns
			select {
			case v.left <- struct{}{}:
			default: // it is known already
			}
		})
	}
}

// attend looks after the mount between one sidecar and the next.
func (d *Driver) attend(v *volume) {
	for {
		select {
		case <-v.left:
			d.deserted(v)
		case <-v.ended:
			return
		}
	}
}

// closeWithin is how long close waits for those who serve connections. What a sidecar
// has passed may be such that its close waits for the sidecar itself, until the mount is
// ended.
const closeWithin = 5 * time.Second

// close gives up the device and ends the connection of the sidecar.
func (v *volume) close() {
	close(v.ended)
	_ = v.listener.Close()
	v.server.Close()
	done := make(chan struct{})
	go func() { v.serving.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(closeWithin):
		v.log.Warn("a connection of the sidecar does not end, and is left behind")
	}
}

// unmount takes a mount away, whoever uses or serves it, and its directory.
func unmount(target string) error {
	for range 16 { // a driver that was killed may have left one upon the other
		_, found, err := fusemount.At(target)
		if err != nil {
			return err
		}
		if !found {
			break
		}
		if err := fusemount.End(target); err != nil {
			return err
		}
	}
	// Never what is in it: only a mount's directory, which is empty.
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (d *Driver) recordFile(id string) string {
	return filepath.Join(d.options.StateDir, id+".json")
}

// remember makes a record durable.
func (d *Driver) remember(r record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return durable.WriteFile(d.recordFile(r.ID), text, 0o600)
}

// recordMax is more than a record can have.
const recordMax = 16 << 10

// recover takes up the volumes that were published before a restart.
func (d *Driver) recover() error {
	files, err := filepath.Glob(filepath.Join(d.options.StateDir, "*.json"))
	if err != nil {
		return err
	}
	for _, file := range files {
		var r record
		text, err := durable.ReadFile(file, recordMax)
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err == nil {
			err = d.resume(r)
		}
		if err != nil {
			d.log.Warn("a volume published before is not taken up; if its pod still runs, delete it", zap.String("file", file), zap.Error(err))
		}
	}
	return nil
}

func (d *Driver) resume(r record) error {
	if uid, err := d.targetOf(r.Target); err != nil || uid != r.PodUID || !dnsLabel().MatchString(r.Run) || !volumeID().MatchString(r.ID) {
		return errors.Join(errors.New("not a record of this driver"), err)
	}
	run, err := d.openRun(r.PodUID, r.Run)
	if err != nil {
		return err
	}
	defer unix.Close(run)
	v, err := d.offer(r, run, -1)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.volumes[r.ID] = v
	d.log.Info("took up a volume", zap.String("pod", r.Pod))
	return nil
}
