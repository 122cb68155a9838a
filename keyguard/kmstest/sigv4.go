package kmstest

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// maxSkew is how far a signature's time may lie from ours; AWS allows 5 minutes.
const maxSkew = 5 * time.Minute

const amzDateFormat = "20060102T150405Z"

// signature is a parsed SigV4 Authorization header.
type signature struct {
	accessKey, date, region, service string
	signedHeaders                    []string // lower case
	hex                              string
}

const sigV4Algorithm = "AWS4-HMAC-SHA256"

func errIncomplete(header string) *apiError {
	return clientError("IncompleteSignatureException",
		"Authorization header requires 'Credential' parameter. Authorization header requires 'Signature' parameter. Authorization header requires 'SignedHeaders' parameter. (Hashed with SHA-256 and encoded with Base64) Authorization=%.120s", header)
}

// parseAuthorization reads an Authorization header without judging it.
func parseAuthorization(header string) (signature, *apiError) {
	var sig signature
	if header == "" {
		return sig, clientError("MissingAuthenticationTokenException", "Missing Authentication Token")
	}
	rest, ok := strings.CutPrefix(header, sigV4Algorithm)
	if !ok {
		return sig, errIncomplete(header)
	}
	for field := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		switch name {
		case "Credential":
			scope := strings.Split(value, "/")
			if len(scope) < 5 || scope[len(scope)-1] != "aws4_request" {
				return sig, errIncomplete(header)
			}
			n := len(scope)
			sig.accessKey = strings.Join(scope[:n-4], "/")
			sig.date, sig.region, sig.service = scope[n-4], scope[n-3], scope[n-2]
		case "SignedHeaders":
			sig.signedHeaders = strings.Split(strings.ToLower(value), ";")
		case "Signature":
			sig.hex = value
		}
	}
	if sig.accessKey == "" || sig.region == "" || len(sig.signedHeaders) == 0 || sig.hex == "" {
		return sig, errIncomplete(header)
	}
	return sig, nil
}

// authenticate checks that r with this body was signed for service with the
// secret of a known access key, and returns the caller and the signed region.
func (s *Server) authenticate(r *http.Request, body []byte, service string) (caller, string, *apiError) {
	sig, aerr := parseAuthorization(r.Header.Get("Authorization"))
	if aerr != nil {
		return caller{}, "", aerr
	}
	i := slices.IndexFunc(s.credentials, func(c Credential) bool { return c.AccessKey == sig.accessKey })
	if i < 0 {
		return caller{}, sig.region, clientError("UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	credential := s.credentials[i]
	who := credential.caller()
	if sig.service != service {
		return who, sig.region, clientError("InvalidSignatureException", "Credential should be scoped to correct service: '%s'. ", service)
	}
	at, err := time.Parse(amzDateFormat, r.Header.Get("X-Amz-Date"))
	if err != nil || at.Format("20060102") != sig.date {
		return who, sig.region, clientError("IncompleteSignatureException",
			"Date must be in ISO-8601 'basic format', and the same in the credential scope. Got '%.40s'.", r.Header.Get("X-Amz-Date"))
	}
	if aerr := checkSkew(at, s.signatureClock()); aerr != nil {
		return who, sig.region, aerr
	}
	want, err := s.sign(r, body, sig, credential, at)
	if err != nil || subtle.ConstantTimeCompare([]byte(want), []byte(sig.hex)) != 1 {
		return who, sig.region, clientError("InvalidSignatureException",
			"The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	}
	return who, sig.region, nil
}

func checkSkew(at, now time.Time) *apiError {
	if at.Before(now.Add(-maxSkew)) {
		return clientError("InvalidSignatureException", "Signature expired: %s is now earlier than %s (%s - 5 min.)",
			at.Format(amzDateFormat), now.Add(-maxSkew).UTC().Format(amzDateFormat), now.UTC().Format(amzDateFormat))
	}
	if at.After(now.Add(maxSkew)) {
		return clientError("InvalidSignatureException", "Signature not yet current: %s is still later than %s (%s + 5 min.)",
			at.Format(amzDateFormat), now.Add(maxSkew).UTC().Format(amzDateFormat), now.UTC().Format(amzDateFormat))
	}
	return nil
}

// sign signs a copy of r that carries only the headers the client signed and
// returns the signature. The SDK's own signer does it, so that this server
// cannot be wrong in the same way as the client under test.
func (s *Server) sign(r *http.Request, body []byte, sig signature, c Credential, at time.Time) (string, error) {
	again := &http.Request{
		Method: r.Method,
		Host:   r.Host,
		URL:    &url.URL{Scheme: "http", Host: r.Host, Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery},
		Header: make(http.Header),
	}
	session := ""
	for _, name := range sig.signedHeaders {
		switch name {
		case "host", "x-amz-date":
		case "content-length":
			again.ContentLength = r.ContentLength
		case "x-amz-security-token":
			session = r.Header.Get(name)
		default:
			again.Header[http.CanonicalHeaderKey(name)] = slices.Clone(r.Header.Values(name))
		}
	}
	sum := sha256.Sum256(body)
	credentials := aws.Credentials{AccessKeyID: c.AccessKey, SecretAccessKey: c.Secret, SessionToken: session}
	err := s.signer.SignHTTP(context.Background(), credentials, again, hex.EncodeToString(sum[:]), sig.service, sig.region, at,
		func(o *v4.SignerOptions) { o.DisableURIPathEscaping = false })
	if err != nil {
		return "", err
	}
	resigned, aerr := parseAuthorization(again.Header.Get("Authorization"))
	if aerr != nil {
		return "", aerr
	}
	return resigned.hex, nil
}
