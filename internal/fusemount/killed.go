package fusemount

import (
	"bytes"
	"os"
	"strconv"
)

// BeingKilled reports whether the thread has a SIGKILL pending or is exiting
// (PF_EXITING, include/linux/sched.h); tid is of this process's PID namespace. A thread that is gone counts: nobody
// waits for the answer.
func BeingKilled(tid uint32) bool {
	dir := "/proc/" + strconv.FormatUint(uint64(tid), 10)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return os.IsNotExist(err)
	}
	if sigkillIn(status, "\nSigPnd:\t") || sigkillIn(status, "\nShdPnd:\t") {
		return true
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return os.IsNotExist(err)
	}
	return exiting(stat)
}

// sigkillIn looks for signal 9 in a mask of /proc/TID/status.
func sigkillIn(status []byte, field string) bool {
	_, rest, found := bytes.Cut(status, []byte(field))
	if !found {
		return false
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	mask, err := strconv.ParseUint(string(line), 16, 64)
	return err == nil && mask&(1<<(9-1)) != 0
}

// exiting looks for PF_EXITING in the flags of /proc/TID/stat: the ninth field,
// the seventh after the command's name, which may itself hold ") ".
func exiting(stat []byte) bool {
	const pfExiting, flagsAfterName = 0x4, 7
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return false
	}
	fields := bytes.Fields(stat[end+1:])
	if len(fields) < flagsAfterName {
		return false
	}
	flags, err := strconv.ParseUint(string(fields[flagsAfterName-1]), 10, 64)
	return err == nil && flags&pfExiting != 0
}
