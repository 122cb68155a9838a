//go:build linux

package test

import (
	"debug/elf"
	"slices"
	"testing"
)

// The budgets of memory, docs/PERFORMANCE.md: what byokd may have resident.
const (
	idleBudget   = 40 << 20
	loadedBudget = 256 << 20
)

// TestMemoryBudgets: an idle byokd with a volume and two buckets, and one with
// readers and writers flat out on all of them, stay within their memory, the keeper aside, which is told. What a
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
	t.Logf("resident: %d MiB idle, %d MiB at the peak under load; the keeper %d MiB", idle>>20, loaded>>20, residentOf(t, s.daemon.pid(), "VmRSS:")>>20)
	if idle > idleBudget || loaded > loadedBudget {
		t.Errorf("resident: %d MiB idle, %d MiB under load; the budgets are %d and %d", idle>>20, loaded>>20, idleBudget>>20, loadedBudget>>20)
	}
}

// TestUnusedMethodsAreLeftOut: the linker leaves out methods that nobody calls, unless something calls methods by a name
// that only the run tells, as html/template does: then all methods of all types are in the program, a third of it, and 5 MiB
// more of it are resident. `go build -ldflags=-dumpdep` shows what brought it in (ReflectMethod).
func TestUnusedMethodsAreLeftOut(t *testing.T) {
	program, err := shipped()
	if err != nil {
		t.Fatal(err)
	}
	file, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	symbols, err := file.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	const client = "github.com/aws/aws-sdk-go-v2/service/kms.(*Client)."
	has := func(name string) bool {
		return slices.ContainsFunc(symbols, func(s elf.Symbol) bool { return s.Name == name })
	}
	if !has(client + "Decrypt") {
		t.Fatal("the program does not ask KMS: the search is broken")
	}
	if has(client + "ScheduleKeyDeletion") {
		t.Error("the program can delete keys: methods that nobody calls are in it")
	}
}
