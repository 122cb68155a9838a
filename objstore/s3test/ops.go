package s3test

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"hash"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// sum is an MD5 that knows how S3 writes it.
type sum struct{ hash.Hash }

func newSum() sum            { return sum{md5.New()} }
func (s sum) etag() string   { return `"` + hex.EncodeToString(s.Sum(nil)) + `"` }
func unix(t time.Time) int64 { return t.Unix() }

// serve dispatches a request.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Amz-Request-Id", "S3TEST")
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	s.mu.Lock()
	objects, locked := s.buckets[bucket], s.locked[bucket]
	s.mu.Unlock()
	if objects == nil {
		s.createBucket(w, r, bucket, key)
		return
	}
	q := r.URL.Query()
	if key == "" {
		s.serveBucket(w, r, bucket, q)
		return
	}
	switch {
	case q.Has("uploads"), q.Has("uploadId"):
		s.serveUpload(w, r, bucket, key, q)
	case q.Has("tagging"):
		s.serveTags(w, r, bucket, key)
	case locked && (q.Has("acl") || q.Has("retention") || q.Has("legal-hold")):
		s.serveRule(w, r, bucket, key, q)
	case r.Method == http.MethodPost && q.Has("restore"):
		s.restore(w, r, bucket, key, q)
	case r.Method == http.MethodPut && r.Header.Get("X-Amz-Copy-Source") != "":
		s.copy(w, r, bucket, key)
	case r.Method == http.MethodPut:
		s.put(w, r, bucket, key)
	case r.Method == http.MethodGet, r.Method == http.MethodHead:
		s.get(w, r, bucket, key)
	case r.Method == http.MethodDelete:
		s.remove(w, r, bucket, key)
	default:
		refuse(w, http.StatusNotImplemented, "NotImplemented")
	}
}

// createBucket answers whatever is asked about a bucket that is not there.
func (s *Server) createBucket(w http.ResponseWriter, r *http.Request, bucket, key string) {
	if r.Method != http.MethodPut || key != "" || r.URL.RawQuery != "" {
		refuse(w, http.StatusNotFound, "NoSuchBucket")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.buckets[bucket] = map[string]*Stored{}
}

func (s *Server) removeBucket(w http.ResponseWriter, bucket string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.buckets[bucket]) > 0 {
		refuse(w, http.StatusConflict, "BucketNotEmpty")
		return
	}
	delete(s.buckets, bucket)
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) serveBucket(w http.ResponseWriter, r *http.Request, bucket string, q url.Values) {
	switch {
	case r.Method == http.MethodHead:
	case r.Method == http.MethodGet && q.Has("versioning"):
		s.versioning(w, bucket)
	case r.Method == http.MethodGet && q.Has("object-lock"):
		s.lockConfiguration(w, bucket)
	case r.Method == http.MethodGet && q.Has("versions"):
		s.listVersions(w, bucket, q)
	case r.Method == http.MethodGet && q.Has("uploads"):
		s.listUploads(w, bucket, q)
	case r.Method == http.MethodGet:
		s.list(w, bucket, q)
	case r.Method == http.MethodPost && q.Has("delete"):
		s.removeMany(w, r, bucket)
	case r.Method == http.MethodDelete && r.URL.RawQuery == "":
		s.removeBucket(w, bucket)
	default:
		refuse(w, http.StatusNotImplemented, "NotImplemented")
	}
}

// kept are the headers that S3 keeps with an object.
func kept(h http.Header) http.Header {
	out := http.Header{}
	for name, v := range h {
		switch {
		case strings.HasPrefix(name, "X-Amz-Meta-"), name == "X-Amz-Storage-Class", name == "X-Amz-Server-Side-Encryption", slices.Contains(ruleHeaders, name):
			out[name] = v
		case slices.Contains([]string{"Content-Type", "Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Expires"}, name):
			out[name] = v
		}
	}
	return out
}

// writable checks the preconditions of a write. mu is held.
func (s *Server) writable(r *http.Request, old *Stored) (int, string) {
	if s.careless {
		return 0, ""
	}
	match, none := r.Header.Get("If-Match"), r.Header.Get("If-None-Match")
	switch {
	case none == "*" && old != nil, match != "" && old != nil && old.ETag != match:
		return http.StatusPreconditionFailed, "PreconditionFailed"
	case match != "" && old == nil:
		return http.StatusNotFound, "NoSuchKey"
	}
	return 0, ""
}

func (s *Server) put(w http.ResponseWriter, r *http.Request, bucket, key string) {
	o, err := s.take(w, r)
	if err != nil {
		return // the client is gone, or was answered
	}
	o.Header, o.Tags, o.Grants = kept(r.Header), r.Header.Get("X-Amz-Tagging"), grantsOf(r.Header)
	s.mu.Lock()
	defer s.mu.Unlock()
	why := s.lockRefusal(bucket, r.Header)
	if sum, _ := newChecksum(r.Header); why == "" && sum == nil && len(lockedBy(r.Header)) > 0 {
		why = "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters"
	}
	if why != "" {
		refuseWith(w, http.StatusBadRequest, "InvalidRequest", why)
		return
	}
	if status, code := s.writable(r, s.buckets[bucket][key]); status != 0 {
		refuse(w, status, code)
		return
	}
	s.keep(w, bucket, key, o)
	w.Header().Set("Etag", o.ETag)
}

// readable checks the preconditions of a read.
func readable(h http.Header, prefix string, o *Stored) int {
	match, none := h.Get(prefix+"If-Match"), h.Get(prefix+"If-None-Match")
	since, err1 := http.ParseTime(h.Get(prefix + "If-Modified-Since"))
	until, err2 := http.ParseTime(h.Get(prefix + "If-Unmodified-Since"))
	switch {
	case match != "" && match != "*" && match != o.ETag:
		return http.StatusPreconditionFailed
	case match == "" && err2 == nil && unix(o.Modified) > unix(until):
		return http.StatusPreconditionFailed
	case none == "*" || none != "" && none == o.ETag:
		return http.StatusNotModified
	case none == "" && err1 == nil && unix(o.Modified) <= unix(since):
		return http.StatusNotModified
	}
	return 0
}

func (s *Server) get(w http.ResponseWriter, r *http.Request, bucket, key string) {
	s.mu.Lock()
	o := s.find(bucket, key, r.URL.Query().Get("versionId"))
	s.mu.Unlock()
	if o == nil {
		refuse(w, http.StatusNotFound, "NoSuchKey")
		return
	}
	if r.Method == http.MethodGet && archived(o) {
		refuseState(w, o)
		return
	}
	switch status := readable(r.Header, "", o); status {
	case 0:
	case http.StatusNotModified:
		w.WriteHeader(status)
		return
	default:
		refuse(w, status, "PreconditionFailed")
		return
	}
	h := w.Header()
	maps.Copy(h, o.Header)
	h.Set("Etag", o.ETag)
	if o.Version != "" {
		h.Set("X-Amz-Version-Id", o.Version)
	}
	h.Set("Last-Modified", o.Modified.Format(http.TimeFormat))
	if o.Tags != "" {
		h.Set("X-Amz-Tagging-Count", strconv.Itoa(strings.Count(o.Tags, "&")+1))
	}
	from, to, status := int64(0), o.Size, http.StatusOK
	if n, err := strconv.Atoi(r.URL.Query().Get("partNumber")); err == nil && n > 0 && n <= len(o.Parts) {
		for _, before := range o.Parts[:n-1] {
			from += before
		}
		to, status = from+o.Parts[n-1], http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, o.Size))
	}
	if v := r.Header.Get("Range"); v != "" {
		a, b, _ := strings.Cut(strings.TrimPrefix(v, "bytes="), "-")
		from, _ = strconv.ParseInt(a, 10, 64)
		if n, err := strconv.ParseInt(b, 10, 64); err == nil && n+1 < to {
			to = n + 1
		}
		if from >= o.Size {
			refuse(w, http.StatusRequestedRangeNotSatisfiable, "InvalidRange")
			return
		}
		status = http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, o.Size))
	}
	h.Set("Content-Length", strconv.FormatInt(to-from, 10))
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		_, _ = w.Write(o.Data[from:to]) // the client may leave
	}
}

func (s *Server) copy(w http.ResponseWriter, r *http.Request, bucket, key string) {
	path, err := url.PathUnescape(strings.TrimPrefix(r.Header.Get("X-Amz-Copy-Source"), "/"))
	if err != nil {
		refuse(w, http.StatusBadRequest, "InvalidArgument")
		return
	}
	path, version, _ := strings.Cut(path, "?versionId=")
	fromBucket, fromKey, _ := strings.Cut(path, "/")
	s.mu.Lock()
	defer s.mu.Unlock()
	src := s.find(fromBucket, fromKey, version)
	if src == nil {
		refuse(w, http.StatusNotFound, "NoSuchKey")
		return
	}
	if readable(r.Header, "X-Amz-Copy-Source-", src) != 0 {
		refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
		return
	}
	if status, code := s.writable(r, s.buckets[bucket][key]); status != 0 {
		refuse(w, status, code)
		return
	}
	if why := s.lockRefusal(bucket, r.Header); why != "" {
		refuseWith(w, http.StatusBadRequest, "InvalidRequest", why)
		return
	}
	if archived(src) {
		refuseState(w, src)
		return
	}
	o := *src
	o.Grants = grantsOf(r.Header)
	o.Header = o.Header.Clone() // rules are those of the request
	for _, name := range append([]string{"X-Amz-Storage-Class", "X-Amz-Restore"}, ruleHeaders...) {
		if o.Header.Del(name); r.Header.Get(name) != "" {
			o.Header.Set(name, r.Header.Get(name))
		}
	}
	// A copy is one object, whatever its source was.
	sum := newSum()
	sum.Write(o.Data)
	o.ETag, o.Modified = sum.etag(), time.Now().UTC().Truncate(time.Second)
	if r.Header.Get("X-Amz-Metadata-Directive") == "REPLACE" {
		o.Header = kept(r.Header)
	}
	if r.Header.Get("X-Amz-Tagging-Directive") == "REPLACE" {
		o.Tags = r.Header.Get("X-Amz-Tagging")
	}
	s.keep(w, bucket, key, &o)
	answer(w, struct {
		XMLName      xml.Name `xml:"CopyObjectResult"`
		ETag         string
		LastModified string
	}{ETag: o.ETag, LastModified: o.Modified.Format(time.RFC3339)})
}

func (s *Server) remove(w http.ResponseWriter, r *http.Request, bucket, key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if match := r.Header.Get("If-Match"); match != "" {
		if o := s.buckets[bucket][key]; o == nil || match != "*" && o.ETag != match {
			refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
			return
		}
	}
	if s.locked[bucket] {
		s.removeVersion(w, r, bucket, key)
		return
	}
	delete(s.buckets[bucket], key)
	w.WriteHeader(http.StatusNoContent)
}

// removeMany overlooks the ETags in a list, as some stores do.
func (s *Server) removeMany(w http.ResponseWriter, r *http.Request, bucket string) {
	var doc struct {
		Objects []struct{ Key string } `xml:"Object"`
	}
	if err := xml.NewDecoder(r.Body).Decode(&doc); err != nil {
		refuse(w, http.StatusBadRequest, "MalformedXML")
		return
	}
	type deleted struct{ Key string }
	var out struct {
		XMLName xml.Name `xml:"DeleteResult"`
		Deleted []deleted
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range doc.Objects {
		delete(s.buckets[bucket], o.Key)
		out.Deleted = append(out.Deleted, deleted(o))
	}
	answer(w, out)
}

func (s *Server) serveTags(w http.ResponseWriter, r *http.Request, bucket, key string) {
	type tag struct{ Key, Value string }
	type tagging struct {
		XMLName xml.Name `xml:"Tagging"`
		Tags    []tag    `xml:"TagSet>Tag"`
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.find(bucket, key, r.URL.Query().Get("versionId"))
	if o == nil {
		refuse(w, http.StatusNotFound, "NoSuchKey")
		return
	}
	switch r.Method {
	case http.MethodGet:
		var doc tagging
		set, _ := url.ParseQuery(o.Tags)
		for _, name := range slices.Sorted(maps.Keys(set)) {
			doc.Tags = append(doc.Tags, tag{name, set.Get(name)})
		}
		answer(w, doc)
	case http.MethodPut:
		var doc tagging
		if err := xml.NewDecoder(r.Body).Decode(&doc); err != nil {
			refuse(w, http.StatusBadRequest, "MalformedXML")
			return
		}
		set := url.Values{}
		for _, t := range doc.Tags {
			set.Set(t.Key, t.Value)
		}
		o.Tags = set.Encode()
	default:
		o.Tags = ""
		w.WriteHeader(http.StatusNoContent)
	}
}

// serveUpload is the multipart half.
func (s *Server) serveUpload(w http.ResponseWriter, r *http.Request, bucket, key string, q url.Values) {
	if r.Method == http.MethodPost && q.Has("uploads") {
		s.mu.Lock()
		defer s.mu.Unlock()
		if why := s.lockRefusal(bucket, r.Header); why != "" {
			refuseWith(w, http.StatusBadRequest, "InvalidRequest", why)
			return
		}
		s.serial++
		id := fmt.Sprintf("upload-%06d", s.serial)
		s.uploads[id] = &upload{
			bucket: bucket, key: key, header: kept(r.Header), tags: r.Header.Get("X-Amz-Tagging"), grants: grantsOf(r.Header), parts: map[int]*Stored{},
			algorithm: r.Header.Get("X-Amz-Checksum-Algorithm"),
		}
		answer(w, struct {
			XMLName  xml.Name `xml:"InitiateMultipartUploadResult"`
			UploadID string   `xml:"UploadId"`
		}{UploadID: id})
		return
	}
	id := q.Get("uploadId")
	s.mu.Lock()
	u := s.uploads[id]
	s.mu.Unlock()
	if u == nil || u.bucket != bucket || u.key != key {
		_, _ = io.Copy(io.Discard, r.Body)
		refuse(w, http.StatusNotFound, "NoSuchUpload")
		return
	}
	switch r.Method {
	case http.MethodPut:
		if !u.takes(r.Header) {
			refuse(w, http.StatusBadRequest, "InvalidRequest")
			return
		}
		part, err := s.take(w, r)
		if err != nil {
			return
		}
		n, _ := strconv.Atoi(q.Get("partNumber"))
		s.mu.Lock()
		defer s.mu.Unlock()
		u.parts[n] = part
		w.Header().Set("Etag", part.ETag)
	case http.MethodPost:
		s.complete(w, r, id, u)
	case http.MethodDelete:
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.uploads, id)
		w.WriteHeader(http.StatusNoContent)
	default:
		s.listParts(w, u, q)
	}
}

func (s *Server) complete(w http.ResponseWriter, r *http.Request, id string, u *upload) {
	var doc struct {
		Parts []struct {
			PartNumber    int
			ETag          string
			ChecksumCRC32 string
		} `xml:"Part"`
	}
	if err := xml.NewDecoder(r.Body).Decode(&doc); err != nil {
		refuse(w, http.StatusBadRequest, "MalformedXML")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if status, code := s.writable(r, s.buckets[u.bucket][u.key]); status != 0 {
		refuse(w, status, code)
		return
	}
	o := &Stored{Header: u.header, Tags: u.tags, Grants: u.grants, Modified: time.Now().UTC().Truncate(time.Second)}
	var data bytes.Buffer
	all := newSum()
	for _, p := range doc.Parts {
		part := u.parts[p.PartNumber]
		if part == nil || strings.Trim(p.ETag, `"`) != strings.Trim(part.ETag, `"`) {
			refuse(w, http.StatusBadRequest, "InvalidPart")
			return
		}
		if u.algorithm != "" && p.ChecksumCRC32 != part.checksum {
			refuse(w, http.StatusBadRequest, "InvalidRequest")
			return
		}
		data.Write(part.Data)
		o.Size += part.Size
		o.Parts = append(o.Parts, part.Size)
		raw, _ := hex.DecodeString(strings.Trim(part.ETag, `"`))
		all.Write(raw)
	}
	o.Data = data.Bytes()
	o.ETag = fmt.Sprintf(`"%x-%d"`, all.Sum(nil), len(doc.Parts))
	s.keep(w, u.bucket, u.key, o)
	delete(s.uploads, id)
	answer(w, struct {
		XMLName xml.Name `xml:"CompleteMultipartUploadResult"`
		ETag    string
	}{ETag: o.ETag})
}
