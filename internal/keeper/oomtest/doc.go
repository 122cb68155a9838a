// Package oomtest makes memory cgroups in which the kernel really ends processes for
// want of memory.
package oomtest
