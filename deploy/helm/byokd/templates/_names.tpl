{{/* Names are fixed, not the release's: byokd is installed once in a cluster, and its parts know each other by name. */}}
{{- define "byokd.suffix" -}}
{{- with .Values.revision }}-{{ . }}{{ end -}}
{{- end -}}

{{- define "byokd.inject" -}}
byokd-inject{{ include "byokd.suffix" . }}
{{- end -}}

{{- define "byokd.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a component; it can never be changed. Takes (list $ "component"). */}}
{{- define "byokd.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: byokd
app.kubernetes.io/component: {{ index . 1 }}
{{- with $.Values.revision }}
byokd.io/revision: {{ . }}
{{- end }}
{{- end -}}

{{- define "byokd.labels" -}}
{{- $ := index . 0 -}}
{{ include "byokd.selector" . }}
app.kubernetes.io/part-of: byokd
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
{{- end -}}

{{/* Pods that satisfy Pod Security "restricted". */}}
{{- define "byokd.restrictedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "byokd.restrictedContainer" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
