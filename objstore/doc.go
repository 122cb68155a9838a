// Package objstore is the encrypting S3 proxy: it answers S3 requests of a
// workload on loopback, seals what is written and opens what is read, and keeps
// sealed bytes only in the bucket upstream.
//
// # Guarantees
//
//   - Nothing plain goes upstream but object keys, tags, content headers, sizes
//     and settings of buckets and objects (docs/THREAT_MODEL.md). An operation that
//     this package does not know is answered NotImplemented; it never reaches the
//     upstream.
//   - A write is acknowledged after the upstream acknowledged it, never before.
//     The last segment of a body leaves for the upstream only when the client's
//     length, signature, payload hash, trailer and checksums were verified, so a
//     bad upload never becomes an object.
//   - A read ends with exactly the bytes that Content-Length announced, each of
//     them authenticated, or the connection is broken off. Tampering found before
//     the first byte was sent is answered with an error document instead.
//   - While the key of a bucket is frozen, new requests wait (Options.HoldFor) and
//     are then answered 503 SlowDown with Retry-After; transfers under way pause
//     between segments and go on after the thaw. Plain bytes that were opened but
//     not handed to the kernel are cleared by the freeze and opened again after the
//     thaw.
//   - Memory per transfer is bounded, whatever the length of the object: 1 MiB for
//     an upload, 1.5 MiB for a download, which is read ahead.
//
// # Ordering rules
//
//  1. authenticate (signature, clock skew and expiry are judged at arrival),
//  2. wait for the gate,
//  3. talk to the upstream, holding no pass,
//  4. enter, seal or open one batch inside seal.Do, ask Pass.Err, exit,
//  5. hand the result on, holding no pass.
//
// No value of this package holds a cipher or a key across two passes: ciphers are
// derived from Pass.Keys in each batch and die with it.
package objstore
