package objstore_test

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// fuzzMethods are what a request is made with.
var fuzzMethods = []string{"GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PATCH"}

// FuzzRequests gives the whole front end requests that a client has signed and that make no sense: each is answered,
// and none as a fault of byokd's own. Documents (XML), ranges, lists, conditions and copies are read on the way.
func FuzzRequests(f *testing.F) {
	const completion = `<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>"00000000000000000000000000000000"</ETag></Part></CompleteMultipartUpload>`
	for _, s := range []struct {
		method             uint8
		path, query        string
		header, value, doc string
	}{
		{0, "/documents/object", "", "Range", "bytes=1-5", ""},
		{0, "/documents/object", "partNumber=1", "If-None-Match", "*", ""},
		{0, "/documents", "list-type=2&prefix=o&delimiter=/&max-keys=1&continuation-token=x&encoding-type=url", "", "", ""},
		{0, "/documents", "versions&key-marker=a&version-id-marker=b", "", "", ""},
		{0, "/documents", "uploads&upload-id-marker=x", "", "", ""},
		{0, "/documents/object", "attributes", "X-Amz-Object-Attributes", "ETag,ObjectParts,Checksum", ""},
		{2, "/documents/copy", "", "X-Amz-Copy-Source", "/documents/object?versionId=1", ""},
		{2, "/documents/part", "partNumber=1&uploadId=0", "X-Amz-Copy-Source-Range", "bytes=0-5", "x"},
		{2, "/documents/object", "", "X-Amz-Meta-Title", "=?UTF-8?Q?a?=", "body"},
		{2, "/documents/object", "tagging", "", "", `<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>`},
		{2, "/documents", "", "", "", `<CreateBucketConfiguration><LocationConstraint>eu-central-1</LocationConstraint></CreateBucketConfiguration>`},
		{2, "/documents", "lifecycle", "", "", `<LifecycleConfiguration></LifecycleConfiguration>`},
		{3, "/documents", "delete", "Content-Md5", "", `<Delete><Quiet>true</Quiet><Object><Key>a</Key></Object></Delete>`},
		{3, "/documents/object", "uploadId=0", "", "", completion},
		{3, "/documents/object", "uploads", "X-Amz-Checksum-Algorithm", "CRC32", ""},
		{4, "/documents/object", "versionId=null", "X-Amz-Mfa", "x", ""},
		{5, "/documents/object", "", "Access-Control-Request-Method", "PUT", ""},
	} {
		f.Add(s.method, s.path, s.query, s.header, s.value, s.doc)
	}
	w := newWorld(f, worldOptions{})
	w.put("object", pattern(3*segment+7, 1))
	f.Fuzz(func(t *testing.T, method uint8, path, query, header, value, doc string) {
		target, err := url.Parse("http://s3.test/" + strings.TrimPrefix(path, "/"))
		if err != nil || len(value) > 4<<10 || len(doc) > 16<<10 {
			return
		}
		target.RawQuery = query
		r := httptest.NewRequest(fuzzMethods[int(method)%len(fuzzMethods)], "http://s3.test/", strings.NewReader(doc))
		r.URL, r.RequestURI = target, target.RequestURI()
		if header != "" && !strings.ContainsAny(header, " :\r\n\x00") && !strings.ContainsAny(value, "\r\n\x00") && http.CanonicalHeaderKey(header) != "Content-Length" {
			r.Header.Set(header, value)
		}
		w.t = t
		w.sign(r, "UNSIGNED-PAYLOAD")
		answer := httptest.NewRecorder()
		func() {
			defer func() {
				if broken := recover(); broken != nil && broken != http.ErrAbortHandler {
					panic(broken)
				}
			}()
			w.proxy.ServeHTTP(answer, r)
		}()
		w.log.TakeAll() // an hour of them is too much to keep
		w.events.forget()
		if answer.Code < 200 || answer.Code == http.StatusInternalServerError || answer.Code > 599 {
			t.Errorf("%s %s: %d %.300s", r.Method, r.URL, answer.Code, answer.Body)
		}
	})
}
