// Package volumeread reads sealed volumes below the mount: for `byokd check`,
// which reads every block, and `byokd decrypt`, which restores plain files. It knows the format and nothing of FUSE, KMS or gates; the root
// key comes from its caller, for one file or piece of it at a time.
//
// # Guarantees
//
//   - Nothing is written, and nothing outside the lower directory is read:
//     names are opened one by one, relative to the directory they were found in,
//     and no symlink is followed.
//   - What is passed on is authentic. What is not becomes a [Fault], and the
//     rest goes on.
//   - No byokd serves the volume meanwhile: [Open] takes a shared lock where the
//     daemon takes an exclusive one. Or it is that byokd itself which reads
//     ([OpenServed]): then a block counts as damaged only if it does not open
//     while its writers are held off.
//
// A Volume is used by one goroutine.
package volumeread
