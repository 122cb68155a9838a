package keyguard

import (
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestJournalNeverBlocksAndTellsWhatItLost(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	j := newJournal(zap.New(core))
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
	if lost != 1 {
		t.Errorf("the loss was told %d times, want once: %v", lost, logs.All())
	}
}
