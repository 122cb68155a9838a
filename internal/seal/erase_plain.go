//go:build !(goexperiment.runtimesecret && linux && (amd64 || arm64))

package seal

// ErasureGuaranteed tells whether keys are wiped from registers, stack and heap
// once unreachable. Where it is false, erasure is best effort.
const ErasureGuaranteed = false

// Do runs f. Built with GOEXPERIMENT=runtimesecret it also clears what f used.
func Do(f func()) { f() }
