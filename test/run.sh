#!/usr/bin/env bash
# Runs all tests and ends with a line of what passed, failed and was skipped. Under CI=true nothing that
# a test needs may be missing: BYOKD_REQUIRE turns those skips into failures.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${CI:-} == true && -z ${BYOKD_REQUIRE:-} ]]; then
  export BYOKD_REQUIRE=fuse,aws,s3clients,databases,moto,promtool,browser,cfn-lint
fi

mounts() { grep -c ' fuse\.byokd ' /proc/self/mounts || true; }

test/prepare.sh
before=$(mounts)
# One package at a time: freezes keep their bounds against the load of their own test, not of another's.
status=0
{
  go test -json -p 1 -timeout 25m "$@" ./... || failed=1
  for module in deploy/image test/chart; do # modules of their own, for what only they need
    (cd "$module" && go test -json -timeout 25m "$@" ./...) || failed=1
  done
  exit "${failed:-0}"
} | go run ./test/summary || status=$?
after=$(mounts)
if ((after > before)); then
  echo "a test left a mount behind:"
  grep ' fuse\.byokd ' /proc/self/mounts
  status=1
fi
exit "$status"
