// Package chart tests what is deployed: the Helm chart with its schema, the Kustomize base that must equal the chart, and
// the policies, alerts and dashboard that both contain. It renders with Helm's own engine and decodes with the API's own
// types, strictly: a field that Kubernetes does not know is an error here, as it is with kubectl's --validate=strict.
//
// After a change of the chart: go test ./... -update, and read the difference.
package chart
