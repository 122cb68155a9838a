// Package s3test is an S3 service in memory, spoken to over HTTP by the real
// client: an upstream for tests of package objstore. It can be made to fail, also
// after it has done what was asked, to cut answers short and to stall; it lets a
// test look at, and tamper with, every byte it holds.
//
// It knows what objstore's upstream adapter uses: objects with ranges, metadata,
// tags and preconditions, copies, multipart uploads, listings of both versions.
// It verifies checksums (CRC32, Content-MD5, also in a trailer) and can demand them.
// A bucket can have versions, Object Lock and ACLs, and archived objects have to
// be restored. Signatures are not verified.
package s3test
