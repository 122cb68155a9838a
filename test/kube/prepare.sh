#!/usr/bin/env bash
# Builds what the tests against a real Kubernetes API server use into .cache/kube: kube-apiserver from source (minutes, once for
# each version) and Debian's etcd beside it. Idempotent. It never fails: without these the tests are skipped, or fail
# where BYOKD_REQUIRE names kube.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=v1.36.3
staging=v0.${version#v1.}
bin=$PWD/.cache/kube

say() { echo "the tests against a Kubernetes API server are skipped, or fail in CI: $*"; }

find_etcd() { type -P etcd; }
if ! find_etcd >/dev/null && [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends etcd-server; } >/dev/null 2>&1 || true
fi
if ! find_etcd >/dev/null; then
  say "etcd is not installed (apt-get install etcd-server)"
  exit 0
fi
mkdir -p "$bin"
ln -sf "$(find_etcd)" "$bin/etcd"

if [[ -x $bin/kube-apiserver && $(cat "$bin/version" 2>/dev/null) == "$version" ]]; then
  exit 0
fi
command -v go >/dev/null || { say "there is no Go to build it with"; exit 0; }

# `go install k8s.io/kubernetes/cmd/kube-apiserver@…` is refused because of the module's replacements: a module around it
# that replaces each staging path by the version published of it builds.
mkdir -p "$bin/build-$version" # stays until the end, so that a build that was cut short goes on
cd "$bin/build-$version"
if ! gomod=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n 's/.*"GoMod": "\(.*\)",/\1/p') || [[ -z $gomod ]]; then
  say "k8s.io/kubernetes@$version cannot be had"
  exit 0
fi
{
  echo 'module apiserver'
  sed -n '/^go /p; /^godebug /p' "$gomod"
  echo "require k8s.io/kubernetes $version"
  echo 'replace ('
  sed -n 's#^\t\(k8s.io/[a-z0-9-]*\) => ./staging/.*#\1#p' "$gomod" | while read -r module; do echo "	$module => $module $staging"; done
  echo ')'
} >go.mod
printf '//go:build tools\n\npackage tools\n\nimport _ "k8s.io/kubernetes/cmd/kube-apiserver"\n' >tools.go
export GOFLAGS=-mod=mod GOEXPERIMENT='' CGO_ENABLED=0
set_version="-X k8s.io/component-base/version.gitVersion=$version -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"
echo "building kube-apiserver $version: some minutes, once"
if { { [[ -e go.sum ]] || go mod tidy; } && go build -trimpath -ldflags "-s -w $set_version" -o "$bin/kube-apiserver.new" k8s.io/kubernetes/cmd/kube-apiserver; } >build.log 2>&1; then
  mv "$bin/kube-apiserver.new" "$bin/kube-apiserver"
  echo "$version" >"$bin/version"
  rm -rf "$bin/build-$version"
else
  tail -n 5 build.log
  say "kube-apiserver cannot be built, see above"
fi
