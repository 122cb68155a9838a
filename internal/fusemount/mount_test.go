package fusemount

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseMountinfo(t *testing.T) {
	text := `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
37 35 0:52 / /var/lib/kubelet/a\040b rw,nosuid shared:7 - fuse.byokd byokd rw,user_id=0
38 35 0:53 / /x rw - fuse.other byokd rw
39 35 0:54 / /var/lib/kubelet/c rw,nosuid - fuse.byokd byokd rw
broken line
40 35 nonsense / /y rw - fuse.byokd byokd rw
`
	got := parseMountinfo(text)
	want := []Mounted{{"/var/lib/kubelet/a b", unix.Mkdev(0, 52)}, {"/var/lib/kubelet/c", unix.Mkdev(0, 54)}}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("%+v, want %+v", got, want)
	}
}
