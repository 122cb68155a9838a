// Package kube holds tests of byokd in a cluster: a real kube-apiserver with etcd, the manifests of
// deploy/kustomize/base as they are, and bin/byokd as a process with the rights of its service account. There is no
// kubelet: pods are created and looked at, and never run. The life of the Helm chart is led in an API server of its
// own. prepare.sh builds the API server; without it, the tests are skipped, or fail where BYOKD_REQUIRE names kube.
package kube
