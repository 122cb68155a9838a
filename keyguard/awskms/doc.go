// Package awskms is keyguard's view of one AWS KMS key.
//
// # Job
//
// Client implements keyguard.KMS on aws-sdk-go-v2. classify.go is the only table
// that turns AWS's errors into key states.
//
// # Guarantees
//
//   - One attempt per call: the SDK's retries are off, the guard owns pacing.
//   - Decrypt names the key and the encryption context, and the answer must name
//     the same key. The region is the one in the key's ARN.
//   - An error that is not known means "not usable", never "fine".
//   - A plaintext key exists only inside seal.Do: the call that carries it runs
//     there, over a connection of its own whose buffers are allocated there too
//     (transport.go), and it is cleared when the user's function returns.
//     Probes, which carry no useful secret, use pooled connections.
package awskms
