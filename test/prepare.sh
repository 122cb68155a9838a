#!/usr/bin/env bash
# Installs what the tests use beside Go: FUSE, lower filesystems, real databases and real S3 clients. Idempotent; does nothing
# when all is there. It never fails: tests whose tool is missing are skipped, or fail where BYOKD_REQUIRE
# names them.
set -euo pipefail

missing=()
need() { # need PACKAGE COMMAND...: PACKAGE is missing unless COMMAND succeeds
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}

postgres() { command -v pg_ctl || ls /usr/lib/postgresql/*/bin/pg_ctl; }

need fuse3 command -v fusermount3
need e2fsprogs command -v mkfs.ext4
need xfsprogs command -v mkfs.xfs
need qemu-utils command -v qemu-img
need sqlite3 command -v sqlite3
need postgresql postgres
need rocksdb-tools command -v db_bench
need fio command -v fio
need awscli command -v aws
need python3-boto3 python3 -c 'import boto3'
need rclone command -v rclone
need s3cmd command -v s3cmd
need restic command -v restic
need curl command -v curl
need chromium-headless-shell command -v chromium-headless-shell
need prometheus command -v promtool
need runc command -v runc
if [[ -n ${BYOKD_E2E:-} ]]; then # what make e2e has beyond make test
  need npm command -v npm
  need maven command -v mvn
fi
need python3-venv python3 -c 'import ensurepip'

if ((${#missing[@]} > 0)); then
  if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "installing for the tests: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    # One by one after a failure, so that one absent package does not cost the others.
    if ! { apt-get update -q && apt-get install -q -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
      for package in "${missing[@]}"; do
        apt-get install -q -y --no-install-recommends "$package" >"$log" 2>&1 ||
          { echo "cannot install $package; the tests that need it are skipped, or fail in CI:" && tail -n 3 "$log"; }
      done
    fi
    rm -f "$log"
  else
    echo "not installed, so some tests are skipped. To run them too, type:"
    echo "  sudo apt-get install --no-install-recommends ${missing[*]}"
  fi
fi

# Where the python3 of the path is not Debian's, Debian's boto3 is not its.
if [[ $EUID -eq 0 ]] && ! python3 -c 'import boto3' >/dev/null 2>&1; then
  python3 -m pip install -q boto3 >/dev/null 2>&1 ||
    echo "python3 has no boto3; the tests that need it are skipped, or fail in CI"
fi

# An implementation of KMS that nobody here has written, to judge the stand-in by.
moto=$(dirname "$0")/../.cache/moto
if [[ ! -x $moto/bin/moto_server ]] && command -v python3 >/dev/null; then
  { python3 -m venv "$moto" && "$moto/bin/pip" install -q 'moto[server]==5.2.5'; } >/dev/null 2>&1 ||
    { rm -rf "$moto" && echo "cannot install moto from PyPI; the test against it is skipped, or fails in CI"; }
fi

if [[ ! -e /dev/fuse ]]; then
  if [[ $EUID -ne 0 ]] || ! { modprobe fuse 2>/dev/null || mknod /dev/fuse c 10 229; }; then
    echo "there is no /dev/fuse, so the tests that mount are skipped. Type: sudo modprobe fuse"
  fi
fi
if [[ $EUID -ne 0 ]]; then
  echo "the tests that mount need root and are skipped. To run them too, type:"
  # shellcheck disable=SC2016 # to be expanded by the reader's shell
  echo '  sudo env "PATH=$PATH" make test'
fi
