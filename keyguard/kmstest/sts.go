package kmstest

import (
	"bytes"
	"encoding/xml"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

const stsNamespace = "https://sts.amazonaws.com/doc/2011-06-15/"

type identityResponse struct {
	XMLName   xml.Name `xml:"GetCallerIdentityResponse"`
	Namespace string   `xml:"xmlns,attr"`
	Arn       string   `xml:"GetCallerIdentityResult>Arn"`
	UserID    string   `xml:"GetCallerIdentityResult>UserId"`
	Account   string   `xml:"GetCallerIdentityResult>Account"`
	RequestID string   `xml:"ResponseMetadata>RequestId"`
}

type stsErrorResponse struct {
	XMLName   xml.Name `xml:"ErrorResponse"`
	Namespace string   `xml:"xmlns,attr"`
	Type      string   `xml:"Error>Type"`
	Code      string   `xml:"Error>Code"`
	Message   string   `xml:"Error>Message"`
	RequestID string   `xml:"RequestId"`
}

// serveSTS answers GetCallerIdentity in STS's query protocol.
func (s *Server) serveSTS(w http.ResponseWriter, r *http.Request) {
	body, aerr := readBody(w, r)
	form, err := url.ParseQuery(string(body))
	if err != nil && aerr == nil {
		aerr = clientError("MalformedQueryString", "The query string cannot be parsed.")
	}
	c := s.newCall(r, "sts", limitString(form.Get("Action"), 64))
	if aerr == nil && s.faults.apply(w, r, c) {
		return
	}
	var who caller
	if aerr == nil {
		who, _, aerr = s.authenticate(r, body, "sts")
	}
	if aerr == nil && form.Get("Action") != "GetCallerIdentity" {
		aerr = clientError("InvalidAction", "Could not find operation %s for version %s",
			c.op, limitString(form.Get("Version"), 32))
	}
	if aerr != nil {
		c.answerSTS(w, nil, stsError(aerr))
		return
	}
	c.answerSTS(w, &identityResponse{Namespace: stsNamespace, Arn: who.arn, UserID: who.id, Account: who.account, RequestID: c.event.RequestID}, nil)
}

// stsError gives the refusals of SigV4 the names and the status the query protocol has for them.
func stsError(e *apiError) *apiError {
	names := map[string]string{
		"UnrecognizedClientException":         "InvalidClientTokenId",
		"InvalidSignatureException":           "SignatureDoesNotMatch",
		"MissingAuthenticationTokenException": "MissingAuthenticationToken",
		"IncompleteSignatureException":        "IncompleteSignature",
	}
	if name, ok := names[e.Code]; ok {
		message := e.Message
		if name == "InvalidClientTokenId" {
			message = "The security token included in the request is invalid."
		}
		return &apiError{Code: name, Message: message, Status: http.StatusForbidden}
	}
	return e
}

func (c *call) answerSTS(w http.ResponseWriter, out *identityResponse, aerr *apiError) {
	status, doc := http.StatusOK, any(out)
	if aerr != nil {
		status = aerr.Status
		c.event.Error, c.event.Message = aerr.Code, aerr.Message
		kind := "Sender"
		if status >= 500 {
			kind = "Receiver"
		}
		doc = &stsErrorResponse{Namespace: stsNamespace, Type: kind, Code: aerr.Code, Message: aerr.Message, RequestID: c.event.RequestID}
	}
	var body bytes.Buffer
	xml.NewEncoder(&body).Encode(doc) // strings into memory: cannot fail
	body.WriteByte('\n')
	c.log(status)
	h := w.Header()
	h.Set("Content-Type", "text/xml")
	h.Set("x-amzn-RequestId", c.event.RequestID)
	h.Set("Content-Length", strconv.Itoa(body.Len()))
	w.WriteHeader(status)
	io.Copy(w, &body)
}
