// Package durable replaces the few small files that matter so that a crash or a
// power cut leaves either the old or the new content, whole.
//
// The order is fixed: write a temporary file in the same directory, fsync it,
// rename it over the target, fsync the directory. Content is durable before the
// name points to it, and the name is durable before the caller is told so.
//
// One process writes a given path at a time; the caller sees to that. A crash
// may leave the temporary file, whose name TempName tells and which the next
// write of the same path replaces.
package durable
