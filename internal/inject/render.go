package inject

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	corev1 "k8s.io/api/core/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Finding is what there is to say about one object of a rendered manifest.
type Finding struct {
	Object   string // kind and name
	Injected bool   // false: it had been before, and is as it was
	Warnings []Warning
	Denial   *Denial // nil unless the webhook would deny its pods
}

// templates says where each kind keeps its pods' template, as a JSON pointer.
func templates() map[string]string {
	return map[string]string{
		"v1/Pod": "", "v1/ReplicationController": "/spec/template",
		"apps/v1/Deployment": "/spec/template", "apps/v1/StatefulSet": "/spec/template",
		"apps/v1/DaemonSet": "/spec/template", "apps/v1/ReplicaSet": "/spec/template",
		"batch/v1/Job": "/spec/template", "batch/v1/CronJob": "/spec/jobTemplate/spec/template",
	}
}

// manifest is what Render looks at of any object.
type manifest struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name         string `json:"name"`
		GenerateName string `json:"generateName"`
		Namespace    string `json:"namespace"`
	} `json:"metadata"`
	Items []json.RawMessage `json:"items"`
	Spec  struct {
		ServiceName          string `json:"serviceName"`
		PodManagementPolicy  string `json:"podManagementPolicy"`
		VolumeClaimTemplates []struct {
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
		} `json:"volumeClaimTemplates"`
	} `json:"spec"`
}

func (m manifest) String() string {
	name := m.Metadata.Name
	if name == "" {
		name = m.Metadata.GenerateName
	}
	return m.Kind + " " + name
}

// Render does to every labelled pod and pod template in the documents of in what the webhook would do, and passes all
// others through as they are. The findings are in the order of the documents, labelled objects only. Nothing is
// returned but the findings when a pod is denied.
func Render(in io.Reader, s Settings) ([]byte, []Finding, error) {
	documents, err := readDocuments(in)
	if err != nil {
		return nil, nil, err
	}
	r := renderer{settings: s, headless: headlessServices(documents)}
	for i, d := range documents {
		if documents[i].text, err = r.document(d); err != nil {
			return nil, r.findings, fmt.Errorf("document %d: %w", i+1, err)
		}
	}
	for _, f := range r.findings {
		if f.Denial != nil {
			return nil, r.findings, nil
		}
	}
	var out bytes.Buffer
	for i, d := range documents {
		if i > 0 {
			out.WriteString("---\n")
		}
		out.Write(d.text)
		if len(d.text) > 0 && d.text[len(d.text)-1] != '\n' {
			out.WriteByte('\n')
		}
	}
	return out.Bytes(), r.findings, nil
}

// document is one YAML document; object is nil where there is nothing but comments.
type document struct {
	text   []byte
	object []byte // as JSON
}

func readDocuments(in io.Reader) (all []document, err error) {
	reader := utilyaml.NewYAMLReader(bufio.NewReader(in))
	for {
		text, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		object, err := yaml.YAMLToJSONStrict(text)
		if err != nil {
			return nil, fmt.Errorf("document %d is not YAML: %w", len(all)+1, err)
		}
		if bytes.Equal(object, []byte("null")) {
			object = nil
		}
		all = append(all, document{text, object})
	}
}

// headlessServices finds the headless services among the documents, by namespace and name.
func headlessServices(documents []document) map[string]*corev1.Service {
	services := map[string]*corev1.Service{}
	for _, d := range documents {
		var s corev1.Service
		if d.object != nil && json.Unmarshal(d.object, &s) == nil && s.Kind == "Service" && s.APIVersion == "v1" {
			services[s.Namespace+"/"+s.Name] = &s
		}
	}
	return services
}

type renderer struct {
	settings Settings
	headless map[string]*corev1.Service
	findings []Finding
}

// document renders one; what is not to be injected comes back letter by letter.
func (r *renderer) document(d document) ([]byte, error) {
	if d.object == nil {
		return d.text, nil
	}
	object, changed, err := r.object(d.object)
	if err != nil || !changed {
		return d.text, err
	}
	return yaml.JSONToYAML(object)
}

// object renders one object, or each of a List.
func (r *renderer) object(object []byte) (rendered []byte, changed bool, err error) {
	var m manifest
	if err := json.Unmarshal(object, &m); err != nil {
		return nil, false, fmt.Errorf("not a Kubernetes object: %w", err)
	}
	if m.APIVersion == "v1" && m.Kind == "List" {
		return r.list(object, m.Items)
	}
	at, ok := templates()[m.APIVersion+"/"+m.Kind]
	if !ok {
		return object, false, nil
	}
	var template struct {
		corev1.PodTemplateSpec
		Spec *corev1.PodSpec `json:"spec"`
	}
	raw, err := lookUp(object, at)
	if err == nil && raw != nil {
		err = json.Unmarshal(raw, &template)
	}
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", m, err)
	}
	found := Finding{Object: m.String()}
	wanted, err := Wanted(template.Labels)
	if err == nil && (!wanted || template.Spec == nil) {
		return object, false, nil
	}
	var result Result
	if err == nil {
		result, err = Mutate(r.pod(m, template.Annotations, template.Spec), r.settings)
	}
	if errors.As(err, &found.Denial) {
		r.findings = append(r.findings, found)
		return object, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", m, err)
	}
	found.Injected = len(result.Patch) > 0
	found.Warnings = append(result.Warnings, r.aroundIt(m, template.Spec)...)
	r.findings = append(r.findings, found)
	if !found.Injected {
		return object, false, nil
	}
	for i := range result.Patch {
		result.Patch[i].Path = at + result.Patch[i].Path
	}
	rendered, err = Apply(object, result.Patch)
	return rendered, true, err
}

func (r *renderer) pod(m manifest, annotations map[string]string, spec *corev1.PodSpec) Pod {
	p := Pod{Annotations: annotations, Spec: spec}
	if m.Kind == "Pod" {
		p.Name = m.Metadata.Name
	}
	for _, claim := range m.Spec.VolumeClaimTemplates {
		p.ClaimTemplates = append(p.ClaimTemplates, claim.Metadata.Name)
	}
	return p
}

// aroundIt warns of what surrounds the pod.
func (r *renderer) aroundIt(m manifest, spec *corev1.PodSpec) (all []Warning) {
	service := spec.Subdomain
	if m.Kind == "StatefulSet" {
		service = m.Spec.ServiceName
		if m.Spec.PodManagementPolicy != "Parallel" {
			all = append(all, warn(ReasonOrderedPods, "podManagementPolicy is not Parallel: while the first pod waits for its key, no other is created"))
		}
	}
	if s := r.headless[m.Metadata.Namespace+"/"+service]; s != nil {
		all = append(all, WarnOfService(s)...)
	}
	return all
}

func (r *renderer) list(object []byte, items []json.RawMessage) ([]byte, bool, error) {
	var patch []Operation
	for i, item := range items {
		rendered, changed, err := r.object(item)
		if err != nil {
			return nil, false, err
		}
		if changed {
			patch = append(patch, Operation{"replace", fmt.Sprintf("/items/%d", i), json.RawMessage(rendered)})
		}
	}
	if len(patch) == 0 {
		return object, false, nil
	}
	rendered, err := Apply(object, patch)
	return rendered, true, err
}

// lookUp returns what a pointer without escapes and list indexes points at, nil where there is nothing.
func lookUp(object []byte, pointer string) (json.RawMessage, error) {
	at := json.RawMessage(object)
	for _, name := range strings.Split(pointer, "/")[1:] {
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(at, &fields); err != nil {
			return nil, err
		}
		if at = fields[name]; at == nil {
			return nil, nil
		}
	}
	return at, nil
}
