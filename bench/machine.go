//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is on what the figures were measured.
type machine struct {
	Kernel      string `json:"kernel"`
	CPUs        int    `json:"cpus"`
	Processor   string `json:"processor"`
	Memory      string `json:"memory"`
	Disk        string `json:"disk"`
	Filesystem  string `json:"filesystem"`
	LoadAverage string `json:"loadAverage"` // at the start
	Quiet       bool   `json:"quiet"`       // nothing else was running then
}

// busyFrom is the load average, in parts of the processors, from which on a machine
// is taken for busy.
const busyFrom = 0.25

// describe looks at the machine and at the filesystem of dir.
func describe(dir string) machine {
	var name unix.Utsname
	_ = unix.Uname(&name)
	var cpus unix.CPUSet
	_ = unix.SchedGetaffinity(0, &cpus)
	m := machine{Kernel: unix.ByteSliceToString(name.Release[:]), CPUs: cpus.Count(), Processor: "?", Filesystem: filesystemOf(dir), Disk: diskOf(dir)}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if found := regexp.MustCompile(`model name\s*: (.*)`).FindSubmatch(text); found != nil {
			m.Processor = string(found[1])
		}
	}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		m.Memory = fmt.Sprintf("%.0f GiB", statusField(append([]byte("\n"), text...), "MemTotal:")/(1<<20))
	}
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		fields := strings.Fields(string(text))
		m.LoadAverage = strings.Join(fields[:3], " ")
		load, err := strconv.ParseFloat(fields[0], 64)
		m.Quiet = err == nil && load < busyFrom*float64(m.CPUs)
	}
	return m
}

func filesystemOf(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "?"
	}
	if known, ok := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.TMPFS_MAGIC: "tmpfs", unix.BTRFS_SUPER_MAGIC: "btrfs"}[st.Type]; ok {
		return known
	}
	return fmt.Sprintf("%#x", st.Type)
}

// diskOf describes the block device below a directory: Documentation/ABI/stable/sysfs-block.
func diskOf(dir string) string {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "?"
	}
	device, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return "no disk"
	}
	if _, err := os.Stat(device + "/partition"); err == nil {
		device = filepath.Dir(device)
	}
	read := func(name string) string {
		text, _ := os.ReadFile(filepath.Join(device, name))
		return strings.TrimSpace(string(text))
	}
	words := []string{filepath.Base(device)}
	if model := read("device/model"); model != "" {
		words = append(words, model)
	}
	if sectors, err := strconv.ParseFloat(read("size"), 64); err == nil {
		words = append(words, fmt.Sprintf("%.0f GiB", sectors*512/(1<<30)))
	}
	if cache := read("queue/write_cache"); cache != "" {
		words = append(words, cache)
	}
	return strings.Join(words, " ")
}

func (m machine) String() string {
	return fmt.Sprintf("Linux %s, %d × %s, %s; %s on %s; load average %s", m.Kernel, m.CPUs, m.Processor, m.Memory, m.Filesystem, m.Disk, m.LoadAverage)
}

// warning is what a reader of the figures must know, "" for nothing.
func (m machine) warning() string {
	if m.Quiet {
		return ""
	}
	return "WARNING: the machine was not quiet when this began (load average " + m.LoadAverage + "): the figures are not to be relied on"
}
