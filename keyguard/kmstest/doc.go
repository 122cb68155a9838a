// Package kmstest is a stand-in for AWS KMS (and for the one call of STS that
// tells who is calling): an http.Handler that the real SDKs and the real aws
// command line talk to as they talk to AWS. Tests embed it; cmd/devcloud serves
// it to people. It is never linked into byokd.
//
// # What is true here
//
//   - Key states are AWS's: Enabled, Disabled, PendingDeletion with a date that
//     is carried out, PendingReplicaDeletion, Unavailable, PendingImport.
//     Cancelling a deletion leaves the key Disabled.
//   - Ciphertexts are AES-256-GCM under the key's material and bound to key and
//     encryption context. Rotation keeps the old material, so old ciphertexts
//     open; deletion of the last key that holds the material destroys it.
//   - Every call is authenticated by its SigV4 signature, its region is the one
//     the caller signed for, and key policies and grants decide, explicit
//     denials first, before the key's state is looked at.
//   - Errors carry AWS's names, texts and HTTP status, every answer a request id.
//
// # What is not
//
// Changes are effective at once: AWS is eventually consistent. Key material and
// call log lie in clear in the state directory. Asymmetric and HMAC keys can be
// created and described, so that a wrong key can be pointed at, but not used.
//
// # Order and ownership
//
// The state is an immutable snapshot behind an atomic pointer. A reading call
// sees one snapshot from beginning to end. A changing call takes Server.mu,
// works on a copy, writes the copy durably (write, fsync, rename, fsync of the
// directory) and only then publishes it and answers: what was acknowledged
// survives a kill -9. A control method such as Disable returns after the
// snapshot was published, so every call that begins later sees it.
//
// A call passes these stations in this order: fault injection, signature,
// decoding, key look-up (NotFound), permission (AccessDenied), usage, key state
// (Disabled, KMSInvalidState), ciphertext (IncorrectKey, InvalidCiphertext),
// DryRun. The call log is written last, before the answer leaves.
package kmstest
