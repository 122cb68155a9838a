// Command devcloud is a stand-in for AWS on loopback, for trying and testing
// byokd: KMS with true key states and policies, STS GetCallerIdentity, and S3 on
// a directory, all at one endpoint that the real SDKs and the real aws command
// line can use. A page with buttons and the commands `devcloud key`, `devcloud
// fault` and `devcloud calls` take keys away, bring them back, disturb the
// service and show who asked for what. For a cluster to try byokd in, it answers
// AWS calls of others by TLS as well, with a certificate that it makes.
//
// It is never linked into byokd. Its key material, its objects and its
// credentials lie in clear in the state directory: nothing that must stay
// secret belongs into it.
//
// One process serves one directory (a lock holds that). KMS state is durable
// before it is acknowledged; objects are as durable as versitygw's posix
// backend makes them, which does not fsync.
package main
