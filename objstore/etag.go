package objstore

import (
	"strconv"
	"strings"
)

// singleSuffix marks the ETags of objects and parts that were uploaded at once.
// Upstream's ETag is the MD5 of the sealed bytes; clients that see 32 hex digits
// compare them with the MD5 of what they sent and report corruption. With a
// suffix they take it for a multipart ETag and do not. "-0" is no number of
// parts, so it can be taken off again for conditional requests.
const singleSuffix = "-0"

// clientETag is what a client sees of an upstream ETag.
func clientETag(upstream string) string {
	bare := strings.Trim(upstream, `"`)
	if bare == "" {
		return ""
	}
	if !strings.Contains(bare, "-") {
		bare += singleSuffix
	}
	return `"` + bare + `"`
}

// upstreamETag takes back what clientETag did to each ETag of a condition.
func upstreamETag(client string) string {
	if client == "" || client == "*" {
		return client
	}
	tags := strings.Split(client, ",")
	for i, tag := range tags {
		tag = strings.TrimSpace(tag)
		if bare, quoted := strings.CutSuffix(tag, `"`); quoted {
			tags[i] = strings.TrimSuffix(bare, singleSuffix) + `"`
		} else {
			tags[i] = strings.TrimSuffix(tag, singleSuffix)
		}
	}
	return strings.Join(tags, ", ")
}

// partsOf returns the number of parts that an upstream ETag names: 1 for an
// object that was uploaded at once.
func partsOf(etag string) int {
	_, count, found := strings.Cut(strings.Trim(etag, `"`), "-")
	n, err := strconv.Atoi(count)
	if !found || err != nil || n < 1 {
		return 1
	}
	return n
}

// multipart reports whether an upstream ETag belongs to a multipart object; one
// of a single part counts too.
func multipart(etag string) bool { return strings.Contains(etag, "-") }
