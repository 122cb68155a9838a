// Package keyguard decides whether the keys below one KMS key may be used,
// right now.
package keyguard
