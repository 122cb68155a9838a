// Package awskey sets up and looks at a customer's KMS key from the outside:
// making a key that byokd can use, who byokd is to AWS, and whether each permission that byokd needs is there. It is for
// commands; keyguard and awskms are what uses a key while byokd runs.
//
// # Guarantees
//
//   - Create is idempotent: run again, whatever the step at which it was
//     interrupted, it completes what is missing and makes no second key.
//   - Nothing that exists is weakened: a key that is disabled stays disabled, a
//     policy that was changed is replaced only on request.
//   - Check changes nothing in AWS: permissions are tried with DryRun, or by calls
//     that only read.
package awskey
