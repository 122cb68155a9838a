package objstore

import (
	"encoding/xml"
	"net/http"
	"sync"
	"time"
)

// keepAliveEvery is how often a long answer gives a sign of life. Clients give up
// after 30 to 60 s without a byte.
const keepAliveEvery = 10 * time.Second

// slowly answers with the document that work returns. Where work takes long
// (completing or copying large objects) it does as S3 does: it sends 200 and
// blanks while work goes on, and a failure then stands in the document. set adds
// headers when there is still time for them.
func (p *Proxy) slowly(c *call, work func() (doc any, set func(http.Header), err error)) error {
	k := startKeepAlive(c.w, p.limits.keepAlive)
	doc, set, err := work()
	if !k.stop() {
		if err != nil {
			return err
		}
		set(c.w.header())
		return writeXML(c.w, http.StatusOK, doc)
	}
	if err != nil {
		e := errorOf(err)
		doc = xmlError{Code: e.Code, Message: e.Message, Key: c.key, BucketName: c.bucket.name, Resource: c.r.URL.Path, RequestID: c.id, HostID: "byokd"}
	}
	body, marshalErr := xml.Marshal(doc)
	if marshalErr != nil {
		return marshalErr
	}
	_, writeErr := c.w.Write(body)
	c.failed = err
	return writeErr
}

// keepAlive writes blanks into an answer until it is stopped. The answer belongs
// to it between start and stop.
type keepAlive struct {
	done  chan struct{}
	ended sync.WaitGroup
	w     *response
}

func startKeepAlive(w *response, every time.Duration) *keepAlive {
	k := &keepAlive{done: make(chan struct{}), w: w}
	k.ended.Go(func() {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for {
			select {
			case <-k.done:
				return
			case <-ticker.C:
				if !k.beat() {
					return
				}
			}
		}
	})
	return k
}

// beat writes one sign of life.
func (k *keepAlive) beat() bool {
	sign := " "
	if !k.w.started {
		k.w.header().Set("Content-Type", "application/xml")
		k.w.begin(http.StatusOK)
		sign = xml.Header
	}
	_, err := k.w.Write([]byte(sign))
	return err == nil && http.NewResponseController(k.w.w).Flush() == nil
}

// stop ends the signs of life and reports whether the answer was begun.
func (k *keepAlive) stop() bool {
	close(k.done)
	k.ended.Wait()
	return k.w.started
}
