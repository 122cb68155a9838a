// Package seccomp holds the seccomp profile of byokd run, in the form of the OCI
// runtime specification, which kubelet's Localhost profiles have: the system calls
// that byokd and Go's runtime make, mounting included, which nobody may do without
// the capability. All others are refused with EPERM; a new thread's clone3, which Go
// does without, with ENOSYS, as runtimes do by default. Nobody is killed: a call that
// is refused costs an error that is logged, and a killed byokd costs the mount.
package seccomp
