package awskms

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/byokd/byokd/internal/seal"
	"github.com/byokd/byokd/keyguard"
)

// grantedBody is an answer that would grant each operation.
var grantedBody = fmt.Sprintf(`{"KeyId":%q,"Plaintext":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=","CiphertextBlob":"AQID"}`, testARN)

// hostile is a server that answers on raw connections. It ends with the test.
func hostile(t *testing.T, answer func(conn net.Conn, r *http.Request)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[conn] = true
			mu.Unlock()
			all.Go(func() {
				defer conn.Close()
				r, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, r.Body) // the client may leave at any time
				answer(conn, r)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		for conn := range open {
			conn.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return "http://" + listener.Addr().String()
}

// says answers with these bytes and closes the connection.
func says(text string) func(net.Conn, *http.Request) {
	return func(conn net.Conn, _ *http.Request) { _, _ = io.WriteString(conn, text) }
}

// endless answers with begin, and then with more until the client leaves.
func endless(begin, more string) func(net.Conn, *http.Request) {
	return func(conn net.Conn, _ *http.Request) {
		block := []byte(strings.Repeat(more, 1+(1<<16)/len(more)))
		_, err := io.WriteString(conn, begin)
		for err == nil {
			_, err = conn.Write(block)
		}
	}
}

// framed is a whole answer with a body.
func framed(head, body string) string {
	return fmt.Sprintf("%s\r\nContent-Type: application/x-amz-json-1.1\r\nContent-Length: %d\r\n\r\n%s", head, len(body), body)
}

// bomb is an answer of a few hundred kilobytes that unpacks to a gigabyte of grant.
func bomb(t *testing.T) string {
	t.Helper()
	var packed bytes.Buffer
	w, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.WriteString(w, strings.TrimSuffix(grantedBody, "}")+`,"x":"`)
	zeros := bytes.Repeat([]byte{'0'}, 1<<20)
	for i := 0; i < 64 && err == nil; i++ {
		_, err = w.Write(zeros)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return framed("HTTP/1.1 200 OK\r\nContent-Encoding: gzip", packed.String())
}

// TestHostileAnswers: whatever answers in the place of KMS, every call ends with what it
// means, no plaintext is taken from it, and it costs no memory.
func TestHostileAnswers(t *testing.T) {
	const ok = "HTTP/1.1 200 OK"
	unknown, timeout, cut := keyguard.ReasonUnknownFault, keyguard.ReasonTimeout, keyguard.ReasonConnection
	for name, c := range map[string]struct {
		answer func(net.Conn, *http.Request)
		reason keyguard.Reason // "": granted
		other  keyguard.Reason // what may be told instead, where it depends on which end is seen first
	}{
		"an endless body":             {answer: endless(ok+"\r\n\r\n", "x"), reason: unknown},
		"an endless string of JSON":   {answer: endless(ok+"\r\n\r\n"+`{"KeyId":"`, "a"), reason: unknown},
		"endless chunks":              {answer: endless(ok+"\r\nTransfer-Encoding: chunked\r\n\r\n", "4\r\nabcd\r\n"), reason: unknown},
		"endless chunk extensions":    {answer: endless(ok+"\r\nTransfer-Encoding: chunked\r\n\r\n1;", "x"), reason: unknown},
		"an endless header":           {answer: endless(ok+"\r\nX: ", "x"), reason: unknown},
		"endless headers":             {answer: endless(ok+"\r\n", "X: y\r\n"), reason: unknown},
		"an endless status":           {answer: endless("HTTP/1.1 200 ", "O"), reason: unknown},
		"endless interim answers":     {answer: endless("", "HTTP/1.1 100 Continue\r\n\r\n"), reason: unknown},
		"a long body, announced":      {answer: says(ok + "\r\nContent-Length: 9000000000000000000\r\n\r\n{"), reason: cut},
		"a bomb that was not asked":   {answer: says(bomb(t)), reason: unknown},
		"no HTTP":                     {answer: says("SSH-2.0-OpenSSH_9.6\r\n"), reason: unknown, other: cut},
		"a negative length":           {answer: says(ok + "\r\nContent-Length: -1\r\n\r\n{}"), reason: unknown},
		"two lengths":                 {answer: says(ok + "\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"), reason: unknown},
		"half JSON":                   {answer: says(framed(ok, grantedBody[:len(grantedBody)/2])), reason: unknown},
		"JSON of other types":         {answer: says(framed(ok, `{"KeyId":7,"Plaintext":["x"],"CiphertextBlob":{}}`)), reason: unknown},
		"a list":                      {answer: says(framed(ok, `[`+grantedBody+`]`)), reason: unknown},
		"null":                        {answer: says(framed(ok, `null`)), reason: unknown},
		"deep JSON":                   {answer: says(framed(ok, strings.Repeat(`{"a":`, 8000))), reason: unknown},
		"no base64":                   {answer: says(framed(ok, strings.NewReplacer("AAEC", "!!!!", "AQID", "!!!!").Replace(grantedBody))), reason: unknown},
		"204":                         {answer: says("HTTP/1.1 204 No Content\r\n\r\n"), reason: unknown},
		"302":                         {answer: says("HTTP/1.1 302 Found\r\nLocation: https://portal.example/login\r\nContent-Length: 0\r\n\r\n"), reason: unknown},
		"301 to another Region":       {answer: says(framed("HTTP/1.1 301 Moved Permanently\r\nLocation: https://kms.eu-west-1.amazonaws.com/", `{"__type":"PermanentRedirect"}`)), reason: unknown},
		"308 without a place":         {answer: says("HTTP/1.1 308 Permanent Redirect\r\nContent-Length: 0\r\n\r\n"), reason: unknown},
		"101":                         {answer: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), reason: unknown, other: cut},
		"429 with Retry-After":        {answer: says("HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"), reason: keyguard.ReasonThrottled},
		"throttled, with Retry-After": {answer: says(framed("HTTP/1.1 400 Bad Request\r\nRetry-After: 3600", `{"__type":"ThrottlingException"}`)), reason: keyguard.ReasonThrottled},
		"503 with Retry-After":        {answer: says("HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"), reason: keyguard.ReasonServiceFault},
		"a body cut in the middle":    {answer: says(ok + "\r\nContent-Length: 300\r\n\r\n" + grantedBody[:40]), reason: cut},
		"silence":                     {answer: hush, reason: timeout},
		"silence after the head":      {answer: saysAndHushes(ok + "\r\nContent-Length: 300\r\n\r\n"), reason: timeout},
		"silence in the body":         {answer: saysAndHushes(ok + "\r\nContent-Length: 300\r\n\r\n" + grantedBody[:40]), reason: timeout},
		"drop by drop":                {answer: drip(framed(ok, grantedBody)), reason: timeout},
		"HTTP/1.0":                    {answer: says(framed("HTTP/1.0 200 OK", grantedBody))},
		"HTTP/1.0 without a length":   {answer: says("HTTP/1.0 200 OK\r\n\r\n" + grantedBody)},
		"interim answers":             {answer: says("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + framed(ok, grantedBody))},
	} {
		t.Run(name, func(t *testing.T) {
			address, limit := hostile(t, c.answer), time.Minute
			if c.reason == timeout {
				limit = 2 * time.Second // long enough to have asked
			}
			var all sync.WaitGroup // at the same time, for some wait
			for _, op := range operations {
				all.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), limit)
					defer cancel()
					// A client for each: one that keeps its connection would meet the end of that.
					call := calls(newClient(t, configuration(t, "id", "secret"), testARN, address))[op]
					given := 0
					err := call(ctx, func(plain []byte) error { given += len(plain); return nil })
					reason := keyguard.ReasonOf(err)
					if reason != c.reason && (c.other == "" || reason != c.other) || c.reason != "" && (keyguard.StateOf(err) != keyguard.Unreachable || given != 0) {
						t.Errorf("%s: %d bytes of plaintext, %v, want %q", op, given, err, c.reason)
					}
				})
			}
			all.Wait()
		})
	}
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	if peak := after.HeapSys >> 20; peak > 256 {
		t.Errorf("the heap grew to %d MiB", peak)
	}
}

// operations are the names of calls.
var operations = []string{"Probe", "Unwrap", "GenerateDataKey", "GenerateProbe"}

// calls are the operations of a client, by name.
func calls(c *Client) map[string]func(context.Context, func([]byte) error) error {
	type use = func([]byte) error
	return map[string]func(context.Context, use) error{
		"Probe":  func(ctx context.Context, _ use) error { _, err := c.Probe(ctx, []byte("p"), binding); return err },
		"Unwrap": func(ctx context.Context, f use) error { _, err := c.Unwrap(ctx, []byte("w"), binding, f); return err },
		"GenerateDataKey": func(ctx context.Context, f use) error {
			_, _, err := c.GenerateDataKey(ctx, binding, f)
			return err
		},
		"GenerateProbe": func(ctx context.Context, _ use) error { _, _, err := c.GenerateProbe(ctx, binding); return err },
	}
}

// hush keeps the connection without a word until the client leaves.
func hush(conn net.Conn, _ *http.Request) { _, _ = io.Copy(io.Discard, conn) }

func saysAndHushes(text string) func(net.Conn, *http.Request) {
	return func(conn net.Conn, r *http.Request) {
		_, _ = io.WriteString(conn, text)
		hush(conn, r)
	}
}

// drip answers with a byte now and then: no single read takes long, the answer does.
func drip(text string) func(net.Conn, *http.Request) {
	return func(conn net.Conn, _ *http.Request) {
		for i := range len(text) {
			if _, err := io.WriteString(conn, text[i:i+1]); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond) // between two bytes
		}
	}
}

// TestNoRedirectIsFollowed: nobody but the endpoint is shown a ciphertext, or asked
// whether the key may be used.
func TestNoRedirectIsFollowed(t *testing.T) {
	var asked atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		_, _ = io.WriteString(w, grantedBody)
	}))
	defer elsewhere.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+"/\x1b[31m", status)
		}))
		client := newClient(t, configuration(t, "id", "secret"), testARN, server.URL)
		for op, call := range calls(client) {
			err := call(t.Context(), func([]byte) error { return nil })
			var k *keyguard.KMSError
			if keyguard.ReasonOf(err) != keyguard.ReasonUnknownFault || !errors.As(err, &k) || !strings.Contains(k.Err.Error(), elsewhere.URL) {
				t.Errorf("%s, %d: %v", op, status, err)
			}
		}
		server.Close()
	}
	if n := asked.Load(); n > 0 {
		t.Errorf("%d redirections were followed", n)
	}
}

// TestAnswersOfOtherKeys: an answer for another key opens nothing, nor one whose plaintext is no data key.
func TestAnswersOfOtherKeys(t *testing.T) {
	const other = "arn:aws:kms:eu-central-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"
	answer := func(key, plain string) string {
		return framed("HTTP/1.1 200 OK", fmt.Sprintf(`{"KeyId":%q,"Plaintext":%q,"CiphertextBlob":"AQID"}`, key, plain))
	}
	const full = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	for name, c := range map[string]struct {
		answer string
		reason keyguard.Reason
	}{
		"another key":                    {answer(other, full), keyguard.ReasonWrongKey},
		"the alias of a key":             {answer("arn:aws:kms:eu-central-1:111122223333:alias/byokd", full), keyguard.ReasonWrongKey},
		"the key of another Region":      {answer(strings.Replace(testARN, "eu-central-1", "eu-west-1", 1), full), keyguard.ReasonWrongKey},
		"the id alone":                   {answer(strings.TrimPrefix(testARN, "arn:aws:kms:eu-central-1:111122223333:key/"), full), keyguard.ReasonWrongKey},
		"no key":                         {framed("HTTP/1.1 200 OK", `{"Plaintext":"`+full+`","CiphertextBlob":"AQID"}`), keyguard.ReasonWrongKey},
		"no plaintext":                   {answer(testARN, ""), keyguard.ReasonUnknownFault},
		"a byte":                         {answer(testARN, "AA=="), keyguard.ReasonInvalidCiphertext},
		"a byte too little":              {answer(testARN, "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHg=="), keyguard.ReasonInvalidCiphertext},
		"a byte too much":                {answer(testARN, "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g"), keyguard.ReasonInvalidCiphertext},
		"forty thousand bytes too much":  {answer(testARN, strings.Repeat("AAAA", 15_000)), keyguard.ReasonInvalidCiphertext},
		"an error with a plaintext":      {strings.Replace(answer(testARN, full), "200 OK", "400 Bad Request", 1), keyguard.ReasonUnknownFault},
		"a key that is named twice":      {framed("HTTP/1.1 200 OK", fmt.Sprintf(`{"KeyId":%q,"KeyId":%q,"Plaintext":%q,"CiphertextBlob":"AQID"}`, testARN, other, full)), keyguard.ReasonWrongKey},
		"a key with something behind it": {answer(testARN+" ", full), keyguard.ReasonWrongKey},
	} {
		t.Run(name, func(t *testing.T) {
			client := newClient(t, configuration(t, "id", "secret"), testARN, hostile(t, says(c.answer))) // both calls make a connection of their own
			// As the guard does with what it is given.
			_, err := client.Unwrap(t.Context(), []byte("w"), binding, func(plain []byte) error {
				_, err := seal.NewRoot(seal.NewID(), plain)
				if err != nil {
					return &keyguard.KMSError{Op: "Decrypt", State: keyguard.Misconfigured, Reason: keyguard.ReasonInvalidCiphertext, Err: err}
				}
				return nil
			})
			if keyguard.ReasonOf(err) != c.reason {
				t.Errorf("Unwrap: %v, want %s", err, c.reason)
			}
			given := false
			_, _, err = client.GenerateDataKey(t.Context(), binding, func([]byte) error { given = true; return nil })
			if err == nil || given {
				t.Errorf("GenerateDataKey: %v, used: %v", err, given)
			}
		})
	}
}

// TestWordsOfTheNetworkAreHarmless: what an answer says goes into logs and onto terminals.
func TestWordsOfTheNetworkAreHarmless(t *testing.T) {
	for _, message := range []string{"\u001b]0;owned\u0007\u001b[2J", "a\r\nb\u202eevil", strings.Repeat("long ", 10_000), "\xff\xfe"} {
		body := fmt.Sprintf(`{"__type":"AccessDeniedException","message":%q}`, "User: arn:aws:iam::1:role/"+message+" is not authorized to perform: kms:Decrypt on resource: x "+message)
		address := hostile(t, says(framed("HTTP/1.1 400 Bad Request", body)))
		for _, op := range operations {
			err := calls(newClient(t, configuration(t, "id", "secret"), testARN, address))[op](t.Context(), func([]byte) error { return nil })
			var k *keyguard.KMSError
			if !errors.As(err, &k) {
				t.Fatalf("%s: %v", op, err)
			}
			for _, text := range []string{err.Error(), k.Principal, k.Action} {
				if len(text) > 2*maxText || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Errorf("%s: %d bytes: %.200q", op, len(text), text)
				}
			}
		}
	}
}
