package s3test

import (
	"encoding/xml"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// owner is whom all objects belong to.
const owner = "5e57"

const (
	lockMode  = "X-Amz-Object-Lock-Mode"
	lockUntil = "X-Amz-Object-Lock-Retain-Until-Date"
	legalHold = "X-Amz-Object-Lock-Legal-Hold"
)

// ruleHeaders are kept with an object and told by a HEAD.
var ruleHeaders = []string{lockMode, lockUntil, legalHold, "X-Amz-Website-Redirect-Location"}

// archives are the storage classes whose objects have to be restored before they can be
// read.
var archives = []string{"GLACIER", "DEEP_ARCHIVE"}

// Lock gives a bucket versions and Object Lock, as it does when a bucket is created. Other
// buckets are of a service that overlooks the subresources of such rules.
func (s *Server) Lock(bucket string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.locked[bucket] = true
}

// Versions returns the versions of an object in a locked bucket, the oldest first. They
// must not be changed.
func (s *Server) Versions(bucket, key string) []*Stored {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.versions[bucket+"/"+key])
}

// FinishRestores makes archived objects that were asked for readable.
func (s *Server) FinishRestores() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, objects := range s.buckets {
		for _, o := range objects {
			if o.Header.Get("X-Amz-Restore") != "" {
				o.Header.Set("X-Amz-Restore", `ongoing-request="false", expiry-date="Fri, 21 Dec 2040 00:00:00 GMT"`)
			}
		}
	}
}

// versioning answers GetBucketVersioning.
func (s *Server) versioning(w http.ResponseWriter, bucket string) {
	var doc struct {
		XMLName xml.Name `xml:"VersioningConfiguration"`
		Status  string   `xml:",omitempty"`
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.locked[bucket] {
		doc.Status = "Enabled"
	}
	answer(w, doc)
}

// lockConfiguration answers GetObjectLockConfiguration.
func (s *Server) lockConfiguration(w http.ResponseWriter, bucket string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.locked[bucket] {
		refuse(w, http.StatusNotFound, "ObjectLockConfigurationNotFoundError")
		return
	}
	answer(w, struct {
		XMLName           xml.Name `xml:"ObjectLockConfiguration"`
		ObjectLockEnabled string
	}{ObjectLockEnabled: "Enabled"})
}

// keep makes o the current version of an object. mu is held.
func (s *Server) keep(w http.ResponseWriter, bucket, key string, o *Stored) {
	s.buckets[bucket][key] = o
	if !s.locked[bucket] {
		return
	}
	s.serial++
	o.Version = fmt.Sprintf("version-%06d", s.serial)
	s.versions[bucket+"/"+key] = append(s.versions[bucket+"/"+key], o)
	w.Header().Set("X-Amz-Version-Id", o.Version)
}

// find returns an object or a version of it, or nil. mu is held.
func (s *Server) find(bucket, key, version string) *Stored {
	if version == "" {
		return s.buckets[bucket][key]
	}
	for _, o := range s.versions[bucket+"/"+key] {
		if o.Version == version {
			return o
		}
	}
	return nil
}

// lockedBy are the headers of a request that lock what it creates.
func lockedBy(h http.Header) (names []string) {
	for _, name := range []string{lockMode, lockUntil, legalHold} {
		if h.Get(name) != "" {
			names = append(names, name)
		}
	}
	return names
}

// lockRefusal says why a lock in a request that creates an object is none, or "". mu is
// held.
func (s *Server) lockRefusal(bucket string, h http.Header) string {
	mode, until, hold := h.Get(lockMode), h.Get(lockUntil), h.Get(legalHold)
	date, err := time.Parse(time.RFC3339, until)
	switch {
	case mode == "" && until == "" && hold == "":
		return ""
	case !s.locked[bucket]:
		return "Bucket is missing Object Lock Configuration"
	case (mode == "") != (until == ""):
		return "x-amz-object-lock-retain-until-date and x-amz-object-lock-mode must both be supplied"
	case mode != "" && (err != nil || date.Before(time.Now())):
		return "The retain until date must be in the future!"
	}
	return ""
}

// removeVersion answers a DELETE in a locked bucket. mu is held.
func (s *Server) removeVersion(w http.ResponseWriter, r *http.Request, bucket, key string) {
	id := r.URL.Query().Get("versionId")
	if id == "" { // a marker, which is not kept as a version here
		delete(s.buckets[bucket], key)
		w.Header().Set("X-Amz-Delete-Marker", "true")
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if o := s.find(bucket, key, id); o != nil {
		until, err := time.Parse(time.RFC3339, o.Header.Get(lockUntil))
		if o.Header.Get(legalHold) == "ON" || err == nil && until.After(time.Now()) {
			refuse(w, http.StatusForbidden, "AccessDenied")
			return
		}
		s.versions[bucket+"/"+key] = slices.DeleteFunc(s.versions[bucket+"/"+key], func(v *Stored) bool { return v == o })
		if s.buckets[bucket][key] == o {
			delete(s.buckets[bucket], key)
		}
	}
	w.WriteHeader(http.StatusNoContent)
}

// serveRule answers GET for the lock and the ACL of an object.
func (s *Server) serveRule(w http.ResponseWriter, r *http.Request, bucket, key string, q url.Values) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.find(bucket, key, q.Get("versionId"))
	if o == nil {
		refuse(w, http.StatusNotFound, "NoSuchKey")
		return
	}
	switch {
	case r.Method != http.MethodGet:
		refuse(w, http.StatusNotImplemented, "NotImplemented")
	case q.Has("acl"):
		answer(w, aclOf(o))
	case !s.locked[bucket]:
		refuseWith(w, http.StatusBadRequest, "InvalidRequest", "Bucket is missing Object Lock Configuration")
	case q.Has("retention") && o.Header.Get(lockMode) != "":
		answer(w, struct {
			XMLName         xml.Name `xml:"Retention"`
			Mode            string
			RetainUntilDate string
		}{Mode: o.Header.Get(lockMode), RetainUntilDate: o.Header.Get(lockUntil)})
	case q.Has("legal-hold") && o.Header.Get(legalHold) != "":
		answer(w, struct {
			XMLName xml.Name `xml:"LegalHold"`
			Status  string
		}{Status: o.Header.Get(legalHold)})
	default:
		refuse(w, http.StatusNotFound, "NoSuchObjectLockConfiguration")
	}
}

type grant struct {
	Grantee struct {
		ID, URI string `xml:",omitempty"`
	}
	Permission string
}

// aclOf is the ACL that an object was created with.
func aclOf(o *Stored) any {
	var doc struct {
		XMLName xml.Name `xml:"AccessControlPolicy"`
		Owner   struct{ ID string }
		Grants  []grant `xml:"AccessControlList>Grant"`
	}
	doc.Owner.ID = owner
	add := func(id, uri, permission string) {
		g := grant{Permission: permission}
		g.Grantee.ID, g.Grantee.URI = id, uri
		doc.Grants = append(doc.Grants, g)
	}
	if o.Grants.Get("X-Amz-Acl") != "" || len(o.Grants) == 0 {
		add(owner, "", "FULL_CONTROL")
	}
	if o.Grants.Get("X-Amz-Acl") == "public-read" {
		add("", "http://acs.amazonaws.com/groups/global/AllUsers", "READ")
	}
	for _, name := range slices.Sorted(maps.Keys(o.Grants)) {
		permission, found := strings.CutPrefix(name, "X-Amz-Grant-")
		for grantee := range strings.SplitSeq(o.Grants.Get(name), ",") {
			kind, value, _ := strings.Cut(strings.TrimSpace(grantee), "=")
			value = strings.Trim(value, `"`)
			permission := strings.ToUpper(strings.ReplaceAll(permission, "-", "_"))
			switch {
			case !found:
			case kind == "uri":
				add("", value, permission)
			default:
				add(value, "", permission)
			}
		}
	}
	return doc
}

// grantsOf are the headers of a request that make an ACL.
func grantsOf(h http.Header) http.Header {
	out := http.Header{}
	for name, values := range h {
		if name == "X-Amz-Acl" || strings.HasPrefix(name, "X-Amz-Grant-") {
			out[name] = values
		}
	}
	return out
}

// archived reports whether an object has to be restored before it can be read.
func archived(o *Stored) bool {
	return (slices.Contains(archives, o.Header.Get("X-Amz-Storage-Class")) || o.Header.Get("X-Amz-Archive-Status") != "") && !strings.Contains(o.Header.Get("X-Amz-Restore"), `"false"`)
}

// restore answers RestoreObject.
func (s *Server) restore(w http.ResponseWriter, r *http.Request, bucket, key string, q url.Values) {
	var doc struct {
		XMLName xml.Name `xml:"RestoreRequest"`
		Days    int
		Tier    string `xml:"GlacierJobParameters>Tier"`
	}
	if err := xml.NewDecoder(r.Body).Decode(&doc); err != nil || doc.Days < 1 {
		refuse(w, http.StatusBadRequest, "MalformedXML")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch o := s.find(bucket, key, q.Get("versionId")); {
	case o == nil:
		refuse(w, http.StatusNotFound, "NoSuchKey")
	case !slices.Contains(archives, o.Header.Get("X-Amz-Storage-Class")):
		refuseState(w, o)
	case strings.Contains(o.Header.Get("X-Amz-Restore"), `"true"`):
		refuse(w, http.StatusConflict, "RestoreAlreadyInProgress")
	case o.Header.Get("X-Amz-Restore") != "":
	default:
		o.Header = o.Header.Clone()
		o.Header.Set("X-Amz-Restore", `ongoing-request="true"`)
		o.Tier = doc.Tier
		w.WriteHeader(http.StatusAccepted)
	}
}

// refuseState answers as S3 does what cannot be done with an object of its class.
func refuseState(w http.ResponseWriter, o *Stored) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(http.StatusForbidden)
	fmt.Fprintf(w, "<Error><Code>InvalidObjectState</Code><Message>The operation is not valid for the object's storage class</Message><StorageClass>%s</StorageClass>", o.Header.Get("X-Amz-Storage-Class"))
	if tier := o.Header.Get("X-Amz-Archive-Status"); tier != "" {
		fmt.Fprintf(w, "<AccessTier>%s</AccessTier>", tier)
	}
	fmt.Fprint(w, "</Error>")
}

// listVersions answers ListObjectVersions, in one page.
func (s *Server) listVersions(w http.ResponseWriter, bucket string, q url.Values) {
	type versionEntry struct {
		Key          string
		VersionID    string `xml:"VersionId"`
		IsLatest     bool
		LastModified string
		ETag         string
		Size         int64
	}
	var doc struct {
		XMLName xml.Name       `xml:"ListVersionsResult"`
		Entries []versionEntry `xml:"Version"`
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.locked[bucket] {
		for _, key := range sorted(s.buckets[bucket], q.Get("prefix")) {
			o := s.buckets[bucket][key]
			doc.Entries = append(doc.Entries, versionEntry{key, "null", true, o.Modified.Format(time.RFC3339), o.ETag, o.Size})
		}
	}
	for _, path := range slices.Sorted(maps.Keys(s.versions)) {
		key, found := strings.CutPrefix(path, bucket+"/")
		if !found || !strings.HasPrefix(key, q.Get("prefix")) {
			continue
		}
		for _, o := range slices.Backward(s.versions[path]) {
			doc.Entries = append(doc.Entries, versionEntry{key, o.Version, s.buckets[bucket][key] == o, o.Modified.Format(time.RFC3339), o.ETag, o.Size})
		}
	}
	answer(w, doc)
}
