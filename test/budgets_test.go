//go:build linux

package test

import "testing"

// The budgets of memory, docs/PERFORMANCE.md: what byokd may have resident.
const (
	idleBudget   = 40 << 20
	loadedBudget = 256 << 20
)

// TestMemoryBudgets: an idle byokd with a volume and two buckets, and one with
// readers and writers flat out on all of them, stay within their memory. What a
// million cached inodes take is measured by `make bench-scale`; that each takes but an
// entry is tested in fs.
func TestMemoryBudgets(t *testing.T) {
	s := newStack(t, shipped)
	idle := s.memory("VmRSS:")
	l := s.startLoad()
	for range 5 { // the slowest loop goes on five times, and the others do so thousands of times
		s.awaitProgress(l)
	}
	loaded := s.memory("VmHWM:")
	s.retire(l.workers)
	s.retireClients(l.clients)
	t.Logf("resident: %d MiB idle, %d MiB at the peak under load", idle>>20, loaded>>20)
	if idle > idleBudget || loaded > loadedBudget {
		t.Errorf("resident: %d MiB idle, %d MiB under load; the budgets are %d and %d", idle>>20, loaded>>20, idleBudget>>20, loadedBudget>>20)
	}
}
