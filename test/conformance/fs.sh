#!/usr/bin/env bash
# `make conformance-fs`: public POSIX suites on a byokd mount in both cache modes, on one of a byokd without privileges
# (sealed owners, CAP_SYS_ADMIN alone), and, for comparison, on plain ext4; all on ext4 images of their own, in memory. Needs root, /dev/fuse, cargo and Debian's stress-ng. What is
# expected stands in docs/CONFORMANCE.md. OPS sets the operations of fsx (20000), SECONDS_EACH how long each of
# stress-ng's stressors runs (3).
# shellcheck disable=SC2317 # some functions are called by traps only
set -euo pipefail
cd "$(dirname "$0")/../.."

ops=${OPS:-20000}
each=${SECONDS_EACH:-3}
tools=$PWD/.cache/conformance
dir=$(mktemp -d)
disk_size=2G
start_limit=30 # seconds until a mount answers; it takes about one

die() {
  echo "conformance: $1" >&2
  exit 1
}

cleanup() {
  local code=$? pid name
  trap - EXIT
  set +e # not everything is there when it ends early
  for pid in "$dir"/*/byokd.pid "$dir"/*/devcloud.pid; do
    [[ -e $pid ]] && kill "$(cat "$pid")" 2>/dev/null
    while [[ $pid == */byokd.pid && -e $pid ]] && kill -0 "$(cat "$pid")" 2>/dev/null; do sleep 0.1; done
  done
  for name in plain writeback writethrough sealed; do
    umount -l "$dir/$name/disk" 2>/dev/null
  done
  umount -l "$dir" && rmdir "$dir"
  exit "$code"
}

# tools installs the suites, at the versions that docs/CONFORMANCE.md speaks of.
install_tools() {
  command -v cargo >/dev/null || die "cargo is not installed (apt-get install cargo)"
  if ! command -v stress-ng >/dev/null; then
    apt-get install -q -y --no-install-recommends stress-ng >/dev/null || die "stress-ng cannot be installed"
  fi
  cargo install -q --locked --root "$tools" pjdfstest@0.2.2 fsx@0.3.2
}

disk() { # disk NAME: an ext4 at $dir/NAME/disk
  mkdir -p "$dir/$1/disk"
  truncate -s "$disk_size" "$dir/$1/image"
  mkfs.ext4 -q -F "$dir/$1/image"
  mount -o loop "$dir/$1/image" "$dir/$1/disk"
}

# background NAME COMMAND...: output to NAME.log; the process is stopped by cleanup.
background() {
  local name=$1
  shift
  "$@" >"$name.log" 2>&1 </dev/null &
  echo $! >"$name.pid"
}

mount_byokd() { # mount_byokd NAME PORT CACHE OWNERSHIP [LAUNCHER...]: a mount at $dir/NAME/mount
  local at=$dir/$1 port=$2 cache=$3 ownership=$4 arn
  disk "$1"
  mkdir -p "$at/mount" "$at/cloud"
  background "$at/devcloud" bin/devcloud serve --dir "$at/cloud" --listen "127.0.0.1:$port"
  local deadline=$((SECONDS + start_limit))
  until bin/devcloud --endpoint "http://127.0.0.1:$port" setup >"$at/setup" 2>/dev/null; do
    ((SECONDS < deadline)) || die "devcloud does not answer: $(cat "$at/devcloud.log")"
    sleep 0.1
  done
  arn=$(awk '$1 == "key" { print $2 }' "$at/setup")
  cat >"$at/byokd.yaml" <<YAML
cluster: {id: conformance, region: eu-central-1}
keys: {primary: {arn: "$arn", endpoint: "http://127.0.0.1:$port"}}
volume: {role: conformance, lower: "$at/disk", mount: "$at/mount", key: primary, cache: $cache, ownership: $ownership}
admin: {listen: "127.0.0.1:$((port + 1))"}
YAML
  background "$at/byokd" env AWS_ACCESS_KEY_ID=byokd-tenant AWS_SECRET_ACCESS_KEY=byokd-tenant-secret AWS_REGION=eu-central-1 \
    AWS_EC2_METADATA_DISABLED=true "${@:5}" bin/byokd run --config "$at/byokd.yaml"
  until grep -qF " $at/mount fuse.byokd " /proc/self/mounts; do
    ((SECONDS < deadline)) || die "byokd does not mount: $(tail -n 5 "$at/byokd.log")"
    sleep 0.1
  done
}

suites() { # suites NAME DIRECTORY: one line of result per suite
  local name=$1 at=$2/suite log=$dir/$1
  mkdir -p "$at"
  "$tools/bin/pjdfstest" -c test/conformance/pjdfstest.toml -p "$at" >"$log/pjdfstest.log" 2>&1 || true
  echo "$name: pjdfstest: $(grep '^Summary' "$log/pjdfstest.log" || echo 'it has not ended')"
  local verdict="$ops operations without a difference"
  "$tools/bin/fsx" -q -q -f test/conformance/fsx.toml -N "$ops" -S 1 -P "$log" "$at/fsx" >"$log/fsx.log" 2>&1 || verdict="FAILED, see $log/fsx.log"
  echo "$name: fsx: $verdict"
  # fanotify and procfs look at the whole machine; eventfd, ioprio and binderfs at no filesystem.
  stress-ng --class filesystem --exclude fanotify,procfs,eventfd,ioprio,binderfs --sequential 1 --timeout "$each" --verify \
    --temp-path "$at" >"$log/stress-ng.log" 2>&1 || true
  echo "$name: stress-ng: $(grep -E 'successful run|unsuccessful run|failed:' "$log/stress-ng.log" | sed 's/.*\] //' | tr '\n' ' ' || true)"
  grep -E '(FAIL|fail:|failed$)' "$log/pjdfstest.log" "$log/stress-ng.log" | sed "s|^$log/|    |" || true
}

[[ $EUID -eq 0 ]] || die "needs root"
trap cleanup EXIT
mount -t tmpfs -o size=8G byokd-conformance "$dir"
install_tools
port=$((20000 + RANDOM % 20000))
disk plain
suites plain "$dir/plain/disk"
mount_byokd writeback "$port" writeback lower
suites writeback "$dir/writeback/mount"
mount_byokd writethrough "$((port + 2))" writethrough lower
suites writethrough "$dir/writethrough/mount"
mount_byokd sealed "$((port + 4))" writeback sealed setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+sys_admin
suites sealed "$dir/sealed/mount"
