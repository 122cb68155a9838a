// Package fusemount holds what a mounter of byokd's filesystem does as root,
// whether that is byokd itself or the CSI node driver, which hands the device to an
// unprivileged byokd: to open the device and mount it, to bound the mount's dirty
// pages, to end it by force, to tell which paths lead into it and who of its callers
// is being killed, and to let those go while nobody serves it. It never opens a file
// of a mount, so nothing here waits for who serves it.
package fusemount
