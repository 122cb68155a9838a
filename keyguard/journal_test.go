package keyguard

import (
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestJournalNeverBlocksAndTellsWhatItLost(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	told := int64(0)
	j := newJournal(zap.New(core), func(n int64) { told += n })
	written := 0
	for range journalSize + 7 { // nobody writes: a blocking add would end here
		j.add(func() { written++ })
	}
	j.end()
	j.write()
	if written != journalSize {
		t.Errorf("%d records written, want %d", written, journalSize)
	}
	lost := logs.FilterField(zap.Int64("lost", 7)).Len()
	if lost != 1 || told != 7 {
		t.Errorf("the loss was told %d times, want once, and %d records recorded as lost: %v", lost, told, logs.All())
	}
}
