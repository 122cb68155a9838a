package objstore

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	sigAlgorithm  = "AWS4-HMAC-SHA256"
	sigTimeFormat = "20060102T150405Z"
	// maxSkew is S3's own tolerance between the client's clock and the server's.
	maxSkew = 15 * time.Minute
	// maxPresign is S3's own limit for the life of a presigned request: a week.
	maxPresign = 7 * 24 * time.Hour
	// maxSignedHeaders bounds the work of one verification; SDKs sign about ten.
	maxSignedHeaders = 100
)

// payloadKind says how the body of a request is protected.
type payloadKind uint8

const (
	payloadHash            payloadKind = iota // x-amz-content-sha256 is the hash of the body
	payloadUnsigned                           // UNSIGNED-PAYLOAD
	payloadChunks                             // STREAMING-AWS4-HMAC-SHA256-PAYLOAD
	payloadChunksTrailer                      // STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER
	payloadUnsignedTrailer                    // STREAMING-UNSIGNED-PAYLOAD-TRAILER
)

// chunked reports whether the body is framed as aws-chunked.
func (k payloadKind) chunked() bool { return k >= payloadChunks }

// signed reports whether each chunk carries a signature.
func (k payloadKind) signed() bool { return k == payloadChunks || k == payloadChunksTrailer }

// grant is what a verified request allows: how its body is to be verified.
type grant struct {
	kind      payloadKind
	hash      string // lower case hex, for payloadHash
	signKey   []byte // for signed chunks
	signature string // seed of the chunk signatures
	date      string // x-amz-date
	scope     string
}

// signature is a claim found in a request, not verified yet.
type signature struct {
	accessKey string
	scope     []string // date, region, service, terminator
	signed    []string // signed header names, lower case
	value     string   // hex
	date      string
	expires   time.Duration // presigned only
	presigned bool
}

// authenticate verifies the signature of a request against the clock at arrival.
func (p *Proxy) authenticate(r *http.Request) (*grant, error) {
	s, err := findSignature(r)
	if err != nil {
		return nil, err
	}
	if err := s.checkTime(p.opts.Now()); err != nil {
		return nil, err
	}
	if err := s.checkHeaders(r); err != nil {
		return nil, err
	}
	secret, known := p.opts.Credentials.Secret(s.accessKey)
	if !known {
		return nil, refuse(http.StatusForbidden, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records.").with("AWSAccessKeyId", s.accessKey).hint("It is not in byokd's credentials file.")
	}
	g, err := payloadOf(r, s)
	if err != nil {
		return nil, err
	}
	key := signingKey(secret, s.scope)
	canonical := canonicalRequest(r, s, contentHashOf(r, s))
	want := hex.EncodeToString(sign(key, stringToSign(s, canonical)))
	if subtle.ConstantTimeCompare([]byte(want), []byte(s.value)) != 1 {
		return nil, mismatch(s, canonical)
	}
	g.signKey, g.signature, g.date, g.scope = key, s.value, s.date, strings.Join(s.scope, "/")
	return g, nil
}

// mismatch tells what was signed here, so that both sides can be compared. It
// holds nothing that the client has not sent.
func mismatch(s *signature, canonical string) *Error {
	text := stringToSign(s, canonical)
	return refuse(http.StatusForbidden, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided. Check your key and signing method.").
		with("AWSAccessKeyId", s.accessKey).with("StringToSign", text).with("SignatureProvided", s.value).
		with("StringToSignBytes", spacedHex(text)).with("CanonicalRequest", canonical).with("CanonicalRequestBytes", spacedHex(canonical)).
		hint("Check also that nothing between client and byokd changes Host, path or headers.")
}

// spacedHex spells bytes as S3 does in its errors.
func spacedHex(text string) string { return fmt.Sprintf("% x", text) }

// contentHashOf is the value that stands for the body in the canonical request.
func contentHashOf(r *http.Request, s *signature) string {
	if v := r.Header.Get("X-Amz-Content-Sha256"); v != "" {
		return v
	}
	if s.presigned {
		if v := r.URL.Query().Get("X-Amz-Content-Sha256"); v != "" {
			return v
		}
		return "UNSIGNED-PAYLOAD"
	}
	return emptyHash
}

// emptyHash is the SHA-256 of nothing.
const emptyHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// payloadOf reads how the body is protected.
func payloadOf(r *http.Request, s *signature) (*grant, error) {
	switch v := contentHashOf(r, s); v {
	case "UNSIGNED-PAYLOAD":
		return &grant{kind: payloadUnsigned}, nil
	case "STREAMING-AWS4-HMAC-SHA256-PAYLOAD":
		return &grant{kind: payloadChunks}, nil
	case "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER":
		return &grant{kind: payloadChunksTrailer}, nil
	case "STREAMING-UNSIGNED-PAYLOAD-TRAILER":
		return &grant{kind: payloadUnsignedTrailer}, nil
	default:
		if raw, err := hex.DecodeString(v); err != nil || len(raw) != sha256.Size {
			return nil, invalidArgument("x-amz-content-sha256", v, "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, STREAMING-UNSIGNED-PAYLOAD-TRAILER, STREAMING-AWS4-HMAC-SHA256-PAYLOAD, STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER, STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD, STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD-TRAILER or a valid sha256 value.")
		}
		return &grant{kind: payloadHash, hash: strings.ToLower(v)}, nil
	}
}

// canonicalRequest is the text that both sides hash.
func canonicalRequest(r *http.Request, s *signature, contentHash string) string {
	var b strings.Builder
	b.WriteString(r.Method)
	b.WriteByte('\n')
	b.WriteString(escapePath(r.URL.Path))
	b.WriteByte('\n')
	b.WriteString(canonicalQuery(r.URL.RawQuery))
	b.WriteByte('\n')
	for _, name := range s.signed {
		b.WriteString(name)
		b.WriteByte(':')
		b.WriteString(canonicalHeader(r, name))
		b.WriteByte('\n')
	}
	b.WriteByte('\n')
	b.WriteString(strings.Join(s.signed, ";"))
	b.WriteByte('\n')
	b.WriteString(contentHash)
	return b.String()
}

// canonicalHeader returns a header's values as they were signed. net/http takes
// some headers out of the map.
func canonicalHeader(r *http.Request, name string) string {
	switch name {
	case "host":
		return r.Host
	case "content-length":
		if r.ContentLength >= 0 {
			return strconv.FormatInt(r.ContentLength, 10)
		}
		return ""
	case "transfer-encoding":
		return strings.Join(r.TransferEncoding, ",")
	}
	values := r.Header.Values(name)
	trimmed := make([]string, len(values))
	for i, v := range values {
		trimmed[i] = strings.Join(strings.Fields(v), " ")
	}
	return strings.Join(trimmed, ",")
}

// canonicalQuery sorts and escapes the query without its signature.
func canonicalQuery(raw string) string {
	var pairs []string
	for part := range strings.SplitSeq(raw, "&") {
		if part == "" {
			continue
		}
		name, value, _ := strings.Cut(part, "=")
		n, err1 := url.QueryUnescape(name)
		v, err2 := url.QueryUnescape(value)
		if err1 != nil || err2 != nil || n == "X-Amz-Signature" {
			continue
		}
		pairs = append(pairs, escape(n, false)+"="+escape(v, false))
	}
	// '=' sorts below every character that an escaped name may hold but '-' and
	// '.' and digits stand before it: compare name and value apart.
	slices.SortFunc(pairs, func(a, b string) int {
		an, av, _ := strings.Cut(a, "=")
		bn, bv, _ := strings.Cut(b, "=")
		if c := strings.Compare(an, bn); c != 0 {
			return c
		}
		return strings.Compare(av, bv)
	})
	return strings.Join(pairs, "&")
}

// escapePath escapes a path once, as S3 does, and leaves its slashes.
func escapePath(path string) string {
	if path == "" {
		return "/"
	}
	return escape(path, true)
}

// escape is AWS's UriEncode: everything but unreserved characters, in upper case
// hex.
func escape(s string, keepSlash bool) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		ch := s[i]
		switch {
		case 'a' <= ch && ch <= 'z', 'A' <= ch && ch <= 'Z', '0' <= ch && ch <= '9',
			ch == '-', ch == '_', ch == '.', ch == '~', ch == '/' && keepSlash:
			b.WriteByte(ch)
		default:
			b.WriteByte('%')
			b.WriteByte(digits[ch>>4])
			b.WriteByte(digits[ch&15])
		}
	}
	return b.String()
}

func stringToSign(s *signature, canonical string) string {
	sum := sha256.Sum256([]byte(canonical))
	return sigAlgorithm + "\n" + s.date + "\n" + strings.Join(s.scope, "/") + "\n" + hex.EncodeToString(sum[:])
}

// signingKey derives the day's key from the secret.
func signingKey(secret string, scope []string) []byte {
	key := []byte("AWS4" + secret)
	for _, part := range scope {
		key = sign(key, part)
	}
	return key
}

func sign(key []byte, text string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(text))
	return mac.Sum(nil)
}
