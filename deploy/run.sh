#!/usr/bin/env bash
# `make run`: a stand-in for AWS, an encrypted disk and an encrypted bucket in ./run, until Ctrl-C. Nothing
# is left mounted, and the next run finds the data again.
# shellcheck disable=SC2317 # some functions are called by traps only
set -euo pipefail
cd "$(dirname "$0")/.."

# signals FIELD PID: one of the signal sets in /proc/PID/status; bit 2 is SIGINT.
signals() { sed -n "s/^$1:[[:space:]]*/16#/p" "/proc/$2/status" 2>/dev/null || echo 0; }

# A shell starts background jobs of scripts with SIGINT ignored, which bash cannot take back by itself.
if (($(signals SigIgn $$) & 2)) && env --default-signal=INT true 2>/dev/null; then
  exec env --default-signal=INT deploy/run.sh
fi

# Fixed, so that scripts can rely on them; tests move them out of each other's way.
run=${RUN_DIR:-$PWD/run}
admin=${RUN_ADMIN:-127.0.0.1:9180}
cloud=${RUN_CLOUD:-127.0.0.1:4566}
s3=${RUN_S3:-127.0.0.1:9000}

shown=${run#"$PWD"/}
byokd=$PWD/bin/byokd
devcloud=$PWD/bin/devcloud
start_limit=30 # seconds until everything answers; it takes about one
stop_limit=35  # seconds until byokd has stopped: its own stopTimeout is 25

byokd_pid='' devcloud_pid='' follower_pid='' watcher_pid=''

die() {
  echo "make run: $1" >&2
  exit "${2:-1}"
}

mounted() { grep -qF " ${run// /\\040}/data fuse.byokd " /proc/self/mounts; }

# preflight tells what is missing, with what to type, before anything is started.
preflight() {
  [[ $(uname -s) == Linux ]] || die "byokd mounts a filesystem of Linux; this is $(uname -s)"
  # shellcheck disable=SC2016 # to be expanded by the reader's shell
  [[ $EUID -eq 0 ]] || die 'mounting a filesystem for every user needs root. Type: sudo env "PATH=$PATH" make run'
  if [[ ! -e /dev/fuse ]]; then
    modprobe fuse 2>/dev/null || mknod /dev/fuse c 10 229 2>/dev/null ||
      die "there is no /dev/fuse and it cannot be made here. Type: modprobe fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
  fi
  local name
  for name in byokd devcloud; do
    still_running "$name"
  done
  free_port devcloud "$cloud"
  free_port 'the S3 proxy' "$s3"
  free_port 'the admin page' "$admin"
}

# still_running refuses to start beside a run that was not stopped.
still_running() {
  local pid
  pid=$(cat "$run/$1.pid" 2>/dev/null) || return 0
  if [[ $(readlink "/proc/$pid/exe" 2>/dev/null) == "$PWD/bin/$1"* ]]; then
    die "$1 of an earlier run is still there (process $pid). Type: kill $pid"
  fi
}

free_port() {
  if (exec 3<>"/dev/tcp/${2/://}") 2>/dev/null; then
    die "$1 needs $2, where another program listens. To see which: ss -ltnp 'sport = :${2#*:}'"
  fi
}

# directories makes ./run, after clearing away dead mounts of a run that was killed.
directories() {
  local i
  for ((i = 0; i < 64; i++)); do
    mounted || break
    echo "a mount of a killed run is cleared away"
    umount -l "$run/data"
  done
  mkdir -p "$run/data" "$run/sealed" "$run/cloud"
  chmod 700 "$run/sealed" "$run/cloud"
}

# launch NAME COMMAND...: starts in a process group of its own, so that Ctrl-C reaches this script only,
# and has the kernel stop it should this script be killed. Output goes to run/NAME.log.
launch() {
  local name=$1
  shift
  local guard=()
  if command -v setpriv >/dev/null; then
    guard=(setpriv --pdeathsig TERM --)
  fi
  set -m
  "${guard[@]}" "$@" >"$run/$name.log" 2>&1 </dev/null &
  set +m
  echo $! >"$run/$name.pid"
}

start_devcloud() {
  launch devcloud "$devcloud" serve --dir "$run/cloud" --listen "$cloud"
  devcloud_pid=$(cat "$run/devcloud.pid")
  local deadline=$((SECONDS + start_limit))
  # setup makes the key and the buckets where they are missing, and answers once devcloud does.
  until "$devcloud" --endpoint "http://$cloud" setup >"$run/setup.txt" 2>"$run/setup.err"; do
    kill -0 "$devcloud_pid" 2>/dev/null || { cat "$run/devcloud.log" >&2 && die "devcloud did not start"; }
    ((SECONDS < deadline)) || { cat "$run/setup.err" >&2 && die "devcloud does not answer at $cloud"; }
    sleep 0.1
  done
}

# configure writes what byokd is told. The key goes in by its ARN: aliases are refused.
configure() {
  local arn
  arn=$(awk '$1 == "key" { print $2 }' "$run/setup.txt")
  [[ $arn == arn:* ]] || die "devcloud names no key: $(cat "$run/setup.txt")"
  # The path of a unix socket is short: deep below there is none, and no `byokd freeze`.
  local socket=''
  if ((${#run} < 90)); then socket=", socket: \"$run/control.sock\""; fi
  rm -f "$run/s3-credentials" # one left with another mode would keep it
  (umask 077 && echo byokd:byokd-secret >"$run/s3-credentials")
  cat >"$run/byokd.yaml" <<YAML
# Written by \`make run\`; every field is explained by: bin/byokd config reference
cluster: {id: acme-try, region: eu-central-1}
keys:
  primary: {arn: "$arn", endpoint: "http://$cloud"}
volume: {role: orchestration, lower: "$run/sealed", mount: "$run/data", key: primary}
objects:
  listen: $s3
  credentials: {file: "$run/s3-credentials"}
  buckets:
    documents: {upstream: {bucket: acme-documents, endpoint: "http://$cloud"}, key: primary}
    backups: {upstream: {bucket: acme-backups, endpoint: "http://$cloud"}, key: primary}
admin: {listen: $admin$socket}
audit: {file: "$run/audit.jsonl"}
log: {format: console}
YAML
}

# byokd runs as the tenant: the role that the key's policy admits, with nothing else from the caller.
start_byokd() {
  launch byokd env -u AWS_PROFILE -u AWS_SESSION_TOKEN -u AWS_ENDPOINT_URL -u AWS_CONFIG_FILE -u AWS_SHARED_CREDENTIALS_FILE \
    AWS_ACCESS_KEY_ID=byokd-tenant AWS_SECRET_ACCESS_KEY=byokd-tenant-secret AWS_REGION=eu-central-1 \
    AWS_EC2_METADATA_DISABLED=true "$byokd" run --config "$run/byokd.yaml"
  byokd_pid=$(cat "$run/byokd.pid")
  local deadline=$((SECONDS + start_limit)) code
  while ((SECONDS < deadline)); do
    kill -0 "$byokd_pid" 2>/dev/null || byokd_ended
    code=0
    "$byokd" status --admin "$admin" >"$run/status.txt" 2>/dev/null || code=$?
    case $code in
      0) return ;;
      11) # waiting: worth telling once KMS has given a reason
        if grep -q '^Next step: ' "$run/status.txt" && ! grep -q ' Unknown ' "$run/status.txt"; then
          sed -n '1,3p' "$run/status.txt"
          return
        fi ;;
    esac
    sleep 0.1
  done
  cat "$run/status.txt" "$run/byokd.log" >&2
  die "byokd is not ready after $start_limit seconds"
}

byokd_ended() {
  local code=0
  wait "$byokd_pid" || code=$?
  byokd_pid=''
  tail -n 20 "$run/byokd.log" >&2
  die "byokd has ended by itself (exit code $code; \`bin/byokd run --help\` explains it)" "$code"
}

tour() {
  cat <<TOUR

  encrypted disk   $shown/data          (sealed below in $shown/sealed)
  S3               http://$s3   (byokd / byokd-secret; buckets documents, backups)
  state            http://$admin   (what your key's owner sees)
  the cloud        http://$cloud   (a stand-in for AWS, with buttons)

  In another terminal:
    echo 'Hello, Frank' >$shown/data/hello     # write something
    ls $shown/sealed                           # what a thief of the disk sees
    bin/devcloud key disable                # take the key away: within two seconds ...
    cat $shown/data/hello                      # ... this hangs
    bin/byokd status                        # why, and what to do
    bin/devcloud key enable                 # give it back: cat goes on
    bin/byokd freeze --socket $shown/control.sock   # the same on request; with thaw for freeze it ends

  Ctrl-C stops everything and leaves nothing mounted; the next \`make run\` finds the data again.

TOUR
}

# watch_make stops us when make is stopped: it hands SIGTERM on, but a SIGINT sent to it alone (not by Ctrl-C,
# which reaches the whole group) only makes it wait for us. Its handler is gone from then on.
watch_make() {
  [[ $(cat "/proc/$PPID/comm" 2>/dev/null) == make ]] && (($(signals SigCgt $PPID) & 2)) || return 0
  while (($(signals SigCgt $PPID) & 2)); do
    sleep 0.5
  done
  kill -TERM $$
}

stop_process() { # stop_process PID SECONDS: TERM, and KILL when that is not enough
  local i
  kill -TERM "$1" 2>/dev/null || return 0
  for ((i = 0; i < $2 * 10; i++)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null || true
}

# finish runs at every exit, in the reverse order of the start.
finish() {
  local code=$?
  trap '' INT TERM HUP
  trap - EXIT
  local pid
  for pid in $follower_pid $watcher_pid; do
    kill "$pid" 2>/dev/null || true
  done
  if [[ -n $byokd_pid ]]; then
    echo "stopping byokd: flush, unmount"
    stop_process "$byokd_pid" "$stop_limit"
  fi
  if [[ -n $devcloud_pid ]]; then stop_process "$devcloud_pid" 10; fi
  if mounted; then
    umount -l "$run/data" && echo "$shown/data was still mounted and has been detached"
  fi
  rm -f "$run/byokd.pid" "$run/devcloud.pid"
  echo "stopped; nothing is mounted"
  exit "$code"
}

preflight
directories
trap finish EXIT
trap 'exit 0' INT TERM HUP
start_devcloud
configure
start_byokd
tour
"$byokd" status --admin "$admin" --watch &
follower_pid=$!
watch_make &
watcher_pid=$!
# Until a signal comes, or one of the two ends by itself.
wait -n "$byokd_pid" "$devcloud_pid" || true
kill -0 "$byokd_pid" 2>/dev/null || byokd_ended
die "devcloud has ended by itself; see $shown/devcloud.log"
