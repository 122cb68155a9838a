// Package awskms is keyguard's view of one AWS KMS key.
package awskms
