package seccomp

import _ "embed"

// Path is where the node driver puts the profile, below kubelet's directory of
// profiles, and what a pod's localhostProfile says.
const Path = "byokd/byokd.json"

// Profile returns the profile's text.
func Profile() []byte { return []byte(profile) }

//go:embed byokd.json
var profile string
