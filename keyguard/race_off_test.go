//go:build !race

package keyguard

// crowdSize is how many pods watch one key in the simulation.
const crowdSize = 1000
