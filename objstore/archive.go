package objstore

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/xml"
	"io"
	"net/http"
	"slices"
	"strings"
)

// opRestoreObject makes an archived object readable for some days.
const opRestoreObject Op = "RestoreObject"

// xmlRestore is what of a RestoreRequest is handed on. The rest of S3's selects from the
// bytes of the object, which are sealed, or says where the selection goes.
type xmlRestore struct {
	XMLName xml.Name     `xml:"http://s3.amazonaws.com/doc/2006-03-01/ RestoreRequest"`
	Days    *int         `xml:",omitempty"`
	Glacier *xmlRestorer `xml:"GlacierJobParameters,omitempty"`
	Tier    string       `xml:",omitempty"`
}

type xmlRestorer struct{ Tier string }

// restoreElements are the paths of its elements.
var restoreElements = []string{"RestoreRequest", "RestoreRequest/Days", "RestoreRequest/Tier", "RestoreRequest/GlacierJobParameters", "RestoreRequest/GlacierJobParameters/Tier"}

// restoreArchived answers RestoreObject.
func (p *Proxy) restoreArchived(ctx context.Context, c *call) error {
	req, err := c.forwardRequest()
	if err != nil {
		return err
	}
	if err := checkRestore(req.Body); err != nil {
		return err
	}
	doc := struct {
		Days    *int
		Glacier *xmlRestorer `xml:"GlacierJobParameters"`
		Tier    string
	}{}
	if xml.Unmarshal(req.Body, &doc) != nil {
		return malformedXML()
	}
	// Written anew, so that the service below reads nothing in it that byokd did not.
	if req.Body, err = xml.Marshal(xmlRestore{Days: doc.Days, Glacier: doc.Glacier, Tier: doc.Tier}); err != nil {
		return err
	}
	sum := md5.Sum(req.Body)
	req.Header.Set("Content-Md5", base64.StdEncoding.EncodeToString(sum[:]))
	answer, err := c.bucket.Upstream.Forward(ctx, req)
	if err != nil {
		return err
	}
	return c.relay(answer)
}

// checkRestore refuses a request of which more than restoreElements would have to be
// handed on.
func checkRestore(document []byte) error {
	decoder := xml.NewDecoder(bytes.NewReader(document))
	var path []string
	seen := map[string]bool{}
	for {
		token, err := decoder.Token()
		if err == io.EOF && seen["RestoreRequest"] {
			return nil
		}
		if err != nil {
			return malformedXML()
		}
		switch t := token.(type) {
		case xml.StartElement:
			path = append(path, t.Name.Local)
			at := strings.Join(path, "/")
			switch {
			case path[0] != "RestoreRequest" || seen[at]:
				return malformedXML()
			case !slices.Contains(restoreElements, at):
				return refuse(http.StatusNotImplemented, "NotImplemented", "byokd restores archived objects, but cannot select from them: RestoreObject is handed on with Days and Tier only, not with %s.", t.Name.Local)
			}
			seen[at] = true
		case xml.EndElement:
			path = path[:len(path)-1]
		}
	}
}
