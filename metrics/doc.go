// Package metrics is byokd's face: Prometheus series, health endpoints, the status as JSON and as a page.
// It is the only package besides cmd that knows Prometheus.
//
// # Guarantees
//
//   - Everything answers at all times: while waiting for a key, while frozen, while stopping. Nothing
//     here enters a gate, touches the mount or asks KMS.
//   - States are read from the guards at the moment of asking, so a series cannot lag behind a freeze.
//   - Liveness says 200 as long as the process can answer: a restart brings no key back. Readiness says
//     200 only while every resource serves.
//   - No key material, file name or object name can appear: this package is never given any.
//   - Labels are bounded: guards, buckets, operations, states and reasons, all from fixed or configured
//     sets. A key ARN stands in byokd_key_info only.
//
// # Ordering rules
//
// A [Panel] is made with all guards and resources before [Panel.Watch] runs and a [Server] serves; after
// that only the states of resources change. Observers may be called from any goroutine at any time.
package metrics
