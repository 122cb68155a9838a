package objstore

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Here the claim of a signature is read from header or query, and judged by what
// needs no secret. The refusals are worded as S3's.

// queryArgs are the parameters of a presigned request.
var queryArgs = []string{"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Signature", "X-Amz-Date", "X-Amz-SignedHeaders", "X-Amz-Expires"}

// findSignature reads the claim from header or query.
func findSignature(r *http.Request) (*signature, error) {
	auth := r.Header.Get("Authorization")
	query := r.URL.Query()
	switch {
	case auth != "":
		return headerSignature(r, auth)
	case query.Get("AWSAccessKeyId") != "":
		return nil, outdated()
	case slices.ContainsFunc(queryArgs, query.Has):
		return querySignature(query)
	}
	return nil, refuse(http.StatusForbidden, "AccessDenied", "Access Denied.").hint("The request is not signed; byokd serves no anonymous requests.")
}

// outdated refuses Signature Version 2.
func outdated() *Error {
	return refuse(http.StatusBadRequest, "InvalidRequest", "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256.").
		hint("In boto3: Config(signature_version='s3v4').")
}

func badHeader(format string, args ...any) *Error {
	return refuse(http.StatusBadRequest, "AuthorizationHeaderMalformed", "The authorization header is malformed; "+format, args...)
}

func badQuery(format string, args ...any) *Error {
	return refuse(http.StatusBadRequest, "AuthorizationQueryParametersError", format, args...)
}

// headerSignature parses "AWS4-HMAC-SHA256 Credential=…, SignedHeaders=…, Signature=…".
func headerSignature(r *http.Request, auth string) (*signature, error) {
	scheme, fields, found := strings.Cut(auth, " ")
	switch {
	case !found:
		return nil, invalidArgument("Authorization", auth, "Authorization header is invalid -- one and only one ' ' (space) required.")
	case scheme == "AWS":
		return nil, outdated()
	case scheme != sigAlgorithm:
		return nil, invalidArgument("Authorization", scheme, "Unsupported Authorization Type")
	}
	parts := strings.Split(fields, ",")
	if len(parts) != 3 {
		return nil, badHeader("the authorization header requires three components: Credential, SignedHeaders, and Signature.")
	}
	s := &signature{}
	values := map[string]string{}
	for _, part := range parts {
		name, value, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok {
			return nil, badHeader("the authorization component %q is malformed.", strings.TrimSpace(part))
		}
		values[name] = value
	}
	for _, name := range []string{"Credential", "SignedHeaders", "Signature"} {
		if values[name] == "" {
			return nil, badHeader("missing %s.", name)
		}
	}
	if err := s.setCredential(values["Credential"], badHeader, ""); err != nil {
		return nil, err
	}
	s.signed, s.value = strings.Split(strings.ToLower(values["SignedHeaders"]), ";"), values["Signature"]
	if s.date = headerDate(r.Header); s.date == "" {
		return nil, refuse(http.StatusForbidden, "AccessDenied", "AWS authentication requires a valid Date or x-amz-date header.")
	}
	if !strings.HasPrefix(s.date, s.scope[0]) {
		return nil, badHeader("The authorization header is malformed; Invalid credential date. Date is not the same as X-Amz-Date.")
	}
	return s, nil
}

// headerDate is the time of a request in the format of signatures, or "".
func headerDate(h http.Header) string {
	if date := h.Get("X-Amz-Date"); date != "" {
		if _, err := time.Parse(sigTimeFormat, date); err != nil {
			return ""
		}
		return date
	}
	t, err := http.ParseTime(h.Get("Date"))
	if err != nil {
		return ""
	}
	return t.UTC().Format(sigTimeFormat)
}

// querySignature parses a presigned URL.
func querySignature(query url.Values) (*signature, error) {
	for _, name := range queryArgs {
		if query.Get(name) == "" {
			return nil, badQuery("Query-string authentication version 4 requires the X-Amz-Algorithm, X-Amz-Credential, X-Amz-Signature, X-Amz-Date, X-Amz-SignedHeaders, and X-Amz-Expires parameters.")
		}
	}
	switch algorithm := query.Get("X-Amz-Algorithm"); algorithm {
	case sigAlgorithm:
	case "AWS4-ECDSA-P256-SHA256":
		return nil, badQuery("X-Amz-Algorithm only supports \"AWS4-HMAC-SHA256\"").hint("byokd verifies Signature Version 4, not 4A.")
	default:
		return nil, badQuery("X-Amz-Algorithm only supports \"AWS4-HMAC-SHA256 and AWS4-ECDSA-P256-SHA256\"")
	}
	s := &signature{
		presigned: true,
		date:      query.Get("X-Amz-Date"),
		signed:    strings.Split(strings.ToLower(query.Get("X-Amz-SignedHeaders")), ";"),
		value:     query.Get("X-Amz-Signature"),
	}
	if err := s.setCredential(query.Get("X-Amz-Credential"), badQuery, "Error parsing the X-Amz-Credential parameter; "); err != nil {
		return nil, err
	}
	if day := s.scope[0]; !strings.HasPrefix(s.date, day) {
		return nil, badQuery("Invalid credential date %q. This date is not the same as X-Amz-Date: %q.", day, s.date[:min(8, len(s.date))])
	}
	seconds, err := strconv.ParseInt(query.Get("X-Amz-Expires"), 10, 32)
	s.expires = time.Duration(seconds) * time.Second
	switch {
	case err != nil:
		return nil, badQuery("X-Amz-Expires should be a number")
	case seconds < 0:
		return nil, badQuery("X-Amz-Expires must be non-negative")
	case s.expires > maxPresign:
		return nil, badQuery("X-Amz-Expires must be less than a week (in seconds); that is, the given X-Amz-Expires must be less than 604800 seconds")
	}
	return s, nil
}

// setCredential parses KEY/20060102/region/s3/aws4_request. Its refusals are made
// by bad, after the words of before.
func (s *signature) setCredential(value string, bad func(string, ...any) *Error, before string) error {
	parts := strings.Split(value, "/")
	if len(parts) != 5 || parts[0] == "" {
		return bad(before + "the Credential is mal-formed; expecting \"<YOUR-AKID>/YYYYMMDD/REGION/SERVICE/aws4_request\".")
	}
	s.accessKey, s.scope = parts[0], parts[1:]
	if s.scope[2] != "s3" {
		return bad(before+"incorrect service %q. This endpoint belongs to \"s3\".", s.scope[2])
	}
	if s.scope[3] != "aws4_request" {
		return bad(before+"incorrect terminal %q. This endpoint uses \"aws4_request\".", s.scope[3])
	}
	if _, err := time.Parse("20060102", s.scope[0]); err != nil {
		return bad(before+"incorrect date format %q. This date in the credential must be in the format \"yyyyMMdd\".", s.scope[0])
	}
	return nil
}

// checkTime judges skew or expiry.
func (s *signature) checkTime(now time.Time) error {
	at, err := time.Parse(sigTimeFormat, s.date)
	if err != nil {
		return badQuery("X-Amz-Date must be in the ISO8601 Long Format \"yyyyMMdd'T'HHmmss'Z'\"")
	}
	server := now.UTC().Format(time.RFC3339)
	if s.presigned {
		until := at.Add(s.expires)
		switch {
		case at.After(now.Add(maxSkew)):
			return refuse(http.StatusForbidden, "AccessDenied", "Request is not valid yet.").hint("Check the clock of the machine that signed it; byokd says %s.", server)
		case now.After(until):
			return refuse(http.StatusForbidden, "AccessDenied", "Request has expired.").with("X-Amz-Expires", strconv.Itoa(int(s.expires/time.Second))).
				with("Expires", until.Format(time.RFC3339)).with("ServerTime", server)
		}
		return nil
	}
	if d := now.Sub(at); d > maxSkew || d < -maxSkew {
		return refuse(http.StatusForbidden, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large.").
			with("RequestTime", s.date).with("ServerTime", server).with("MaxAllowedSkewMilliseconds", strconv.FormatInt(maxSkew.Milliseconds(), 10)).
			hint("Set the clocks of client and byokd.")
	}
	return nil
}

// checkHeaders demands that Host and every x-amz- header is signed, as S3 does:
// otherwise somebody between could change what the request means.
func (s *signature) checkHeaders(r *http.Request) error {
	var missing []string
	for name := range r.Header {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "x-amz-") && lower != "x-amz-content-sha256" && !slices.Contains(s.signed, lower) {
			missing = append(missing, lower)
		}
	}
	if !slices.Contains(s.signed, "host") {
		missing = append(missing, "host")
	}
	slices.Sort(missing)
	if len(missing) > 0 || len(s.signed) > maxSignedHeaders {
		return refuse(http.StatusForbidden, "AccessDenied", "There were headers present in the request which were not signed").with("HeadersNotSigned", strings.Join(missing, ", "))
	}
	return nil
}
