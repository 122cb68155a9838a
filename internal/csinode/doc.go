// Package csinode is the CSI node driver csi.byokd.io: it mounts byokd's filesystem
// for pods and passes the mount to their sidecar, so that neither sidecar nor
// workload needs a privilege. It has no KMS credential and no key, and never opens a
// file of a mount but its root, to have the kernel write back.
//
// # Life of a mount
//
// kubelet publishes an inline ephemeral volume before the pod's containers start:
// the driver opens /dev/fuse, mounts it at the target path, and listens on a socket
// in the pod's in-memory volume for the sidecar, which gets the device and the
// services of package handover. The driver keeps a copy of the device, so the death
// of the sidecar blocks calls instead of failing them; who is killed meanwhile is let
// go all the same (deserted.go). kubelet unpublishes when the pod's containers have
// ended: the connection is aborted and the mount detached, which waits for nobody.
//
// A restart of the driver ends no mount, for the sidecar has the device, too; it
// connects again and deposits what the driver held. What is published is known from
// a file for each volume. Only when both are gone at once is a mount dead: its pod
// then has to be deleted.
//
// # Trust
//
// The pod may put anything into its in-memory volume: it is opened beneath kubelet's
// directory without following a symlink, and no name in it is followed either.
package csinode
