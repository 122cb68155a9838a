package seal

import "sync/atomic"

const (
	// memoFrom is the content from which an object's cipher is remembered: it is then
	// asked for again and again, batch by batch, and deriving it takes about a sixth of
	// the time that opening half a MiB does.
	memoFrom = 8 * SegmentSize
	// objectSlots bounds the ciphers remembered, 2 KB each, for as many transfers at
	// once as are expected. Two that fall into one slot derive theirs anew.
	objectSlots = 64
)

// objectMemo remembers the ciphers of objects that were opened, by their whole
// headers: a header that differs in one bit is verified anew. It goes with the keys
// of its Root.
type objectMemo [objectSlots]atomic.Pointer[openedObject]

type openedObject struct {
	header [ObjectHeaderSize]byte
	cipher *ObjectCipher
}

func (m *objectMemo) slot(h *ObjectHeader) *atomic.Pointer[openedObject] {
	return &m[h.Salt[0]%objectSlots]
}

// remembered returns the cipher of an object that was opened before, or nil.
func (r *Root) remembered(h *ObjectHeader) *ObjectCipher {
	if h.PlainSize < memoFrom {
		return nil
	}
	opened := r.objects.slot(h).Load()
	if opened == nil {
		return nil
	}
	var raw [ObjectHeaderSize]byte
	if h.put(&raw); raw != opened.header {
		return nil
	}
	return opened.cipher
}

// remember keeps the cipher of a verified header, unless r was wiped meanwhile.
func (r *Root) remember(h *ObjectHeader, cipher *ObjectCipher) {
	if h.PlainSize < memoFrom {
		return
	}
	opened := &openedObject{cipher: cipher}
	h.put(&opened.header)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.prk != nil {
		r.objects.slot(h).Store(opened)
	}
}

// forget drops all ciphers. The caller holds r.mu.
func (m *objectMemo) forget() {
	for i := range m {
		m[i].Store(nil)
	}
}
