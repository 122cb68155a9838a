package fleet

import (
	"testing"
	"time"
)

// FuzzHint: a datagram that nobody with the secret has sealed is refused, whatever it is.
func FuzzHint(f *testing.F) {
	now := time.UnixMilli(1_700_000_000_000)
	secret := []byte("a secret of the fleet, 32 bytes.")
	f.Add(hint{sender: id{1}, key: idOf("arn:aws:kms:eu-central-1:111122223333:key/1"), at: now}.seal([]byte("another secret")))
	f.Add([]byte(magic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, datagram []byte) {
		h, err := open(secret, datagram, now)
		if err == nil {
			t.Fatalf("%+v was accepted", h)
		}
	})
}
