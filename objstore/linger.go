package objstore

import (
	"io"
	"net/http"
	"time"
)

const (
	// lingerBytes is how much of a body is still read after its request was refused
	// for now: a part of the usual sizes (5 to 16 MiB).
	lingerBytes = 16 << 20
	// lingerFor bounds the reading: a client that is slower gets the answer all the
	// same, and finds its connection closed.
	lingerFor = 2 * time.Second
)

// linger reads what a client is still sending of an upload that will be answered
// "try again". Unread, more than 256 KiB of it make net/http close the connection
// behind the answer, and a client that is in the midst of writing sees a reset
// instead of the answer. A client that asked first (Expect: 100-continue) was never
// told to send, and is not told now.
func linger(w http.ResponseWriter, r *http.Request) {
	if r.Body == nil || r.ContentLength == 0 || r.Header.Get("Expect") != "" {
		return
	}
	control := http.NewResponseController(w)
	if control.SetReadDeadline(time.Now().Add(lingerFor)) != nil {
		return
	}
	_, err := io.CopyN(io.Discard, r.Body, lingerBytes)
	if err == io.EOF { // all of it: the connection may serve on
		_ = control.SetReadDeadline(time.Time{})
	}
}
