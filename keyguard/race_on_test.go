//go:build race

package keyguard

// crowdSize is how many pods watch one key in the simulation; fewer under the
// race detector, which makes each ten times as dear.
const crowdSize = 200
