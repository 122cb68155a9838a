package metrics

import (
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/byokd/byokd/fs"
)

// FS turns the filesystem's operations into series. It implements fs.Observer; every method is safe for
// concurrent use and allocates nothing once an operation has been seen.
type FS struct {
	duration *prometheus.HistogramVec
	errors   *prometheus.CounterVec
	read     prometheus.Counter
	written  prometheus.Counter
	tampered prometheus.Counter
	byOp     sync.Map // operation → prometheus.Observer: WithLabelValues hashes on every call
}

var _ fs.Observer = (*FS)(nil)

// VolumeGauges are the facts about a volume that are read at the moment of a scrape.
type VolumeGauges struct {
	LowerFreeBytes uint64 // space left below the mount
	ParkedCalls    int64  // calls that wait for the key
	Writeback      bool   // the kernel agreed to cache writes
	ReserveMissing int64  // bytes that the reserve for a full disk lacks
	Inodes         int    // files and directories that the kernel knows
	UndrainedFiles uint64 // files of which a freeze left pages in the kernel, since the mount
	ForeignNames   uint64 // lower names that byokd did not write, met since the mount

	Lower         fs.LowerState // how the directory below is
	LowerFailures []uint64      // calls that it has failed, in the order of fs.LowerErrors
}

// NewFS registers the series of the filesystem. gauges is asked at every scrape; ok is false while
// nothing is mounted, and the gauges are then absent.
func (r *Registry) NewFS(gauges func() (g VolumeGauges, ok bool)) *FS {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "byokd_fs_bytes_total",
		Help: "Plain bytes moved through the mount, as the kernel asked for them (cached reads do not count).",
	}, []string{"direction"})
	f := &FS{
		duration: newHistogramVec("byokd_fs_operation_duration_seconds",
			"Time from reading a FUSE request to its reply, including any wait for the key.", latencyBuckets(), "op"),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "byokd_fs_operation_errors_total",
			Help: "FUSE requests answered with an error, by its name; ENOENT and the like are everyday answers.",
		}, []string{"op", "errno"}),
		read: bytes.WithLabelValues("read"), written: bytes.WithLabelValues("write"),
		tampered: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "byokd_fs_tampered_blocks_total",
			Help: "Sealed blocks, or owners and modes, that failed authentication; reads of blocks are answered with EIO.",
		}),
	}
	r.prom.MustRegister(f.duration, f.errors, bytes, f.tampered, volumeCollector{gauges})
	return f
}

// Done records one finished operation. bytes are those of a read or a write, errno is 0 for success.
func (f *FS) Done(op string, bytes int, took time.Duration, errno syscall.Errno) {
	f.observer(op).Observe(took.Seconds())
	switch {
	case errno != 0:
		f.errors.WithLabelValues(op, errnoLabel(errno)).Inc()
	case bytes > 0 && strings.HasPrefix(op, "read"):
		f.read.Add(float64(bytes))
	case bytes > 0:
		f.written.Add(float64(bytes))
	}
}

// Damaged counts one block that failed authentication.
func (f *FS) Damaged() { f.tampered.Inc() }

func (f *FS) observer(op string) prometheus.Observer {
	if o, ok := f.byOp.Load(op); ok {
		return o.(prometheus.Observer)
	}
	o, _ := f.byOp.LoadOrStore(op, f.duration.WithLabelValues(op))
	return o.(prometheus.Observer)
}

func errnoLabel(errno syscall.Errno) string {
	if name := unix.ErrnoName(errno); name != "" {
		return name
	}
	return "other"
}

var (
	lowerFree  = prometheus.NewDesc("byokd_fs_lower_free_bytes", "Space left on the filesystem that holds the sealed files.", nil, nil)
	parked     = prometheus.NewDesc("byokd_fs_parked_calls", "Calls on the mount that wait for the key.", nil, nil)
	inodes     = prometheus.NewDesc("byokd_fs_cached_inodes", "Files and directories that the kernel knows and byokd keeps in memory.", nil, nil)
	reserve    = prometheus.NewDesc("byokd_fs_reserve_missing_bytes", "What is missing of the space set aside for a full disk; new data is refused while it is above 0.", nil, nil)
	undrained  = prometheus.NewDesc("byokd_fs_undrained_files_total", "Files of which a freeze could not take every cached page back in time; since the mount.", nil, nil)
	lowerState = prometheus.NewDesc("byokd_fs_lower_state", "How the directory of the sealed files is, as a state set: 1 for the present state, 0 for the others.", []string{"state"}, nil)
	lowerFails = prometheus.NewDesc("byokd_fs_lower_errors_total", "Calls, and syncs of byokd's own, that failed below with one of these errors; since the mount.", []string{"errno"}, nil)
	foreign    = prometheus.NewDesc("byokd_fs_foreign_names_total", "Names in the lower directory that byokd did not write, met while listing; since the mount.", nil, nil)
	writeback  = prometheus.NewDesc("byokd_fs_writeback_cache", "1 when the kernel caches writes (cache: writeback), 0 when it does not.", nil, nil)
)

// volumeCollector reads the gauges of the mounted volume.
type volumeCollector struct {
	gauges func() (VolumeGauges, bool)
}

func (c volumeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{lowerFree, parked, writeback, inodes, reserve, undrained, foreign, lowerState, lowerFails} {
		ch <- d
	}
}

func (c volumeCollector) Collect(ch chan<- prometheus.Metric) {
	g, ok := c.gauges()
	if !ok {
		return
	}
	ch <- prometheus.MustNewConstMetric(lowerFree, prometheus.GaugeValue, float64(g.LowerFreeBytes))
	ch <- prometheus.MustNewConstMetric(parked, prometheus.GaugeValue, float64(g.ParkedCalls))
	ch <- prometheus.MustNewConstMetric(writeback, prometheus.GaugeValue, oneIf(g.Writeback))
	ch <- prometheus.MustNewConstMetric(inodes, prometheus.GaugeValue, float64(g.Inodes))
	ch <- prometheus.MustNewConstMetric(reserve, prometheus.GaugeValue, float64(g.ReserveMissing))
	ch <- prometheus.MustNewConstMetric(undrained, prometheus.CounterValue, float64(g.UndrainedFiles))
	ch <- prometheus.MustNewConstMetric(foreign, prometheus.CounterValue, float64(g.ForeignNames))
	for _, s := range fs.LowerStates() {
		ch <- prometheus.MustNewConstMetric(lowerState, prometheus.GaugeValue, oneIf(s == g.Lower), s.String())
	}
	for i, count := range g.LowerFailures {
		ch <- prometheus.MustNewConstMetric(lowerFails, prometheus.CounterValue, float64(count), errnoLabel(fs.LowerErrors()[i]))
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
