// Package seal holds byokd's sealed formats: bytes in, bytes out.
//
// It knows what sealed files, names, symlink targets, extended attributes,
// volume headers and objects look like, derives their keys from a root key,
// and does the arithmetic between plain and sealed offsets. It opens no file,
// reads no clock, logs nothing and starts no goroutine. docs/FORMAT.md
// describes every format byte by byte; testdata freezes them.
//
// # Guarantees
//
//   - What was sealed for one place (file and block index; object, part,
//     segment index and last flag; kind of text) opens only there. Anything
//     else is ErrTampered, and nothing of it is returned.
//   - The primitives are the standard library's, and Tink's AES-SIV for names.
//   - Each key serves one purpose: HKDF-SHA256 with a label for the kind and a
//     random salt. No AES-GCM key nears 2^32 random nonces.
//   - No decoder panics or allocates from a length that it has not checked. A
//     header that parses marshals to the same bytes.
//   - Sealing and opening blocks, segments and names that are remembered does not
//     allocate.
//   - A fault of the world is an error. A fault of the caller (a buffer of the
//     wrong size, a key used after Wipe to seal) is a panic.
//
// # Keys in memory
//
// Everything that derives a key, builds a cipher, seals or opens must be called
// inside Do, around a whole request rather than a block: leaving Do clears the
// stack that was used. Root and the ciphers that come from it must not be kept
// beyond the pass that handed out the Root. Root also remembers plain names and the
// ciphers of long objects, which go with its keys. Sequence at a freeze: no user is left, then Root.Wipe, then
// drop the Root, then collect garbage; only then is nothing left in memory, and
// only where ErasureGuaranteed is true.
//
// # What is not promised
//
// Someone who can write the storage can put an older version of a block, file,
// object or header back, zero a block (it reads as a hole), cut at block or
// part boundaries, and swap whole files, symlinks or objects of the same root.
package seal
