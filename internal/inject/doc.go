// Package inject puts byokd into pods: as the mutating webhook of a cluster ([Server]) and offline ([Render]). Both
// are the same pure function, [Mutate].
//
// # Guarantees
//
//   - A labelled pod comes out with the sidecar in front of everything that mounts the sealed claim, or it is
//     denied. There is no third way: what is not understood (an unknown annotation, a second path to the claim, a
//     block volume) is a [Denial] with its reason.
//   - Of a mutated pod, the sidecar alone mounts the claim. Whatever the other containers mounted of it becomes a
//     mount of the encrypted filesystem, at the same path.
//   - Mutate is idempotent: what it has made passes through it unchanged, also after other webhooks have added
//     environment, mounts or images to the sidecar, which are kept.
//   - A mutation is a list of RFC 6902 operations, as small as can be: fields of Kubernetes versions that this
//     program does not know survive it.
//   - The webhook holds no KMS credential and reads no Secret but its own.
//
// # Certificates
//
// One Secret holds the authority's and the server's certificate for all replicas. It is replaced under its
// resourceVersion: of two replicas that renew at once, one succeeds and the other reads again. A new authority is
// trusted by the API servers, beside the old one, before anything is signed with it, and the old one for as long as a
// certificate of its may still be served; certificates.go has the steps, as a pure function of Secret and time.
//
// # Ordering rules
//
// A replica is ready when it has a certificate that the webhook configuration in force trusts. On a stop it is
// first not ready, then ends its requests, then its connections.
package inject
