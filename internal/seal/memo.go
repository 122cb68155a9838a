package seal

import (
	"encoding/binary"
	"sync"
)

const (
	memoShards = 64
	// memoPerShard bounds the FileCiphers remembered to 8192 in all. One that
	// writes, and reads what was written before, holds about 1.8 KB: 15 MB.
	memoPerShard = 128
)

// fileMemo remembers FileCiphers by file id, in shards so that reads of
// different files do not share a lock, and bounded by giving up those that were
// not used since the last look.
type fileMemo struct {
	shards [memoShards]memoShard
}

type memoShard struct {
	mu    sync.RWMutex
	files map[FileID]*FileCipher // by mu
	_     [32]byte               // keeps neighbours' locks off one cache line
}

func (m *fileMemo) init() {
	for i := range m.shards {
		m.shards[i].files = make(map[FileID]*FileCipher)
	}
}

func (m *fileMemo) shard(id *FileID) *memoShard {
	return &m.shards[binary.BigEndian.Uint16(id[:])%memoShards]
}

// get returns the remembered cipher or nil.
func (m *fileMemo) get(id FileID) *FileCipher {
	s := m.shard(&id)
	s.mu.RLock()
	c := s.files[id]
	s.mu.RUnlock()
	if c != nil && !c.recent.Load() {
		c.recent.Store(true)
	}
	return c
}

// put remembers c, or returns the one that came first.
func (m *fileMemo) put(c *FileCipher) *FileCipher {
	s := m.shard(&c.id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.files[c.id]; first != nil {
		return first
	}
	if len(s.files) >= memoPerShard {
		s.makeRoom()
	}
	c.recent.Store(true)
	s.files[c.id] = c
	return c
}

// makeRoom gives up one cipher, a second chance for those used recently. s.mu
// is held for writing. Who still uses the cipher keeps it until done.
func (s *memoShard) makeRoom() {
	var victim FileID
	for id, c := range s.files { // in random order
		victim = id
		if !c.recent.Swap(false) {
			break
		}
	}
	delete(s.files, victim)
}

func (m *fileMemo) forget(id FileID) {
	s := m.shard(&id)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, id)
}

func (m *fileMemo) wipe() {
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		clear(s.files)
		s.mu.Unlock()
	}
}
