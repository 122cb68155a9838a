package s3test

import (
	"encoding/xml"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

type entry struct {
	Key          string
	LastModified string
	ETag         string
	Size         int64
	StorageClass string
}

type prefix struct{ Prefix string }

type listing struct {
	XMLName               xml.Name `xml:"ListBucketResult"`
	EncodingType          string   `xml:",omitempty"`
	IsTruncated           bool
	KeyCount              int
	NextMarker            string `xml:",omitempty"`
	NextContinuationToken string `xml:",omitempty"`
	Contents              []entry
	CommonPrefixes        []prefix
}

// list answers both versions of ListObjects.
func (s *Server) list(w http.ResponseWriter, bucket string, q url.Values) {
	limit := 1000
	if n, err := strconv.Atoi(q.Get("max-keys")); err == nil {
		limit = min(n, limit)
	}
	encode := func(v string) string { return v }
	if q.Get("encoding-type") == "url" {
		encode = url.QueryEscape
	}
	after := max(q.Get("marker"), q.Get("start-after"), q.Get("continuation-token"))
	doc := listing{EncodingType: q.Get("encoding-type")}
	last := ""
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range sorted(s.buckets[bucket], q.Get("prefix")) {
		group := ""
		if d := q.Get("delimiter"); d != "" {
			rest := key[len(q.Get("prefix")):]
			if i := strings.Index(rest, d); i >= 0 {
				group = key[:len(key)-len(rest)+i+len(d)]
			}
		}
		if key <= after || group != "" && (group == last || group <= after) {
			continue
		}
		if doc.KeyCount == limit {
			doc.IsTruncated = true
			if q.Get("list-type") == "2" {
				doc.NextContinuationToken = last
			} else if q.Get("delimiter") != "" {
				doc.NextMarker = encode(last)
			}
			break
		}
		doc.KeyCount++
		if last = key; group != "" {
			last = group
			doc.CommonPrefixes = append(doc.CommonPrefixes, prefix{encode(group)})
			continue
		}
		o := s.buckets[bucket][key]
		doc.Contents = append(doc.Contents, entry{Key: encode(key), LastModified: o.Modified.Format(time.RFC3339), ETag: o.ETag, Size: o.Size, StorageClass: "STANDARD"})
	}
	answer(w, doc)
}

func (s *Server) listUploads(w http.ResponseWriter, bucket string, q url.Values) {
	type entry struct {
		Key       string
		UploadID  string `xml:"UploadId"`
		Initiated string
	}
	var doc struct {
		XMLName xml.Name `xml:"ListMultipartUploadsResult"`
		Upload  []entry
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(s.uploads)) {
		if u := s.uploads[id]; u.bucket == bucket && strings.HasPrefix(u.key, q.Get("prefix")) {
			doc.Upload = append(doc.Upload, entry{Key: u.key, UploadID: id, Initiated: time.Now().UTC().Format(time.RFC3339)})
		}
	}
	answer(w, doc)
}

func (s *Server) listParts(w http.ResponseWriter, u *upload, q url.Values) {
	type part struct {
		PartNumber   int
		ETag         string
		Size         int64
		LastModified string
		// CRC32 that the part was uploaded with.
		ChecksumCRC32 string `xml:",omitempty"`
	}
	var doc struct {
		XMLName              xml.Name `xml:"ListPartsResult"`
		IsTruncated          bool
		NextPartNumberMarker int
		Part                 []part
	}
	limit, after := 1000, 0
	if n, err := strconv.Atoi(q.Get("max-parts")); err == nil {
		limit = min(n, limit)
	}
	after, _ = strconv.Atoi(q.Get("part-number-marker"))
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range slices.Sorted(maps.Keys(u.parts)) {
		if n <= after {
			continue
		}
		if len(doc.Part) == limit {
			doc.IsTruncated = true
			break
		}
		p := u.parts[n]
		doc.Part = append(doc.Part, part{n, p.ETag, p.Size, p.Modified.Format(time.RFC3339), p.checksum})
		doc.NextPartNumberMarker = n
	}
	answer(w, doc)
}
