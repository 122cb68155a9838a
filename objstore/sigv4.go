package objstore

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
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
		return nil, refuse(http.StatusForbidden, "InvalidAccessKeyId", "The access key of the request is not in byokd's credentials file.")
	}
	g, err := payloadOf(r, s)
	if err != nil {
		return nil, err
	}
	key := signingKey(secret, s.scope)
	canonical := canonicalRequest(r, s, contentHashOf(r, s))
	want := hex.EncodeToString(sign(key, stringToSign(s, canonical)))
	if subtle.ConstantTimeCompare([]byte(want), []byte(s.value)) != 1 {
		return nil, refuse(http.StatusForbidden, "SignatureDoesNotMatch", "The request signature does not match. Check the secret key, and that nothing between client and byokd changes Host, path or headers.")
	}
	g.signKey, g.signature, g.date, g.scope = key, s.value, s.date, strings.Join(s.scope, "/")
	return g, nil
}

// findSignature reads the claim from header or query.
func findSignature(r *http.Request) (*signature, error) {
	auth := r.Header.Get("Authorization")
	query := r.URL.Query()
	switch {
	case strings.HasPrefix(auth, sigAlgorithm+" "):
		return headerSignature(r, strings.TrimPrefix(auth, sigAlgorithm+" "))
	case auth == "" && query.Get("X-Amz-Algorithm") == sigAlgorithm:
		return querySignature(query)
	case strings.HasPrefix(auth, "AWS4-ECDSA"), strings.HasPrefix(query.Get("X-Amz-Algorithm"), "AWS4-ECDSA"):
		return nil, refuse(http.StatusBadRequest, "InvalidRequest", "byokd verifies Signature Version 4 (AWS4-HMAC-SHA256), not 4A.")
	case strings.HasPrefix(auth, "AWS "), query.Get("AWSAccessKeyId") != "":
		return nil, refuse(http.StatusBadRequest, "InvalidRequest", "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256 (in boto3: Config(signature_version='s3v4')).")
	case auth != "" || query.Get("X-Amz-Algorithm") != "":
		return nil, refuse(http.StatusBadRequest, "InvalidRequest", "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256.")
	}
	return nil, refuse(http.StatusForbidden, "AccessDenied", "The request is not signed. byokd serves no anonymous requests.")
}

// headerSignature parses "Credential=…, SignedHeaders=…, Signature=…".
func headerSignature(r *http.Request, fields string) (*signature, error) {
	malformed := refuse(http.StatusBadRequest, "AuthorizationHeaderMalformed", "The authorization header is malformed.")
	s := &signature{date: r.Header.Get("X-Amz-Date")}
	if s.date == "" {
		if t, err := http.ParseTime(r.Header.Get("Date")); err == nil {
			s.date = t.UTC().Format(sigTimeFormat)
		}
	}
	for field := range strings.SplitSeq(fields, ",") {
		name, value, ok := strings.Cut(strings.TrimSpace(field), "=")
		if !ok {
			return nil, malformed
		}
		switch name {
		case "Credential":
			if !s.setCredential(value) {
				return nil, malformed
			}
		case "SignedHeaders":
			s.signed = strings.Split(strings.ToLower(value), ";")
		case "Signature":
			s.value = value
		}
	}
	if s.accessKey == "" || len(s.signed) == 0 || s.value == "" || s.date == "" {
		return nil, malformed
	}
	return s, nil
}

// querySignature parses a presigned URL.
func querySignature(query url.Values) (*signature, error) {
	malformed := refuse(http.StatusBadRequest, "AuthorizationQueryParametersError", "The presigned URL lacks a parameter, or one is malformed.")
	seconds, err := strconv.ParseInt(query.Get("X-Amz-Expires"), 10, 32)
	if err != nil || seconds < 0 {
		return nil, malformed
	}
	s := &signature{
		presigned: true,
		date:      query.Get("X-Amz-Date"),
		expires:   time.Duration(seconds) * time.Second,
		signed:    strings.Split(strings.ToLower(query.Get("X-Amz-SignedHeaders")), ";"),
		value:     query.Get("X-Amz-Signature"),
	}
	if s.expires > maxPresign {
		return nil, refuse(http.StatusBadRequest, "AuthorizationQueryParametersError", "X-Amz-Expires must be at most a week (604800 seconds).")
	}
	if !s.setCredential(query.Get("X-Amz-Credential")) || s.value == "" || s.date == "" {
		return nil, malformed
	}
	return s, nil
}

// setCredential parses KEY/20060102/region/s3/aws4_request.
func (s *signature) setCredential(value string) bool {
	parts := strings.Split(value, "/")
	if len(parts) < 5 {
		return false
	}
	n := len(parts)
	s.accessKey, s.scope = strings.Join(parts[:n-4], "/"), parts[n-4:]
	return s.accessKey != "" && s.scope[2] == "s3" && s.scope[3] == "aws4_request" && len(s.scope[0]) == 8
}

// checkTime judges skew or expiry.
func (s *signature) checkTime(now time.Time) error {
	at, err := time.Parse(sigTimeFormat, s.date)
	if err != nil || !strings.HasPrefix(s.date, s.scope[0]) {
		return refuse(http.StatusForbidden, "AccessDenied", "The date of the request is malformed or differs from that of its credential scope.")
	}
	if s.presigned {
		switch {
		case at.After(now.Add(maxSkew)):
			return refuse(http.StatusForbidden, "AccessDenied", "Request is not yet valid. Check the clock of the machine that signed it.")
		case now.After(at.Add(s.expires)):
			return refuse(http.StatusForbidden, "AccessDenied", "Request has expired.")
		}
		return nil
	}
	if d := now.Sub(at); d > maxSkew || d < -maxSkew {
		return refuse(http.StatusForbidden, "RequestTimeTooSkewed", "The clocks of client and byokd differ by more than 15 minutes (byokd says %s).", now.UTC().Format(time.RFC3339))
	}
	return nil
}

// checkHeaders demands that Host and every x-amz- header is signed, as S3 does:
// otherwise somebody between could change what the request means.
func (s *signature) checkHeaders(r *http.Request) error {
	if len(s.signed) > maxSignedHeaders || !slices.Contains(s.signed, "host") {
		return refuse(http.StatusForbidden, "AccessDenied", "The header Host is not among the signed headers.")
	}
	for name := range r.Header {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "x-amz-") && lower != "x-amz-content-sha256" && !slices.Contains(s.signed, lower) {
			return refuse(http.StatusForbidden, "AccessDenied", "There were headers present in the request which were not signed: %s.", lower)
		}
	}
	return nil
}

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
			return nil, refuse(http.StatusBadRequest, "InvalidArgument", "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, a STREAMING- form that byokd knows, or a valid SHA-256.")
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
