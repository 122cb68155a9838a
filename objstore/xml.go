package objstore

import (
	"encoding/xml"
	"net/http"
	"strconv"
	"time"
)

// s3Namespace is the XML namespace of S3's answers.
const s3Namespace = "http://s3.amazonaws.com/doc/2006-03-01/"

// xmlTimeFormat is how S3 writes times in documents.
const xmlTimeFormat = "2006-01-02T15:04:05.000Z"

func xmlTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(xmlTimeFormat)
}

// writeXML answers with a document.
func writeXML(w *response, status int, doc any) error {
	body, err := xml.Marshal(doc)
	if err != nil {
		return err // a document of ours that cannot be written is a fault of ours
	}
	body = append([]byte(xml.Header), body...)
	w.header().Set("Content-Type", "application/xml")
	w.header().Set("Content-Length", strconv.Itoa(len(body)))
	w.begin(status)
	_, err = w.Write(body)
	return err
}

// xmlOwner names an owner.
type xmlOwner struct {
	ID          string
	DisplayName string `xml:",omitempty"`
}

func ownerOf(o Owner) *xmlOwner {
	if o.ID == "" && o.Name == "" {
		return nil
	}
	return &xmlOwner{ID: o.ID, DisplayName: o.Name}
}

// proxyOwner is whom canned answers name.
func proxyOwner() *xmlOwner { return &xmlOwner{ID: "byokd", DisplayName: "byokd"} }

type xmlPrefix struct{ Prefix string }

// ok answers with headers alone.
func ok(c *call, status int) error {
	c.w.header().Set("Content-Length", "0")
	if status == http.StatusNoContent {
		c.w.header().Del("Content-Length")
	}
	c.w.begin(status)
	return nil
}
