package keyguard

import (
	"time"

	"golang.org/x/sys/unix"
)

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) Boot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// The clock exists since Linux 2.6.39; without it no lease can be kept.
		panic("keyguard: CLOCK_BOOTTIME: " + err.Error())
	}
	return time.Duration(ts.Nano())
}
