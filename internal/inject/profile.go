package inject

import (
	"embed"
	"fmt"
	"path"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

//go:embed profiles/*.yaml
var profileFiles embed.FS

// defaultProfile is what pods get that name none. It cannot be named.
const defaultProfile = "default"

// profile is what byokd knows about one kind of workload.
type profile struct {
	// Role of the volume in byokd's status and metrics; "" leaves it to the configuration.
	Role string `json:"role"`
	// Volume is the name that the workload's charts give to the volume of its data.
	Volume string `json:"volume"`
	// TerminationGracePeriodSeconds is the least that the pod needs: for the application to stop, and then for byokd to
	// flush and unmount.
	TerminationGracePeriodSeconds int64 `json:"terminationGracePeriodSeconds"`
	// DataPaths are where known images keep their data. A pod that mounts the sealed volume at or above none of them
	// is warned.
	DataPaths []string `json:"dataPaths"`
	// LivenessAdvice says what to do about a liveness probe of the application.
	LivenessAdvice string `json:"livenessAdvice"`
}

// Profiles lists the profiles that can be named, sorted.
func Profiles() []string {
	entries, err := profileFiles.ReadDir("profiles")
	if err != nil {
		panic(err) // embedded
	}
	var names []string
	for _, e := range entries {
		if name := strings.TrimSuffix(e.Name(), ".yaml"); name != defaultProfile {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func loadProfile(name string) (profile, error) {
	var p profile
	text, err := profileFiles.ReadFile(path.Join("profiles", name+".yaml"))
	if err == nil {
		err = yaml.UnmarshalStrict(text, &p)
	}
	if err != nil {
		return profile{}, fmt.Errorf("the profile %s: %w", name, err)
	}
	return p, nil
}
