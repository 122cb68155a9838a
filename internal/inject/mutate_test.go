package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// podOf is a pod that can be injected, changed by edits.
func podOf(edits ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: map[string]string{LabelInject: "true"}, Annotations: map[string]string{}},
		Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "app", Image: "app", VolumeMounts: []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}}},
			Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "claim"}}}},
		},
	}
	for _, edit := range edits {
		edit(p)
	}
	return p
}

func annotated(name, value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations[name] = value }
}

// mutated applies the mutation to the pod as the API server would.
func mutated(t *testing.T, p *corev1.Pod, s Settings) (*corev1.Pod, Result) {
	t.Helper()
	result, err := Mutate(Pod{Annotations: p.Annotations, Spec: &p.Spec, Name: p.Name}, s)
	if err != nil {
		t.Fatal(err)
	}
	return applied(t, p, result.Patch), result
}

func applied(t *testing.T, p *corev1.Pod, patch []Operation) *corev1.Pod {
	t.Helper()
	object, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if object, err = Apply(object, patch); err != nil {
		t.Fatal(err)
	}
	out := &corev1.Pod{}
	if err := json.Unmarshal(object, out); err != nil {
		t.Fatal(err)
	}
	return out
}

// plainPaths lists the ways by which something other than the sidecar reaches the claim; none in a mutated pod.
func plainPaths(p *corev1.Pod) (ways []string) {
	claims := map[string]string{} // by volume
	for _, v := range p.Spec.Volumes {
		switch {
		case v.PersistentVolumeClaim != nil:
			claims[v.Name] = v.PersistentVolumeClaim.ClaimName
		case v.Ephemeral != nil:
			claims[v.Name] = p.Name + "-" + v.Name
		}
	}
	sealed, found := "", false // a claim without a name is the API server's to refuse
	for _, c := range p.Spec.InitContainers {
		for _, m := range c.VolumeMounts {
			if c.Name == SidecarName && m.MountPath == sealedPath {
				sealed, found = claims[m.Name]
			}
		}
	}
	if !found {
		return []string{"no sidecar has the claim"}
	}
	look := func(name string, mounts []corev1.VolumeMount, devices []corev1.VolumeDevice) {
		for _, m := range mounts {
			if claim, is := claims[m.Name]; is && claim == sealed {
				ways = append(ways, name+" mounts "+m.Name)
			}
		}
		for _, d := range devices {
			if claim, is := claims[d.Name]; is && claim == sealed {
				ways = append(ways, name+" has the device "+d.Name)
			}
		}
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if c.Name != SidecarName {
			look(c.Name, c.VolumeMounts, c.VolumeDevices)
		}
	}
	for _, c := range p.Spec.EphemeralContainers {
		look(c.Name, c.VolumeMounts, c.VolumeDevices)
	}
	first := p.Spec.InitContainers[0]
	if first.Name != SidecarName || first.RestartPolicy == nil || *first.RestartPolicy != corev1.ContainerRestartPolicyAlways || first.StartupProbe == nil {
		ways = append(ways, "the sidecar is not there before the others")
	}
	return ways
}

// However a pod is made, it is denied, or nothing but the sidecar reaches the claim.
func TestNoPathPastTheSidecar(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	injected := 0
	for range 5_000 {
		p := randomPod(random)
		wanted, err := Wanted(p.Labels)
		if err != nil || !wanted {
			t.Fatal(wanted, err)
		}
		result, err := Mutate(Pod{Annotations: p.Annotations, Spec: &p.Spec, Name: p.Name}, settings())
		var denial *Denial
		if errors.As(err, &denial) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		injected++
		out := applied(t, p, result.Patch)
		if ways := plainPaths(out); ways != nil {
			text, _ := yaml.Marshal(p)
			t.Fatalf("seed %d: %v\n%s", seed, ways, text)
		}
		again, err := Mutate(Pod{Annotations: out.Annotations, Spec: &out.Spec, Name: out.Name}, settings())
		if err != nil || len(again.Patch) > 0 {
			text, _ := yaml.Marshal(p)
			t.Fatalf("seed %d: not idempotent: %v %v\n%s", seed, again.Patch, err, text)
		}
	}
	if injected < 200 {
		t.Errorf("only %d of the pods could be injected: the test looks at too little", injected)
	}
}

// randomPod draws a pod from few names, so that they collide often.
func randomPod(r *rand.Rand) *corev1.Pod {
	pick := func(of ...string) string { return of[r.IntN(len(of))] }
	rarely := func() bool { return r.IntN(12) == 0 }
	p := podOf()
	for i := range 1 + r.IntN(4) {
		v := corev1.Volume{Name: pick("data", "more", "logs", "byokd-run", "other")}
		if i == 0 || slices.ContainsFunc(p.Spec.Volumes, func(has corev1.Volume) bool { return has.Name == v.Name }) {
			continue
		}
		switch r.IntN(4) {
		case 0:
			v.PersistentVolumeClaim = &corev1.PersistentVolumeClaimVolumeSource{ClaimName: pick("claim", "claim2", "p-data"), ReadOnly: rarely()}
		case 1:
			v.Ephemeral = &corev1.EphemeralVolumeSource{}
		case 2:
			v.EmptyDir = &corev1.EmptyDirVolumeSource{}
		default:
			v.HostPath = &corev1.HostPathVolumeSource{Path: pick("/var", "/var/lib/kubelet/pods", "/etc/ssl", "/dev/sda")}
		}
		p.Spec.Volumes = append(p.Spec.Volumes, v)
	}
	if rarely() {
		p.Spec.Volumes[0].PersistentVolumeClaim, p.Spec.Volumes[0].Ephemeral = nil, &corev1.EphemeralVolumeSource{}
	}
	container := func(name string) corev1.Container {
		c := corev1.Container{Name: name}
		for range r.IntN(3) {
			m := corev1.VolumeMount{Name: pick("data", "data", "more", "logs", "byokd-run", "byokd-mount"), MountPath: pick("/data", "/a", "/sealed"), ReadOnly: rarely()}
			switch r.IntN(5) {
			case 0:
				m.SubPath = pick("x", "a/b")
			case 1:
				m.SubPathExpr = "$(X)"
			}
			c.VolumeMounts = append(c.VolumeMounts, m)
		}
		if rarely() {
			c.VolumeDevices = append(c.VolumeDevices, corev1.VolumeDevice{Name: pick("data", "more"), DevicePath: "/dev/x"})
		}
		return c
	}
	for i := range r.IntN(3) {
		c := container(pick("init"+fmt.Sprint(i), "init"+fmt.Sprint(i), "byokd"))
		if r.IntN(2) == 0 {
			always := corev1.ContainerRestartPolicyAlways
			c.RestartPolicy = &always
		}
		p.Spec.InitContainers = append(p.Spec.InitContainers, c)
	}
	if r.IntN(2) == 0 {
		p.Spec.Containers = append(p.Spec.Containers, container(pick("b", "b", "byokd")))
	}
	if rarely() {
		p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon(container("debug"))})
	}
	for name, values := range map[string][]string{
		AnnotationVolume: {"data", "more", "byokd-run"}, AnnotationMountMode: {ModeCSI, ModePrivileged}, AnnotationProfile: {"zeebe", "elasticsearch"},
		AnnotationContainers: {"app", "app,b", "b"}, AnnotationInjected: {"v1"}, AnnotationCredentials: {"s3"}, AnnotationFrozenReadiness: {"false", "true"},
	} {
		if r.IntN(4) == 0 {
			p.Annotations[name] = pick(values...)
		}
	}
	return p
}

func TestDenials(t *testing.T) {
	yes, no := true, false
	pvc := func(claim string) corev1.VolumeSource {
		return corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}
	}
	for _, c := range []struct {
		name   string
		edit   func(*corev1.Pod)
		reason Reason
		says   string
	}{
		{"unknown annotation", annotated("byokd.io/prof1le", "zeebe"), ReasonUnknownAnnotation, "byokd.io/prof1le is unknown; known are byokd.io/config, byokd.io/containers"},
		{"unknown profile", annotated(AnnotationProfile, "mysql"), ReasonAnnotation, `no profile "mysql"; known are elasticsearch, zeebe`},
		{"the default has no name", annotated(AnnotationProfile, "default"), ReasonAnnotation, "no profile"},
		{"mode", annotated(AnnotationMountMode, "CSI"), ReasonAnnotation, "neither csi nor privileged"},
		{"config", annotated(AnnotationConfig, "No Name"), ReasonAnnotation, "is not a name"},
		{"memory", annotated(AnnotationMemory, "lots"), ReasonAnnotation, "not a quantity"},
		{"little memory", annotated(AnnotationMemory, "64Mi"), ReasonAnnotation, "less than the 128Mi"},
		{"cpu", annotated(AnnotationCPU, "-1"), ReasonAnnotation, "above zero"},
		{"readiness", annotated(AnnotationFrozenReadiness, "no"), ReasonAnnotation, "neither true nor false"},
		{"containers", annotated(AnnotationContainers, "app,"), ReasonAnnotation, `"" is not the name of a container`},
		{"image from elsewhere", annotated(AnnotationImage, "evil.example/byokd/byokd:v1"), ReasonImage, "--allow-image-repository"},
		{"no such volume", annotated(AnnotationVolume, "disk"), ReasonNoVolume, "there is no volume disk"},
		{"our volume", annotated(AnnotationVolume, RunVolume), ReasonAnnotation, "byokd's own"},
		{"a directory of the node", func(p *corev1.Pod) {
			p.Spec.Volumes[0].VolumeSource = corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/data"}}
		}, ReasonVolumeKind, "no persistentVolumeClaim"},
		{"read-only", func(p *corev1.Pod) { p.Spec.Volumes[0].PersistentVolumeClaim.ReadOnly = true }, ReasonVolumeKind, "read-only"},
		{"second volume", func(p *corev1.Pod) {
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "again", VolumeSource: pvc("claim")})
		}, ReasonSecondVolume, "the volume again is the same claim as data (claim)"},
		{"claim of an ephemeral volume", func(p *corev1.Pod) {
			p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}}, {Name: "again", VolumeSource: pvc("p-data")}}
		}, ReasonSecondVolume, "p-data"},
		{"device", func(p *corev1.Pod) {
			p.Spec.Containers[0].VolumeDevices = []corev1.VolumeDevice{{Name: "data", DevicePath: "/dev/x"}}
		}, ReasonBlockVolume, "block device"},
		{"nobody mounts it", func(p *corev1.Pod) { p.Spec.Containers[0].VolumeMounts = nil }, ReasonNotMounted, "no container mounts"},
		{"a container that is not named", func(p *corev1.Pod) {
			p.Annotations[AnnotationContainers] = "app"
			p.Spec.InitContainers = []corev1.Container{{Name: "restore", VolumeMounts: []corev1.VolumeMount{{Name: "data", MountPath: "/d"}}}}
		}, ReasonContainers, "the container restore mounts the volume data and is not named"},
		{"a name without a mount", annotated(AnnotationContainers, "app,sidecar"), ReasonContainers, `"sidecar" does not mount`},
		{"name of a container", func(p *corev1.Pod) { p.Spec.Containers[0].Name = SidecarName }, ReasonNameTaken, "called byokd already"},
		{"name of an init container", func(p *corev1.Pod) { p.Spec.InitContainers = []corev1.Container{{Name: SidecarName}} }, ReasonNameTaken, "called byokd already"},
		{"name of a volume", func(p *corev1.Pod) { p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: MountVolume}) }, ReasonNameTaken, "byokd-mount"},
		{"our sockets", func(p *corev1.Pod) {
			p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: RunVolume, MountPath: "/r"})
		}, ReasonContainers, "byokd's own"},
		{"ephemeral container", func(p *corev1.Pod) {
			p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "d", VolumeMounts: []corev1.VolumeMount{{Name: "data"}}}}}
		}, ReasonContainers, "ephemeral"},
		{"host network", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, ReasonHostAccess, "S3 endpoint"},
		{"host processes", func(p *corev1.Pod) { p.Spec.HostPID = true }, ReasonHostAccess, "hostPID"},
		{"shared processes", func(p *corev1.Pod) { p.Spec.ShareProcessNamespace = &yes }, ReasonSharedProcesses, "/proc"},
		{"user namespace", func(p *corev1.Pod) { p.Spec.HostUsers = &no }, ReasonUserNamespace, "hostUsers"},
		{"windows", func(p *corev1.Pod) { p.Spec.OS = &corev1.PodOS{Name: corev1.Windows} }, ReasonWindows, "Windows"},
		{"kubelet's directory", func(p *corev1.Pod) {
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "h", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/lib/kubelet/pods/"}}})
		}, ReasonHostAccess, "/var/lib/kubelet/pods/ of the node"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := podOf(c.edit)
			_, err := Mutate(Pod{Annotations: p.Annotations, Spec: &p.Spec, Name: p.Name}, settings())
			var denial *Denial
			if !errors.As(err, &denial) {
				t.Fatalf("not denied: %v", err)
			}
			if denial.Reason != c.reason || !strings.Contains(denial.Error(), c.says) {
				t.Errorf("%s: %s", denial.Reason, denial)
			}
		})
	}
}

func TestHostPathsThatReachClaims(t *testing.T) {
	for path, want := range map[string]bool{
		"/": true, "": true, "/var": true, "/var/lib": true, "/var/lib/kubelet": true, "/var/lib/kubelet/pods/x": true, "/var/lib/k0s/kubelet": true,
		"/dev": true, "/dev/sdb": true, "/var/../var/lib": true, "/var/log": false, "/etc/localtime": false, "/var/lib/kube": false, "/srv/device": false,
	} {
		if reachesClaims(path) != want {
			t.Errorf("%q: %v", path, !want)
		}
	}
}

func TestWanted(t *testing.T) {
	for value, want := range map[string]bool{"true": true, "false": false} {
		if got, err := Wanted(map[string]string{LabelInject: value}); got != want || err != nil {
			t.Errorf("%q: %v %v", value, got, err)
		}
	}
	if got, err := Wanted(nil); got || err != nil {
		t.Error(got, err)
	}
	for _, value := range []string{"", "True", "yes", "enabled", "1"} {
		if _, err := Wanted(map[string]string{LabelInject: value}); err == nil {
			t.Errorf("%q was understood", value)
		}
	}
}

// What other webhooks add to the sidecar between two passes stays; what makes it byokd's comes back.
func TestOthersMayAddToTheSidecar(t *testing.T) {
	s := settings()
	s.Repositories = []string{"mirror.example/byokd"}
	first, _ := mutated(t, podOf(), s)
	first.Spec.InitContainers = slices.Insert(first.Spec.InitContainers, 0, corev1.Container{Name: "mesh-init"})
	sidecar := &first.Spec.InitContainers[1]
	sidecar.Image = "mirror.example/byokd@sha256:0123"
	sidecar.Env = append(sidecar.Env, corev1.EnvVar{Name: "AWS_ROLE_ARN", Value: "arn:aws:iam::111122223333:role/x"})
	sidecar.VolumeMounts = append(sidecar.VolumeMounts, corev1.VolumeMount{Name: "aws-iam-token", MountPath: "/var/run/secrets/eks.amazonaws.com/serviceaccount"})
	sidecar.Resources.Limits[corev1.ResourceMemory] = resource.MustParse("1Gi")
	sidecar.RestartPolicy, sidecar.StartupProbe = nil, nil
	sidecar.Args = []string{"sleep"}
	sidecar.Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 1}}}

	second, _ := mutated(t, first, s)
	got := second.Spec.InitContainers[0]
	if got.Name != SidecarName || second.Spec.InitContainers[1].Name != "mesh-init" || len(second.Spec.InitContainers) != 2 {
		t.Fatalf("the sidecar is not first: %+v", second.Spec.InitContainers)
	}
	if got.Image != "mirror.example/byokd@sha256:0123" || got.Env[len(got.Env)-1].Name != "AWS_ROLE_ARN" || got.VolumeMounts[len(got.VolumeMounts)-1].Name != "aws-iam-token" {
		t.Errorf("what others have added is gone: %+v", got)
	}
	if got.RestartPolicy == nil || got.StartupProbe == nil || got.Lifecycle != nil || !slices.Equal(got.Args, []string{"run", "--config", configFile}) {
		t.Errorf("the sidecar is not mended: %+v", got)
	}
	at := slices.IndexFunc(got.Env, func(e corev1.EnvVar) bool { return e.Name == "GOMEMLIMIT" })
	if at < 0 || got.Env[at].Value != "966367638" { // nine tenths of 1 GiB
		t.Errorf("GOMEMLIMIT does not follow the limit: %+v", got.Env)
	}
	if third, result := mutated(t, second, s); len(result.Patch) > 0 {
		t.Errorf("a third pass changes %+v of %+v", result.Patch, third)
	}
	s.Repositories = nil
	if _, err := Mutate(Pod{Annotations: second.Annotations, Spec: &second.Spec}, s); err == nil {
		t.Error("an image from a repository that is not allowed was kept")
	}
}

// A field of a newer Kubernetes than this program knows is not lost.
func TestUnknownFieldsSurvive(t *testing.T) {
	in := `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","labels":{"byokd.io/inject":"true"}},"spec":{"newInPods":{"a":1},
"initContainers":[{"name":"i","newInContainers":2,"volumeMounts":[{"name":"data","mountPath":"/i","newInMounts":true}]}],
"containers":[{"name":"a","volumeMounts":[{"name":"data","mountPath":"/d","newInMounts":[3]}]}],
"volumes":[{"name":"data","persistentVolumeClaim":{"claimName":"c","newInClaims":"x"}}]}}`
	out, _, err := Render(strings.NewReader(in), settings())
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{"newInPods:", "newInContainers: 2", "newInMounts: true", "newInMounts:\n", "newInClaims: x"} {
		if !strings.Contains(string(out), field) {
			t.Errorf("%s is lost:\n%s", field, out)
		}
	}
}

func TestClassOfService(t *testing.T) {
	quantities := func(cpu, memory string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	}
	for _, c := range []struct {
		name     string
		edit     func(*corev1.Pod)
		cpuLimit string
	}{
		{"best effort", func(*corev1.Pod) {}, "0"},
		{"burstable", func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = quantities("1", "1Gi") }, "0"},
		{"guaranteed, requests left out", func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Limits = quantities("1", "1Gi") }, GuaranteedCPU},
		{"guaranteed, as the pod says", func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources.Limits = quantities("1", "1Gi")
			p.Annotations[AnnotationCPU] = "250m"
		}, "250m"},
		{"requests below limits", func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Requests: quantities("500m", "1Gi"), Limits: quantities("1", "1Gi")}
		}, "0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, _ := mutated(t, podOf(c.edit), settings())
			got := out.Spec.InitContainers[0].Resources
			if got.Limits.Cpu().Cmp(resource.MustParse(c.cpuLimit)) != 0 || got.Limits.Memory().Cmp(*got.Requests.Memory()) != 0 {
				t.Errorf("%+v", got)
			}
			if before, after := guaranteed(&podOf(c.edit).Spec), guaranteed(&out.Spec) && limited(got); before != after {
				t.Errorf("guaranteed before: %v, after: %v", before, after)
			}
		})
	}
}

// The application keeps what the pod had as a whole.
func TestPodResourcesGrow(t *testing.T) {
	list := func() corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2"), corev1.ResourceMemory: resource.MustParse("4Gi")}
	}
	p := podOf(func(p *corev1.Pod) { p.Spec.Resources = &corev1.ResourceRequirements{Requests: list(), Limits: list()} })
	out, _ := mutated(t, p, settings())
	if r := out.Spec.Resources; r.Requests.Cpu().String() != "3" || r.Limits.Cpu().String() != "3" || r.Limits.Memory().String() != "4480Mi" {
		t.Errorf("%+v", r)
	}
}

func TestRestartOfAllContainers(t *testing.T) {
	s := settings()
	s.RestartAll = true
	privileged := annotated(AnnotationMountMode, ModePrivileged)
	out, _ := mutated(t, podOf(privileged), s)
	rules := out.Spec.InitContainers[0].RestartPolicyRules
	if len(rules) != 1 || rules[0].Action != corev1.ContainerRestartRuleActionRestartAllContainers {
		t.Errorf("%+v", rules)
	}
	if out, _ = mutated(t, podOf(privileged), settings()); out.Spec.InitContainers[0].RestartPolicyRules != nil {
		t.Error("a rule that this API does not know")
	}
	if out, _ = mutated(t, podOf(), s); out.Spec.InitContainers[0].RestartPolicyRules != nil {
		t.Error("a mount that survives its daemon, and containers that do not")
	}
}

func TestLocalhostSeccomp(t *testing.T) {
	s := settings()
	s.LocalhostSeccomp = "byokd/byokd.json"
	out, _ := mutated(t, podOf(), s)
	profile := out.Spec.InitContainers[0].SecurityContext.SeccompProfile
	if profile.Type != corev1.SeccompProfileTypeLocalhost || profile.LocalhostProfile == nil || *profile.LocalhostProfile != s.LocalhostSeccomp {
		t.Errorf("%+v", profile)
	}
}

func TestWarningsFitTheAPI(t *testing.T) {
	p := podOf(annotated(AnnotationProfile, "zeebe"), func(p *corev1.Pod) {
		c := &p.Spec.Containers[0]
		c.Name = strings.Repeat("n", 63)
		c.LivenessProbe, c.StartupProbe = &corev1.Probe{}, &corev1.Probe{}
	})
	_, result := mutated(t, p, settings())
	reasons := map[Reason]bool{}
	for _, w := range result.Warnings {
		reasons[w.Reason] = true
		if len(w.Text) > warningLimit {
			t.Errorf("%d bytes: %s", len(w.Text), w.Text)
		}
	}
	if !reasons[ReasonLivenessProbe] || !reasons[ReasonStartupProbe] || !reasons[ReasonDataPath] {
		t.Errorf("%+v", result.Warnings)
	}
}
