#!/usr/bin/env bash
# Sees to it that there is a Go which builds byokd; `make` calls it first. As root on Debian it installs Debian's.
# Where that, or another one that is there, is older than go.mod wants, it has it fetch the right one as a module,
# checked as modules are, for .cache/go, which the Makefile looks in first.
set -euo pipefail
cd "$(dirname "$0")/.."

export PATH=$PWD/.cache/go/bin:$PATH
unset GOEXPERIMENT # an older Go refuses what it does not know
want=$(awk '$1 == "go" { print $2 }' go.mod) # the oldest that builds it
best=$(awk '$1 == "toolchain" { print $2 }' go.mod) # the one that releases are built with

die() {
  echo "byokd needs Go $want: $1" >&2
  exit 1
}

version() { (cd / && GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) || true; }

# builds succeeds with a Go that is new enough, or that fetches a newer one itself, which it may be forbidden to.
builds() {
  hash -r # the shell remembers where go was
  local have
  have=$(version)
  [[ -n $have ]] && { printf 'go%s\n%s\n' "$want" "$have" | sort -VC || go list -m >/dev/null 2>&1; }
}

install_debians() {
  # shellcheck disable=SC2016 # to be expanded by the reader's shell
  [[ $EUID -eq 0 ]] || die 'there is none here. Install it, or have it installed: sudo env "PATH=$PATH" make'
  command -v apt-get >/dev/null || die 'there is none here. Install it: https://go.dev/doc/install'
  echo 'installing for the build: golang-go'
  local log
  log=$(mktemp)
  { DEBIAN_FRONTEND=noninteractive apt-get update -q &&
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends golang-go ca-certificates; } >"$log" 2>&1 ||
    { tail -n 5 "$log" >&2 && die 'golang-go cannot be installed, see above'; }
  rm -f "$log"
}

fetch_newer() {
  local arch scratch found at
  case $(uname -m) in
    x86_64) arch=amd64 ;;
    aarch64) arch=arm64 ;;
    *) die "there is $(version) here, and no newer one to be fetched for $(uname -m). Install it: https://go.dev/doc/install" ;;
  esac
  echo "fetching $best: there is $(version) here"
  scratch=$(mktemp -d)
  found=$(cd "$scratch" && echo 'module scratch' >go.mod &&
    GOTOOLCHAIN=local go mod download -json "golang.org/toolchain@v0.0.1-$best.linux-$arch") ||
    die "it cannot be fetched: $found"
  rm -rf "$scratch"
  at=$(sed -n 's/^[[:space:]]*"Dir": "\(.*\)",*$/\1/p' <<<"$found")
  [[ -d $at ]] || die "it was fetched, and is not where it should be: $found"
  # Modules hold no programs. Go does the same with what it fetches for itself.
  find "$at/bin" "$at/pkg/tool" -type f -exec chmod +x {} +
  mkdir -p .cache
  ln -sfn "$at" .cache/go
}

builds && exit
command -v go >/dev/null || install_debians
builds && exit
fetch_newer
builds || die "the one in $(readlink .cache/go) does not run"
