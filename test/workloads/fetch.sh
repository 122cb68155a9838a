#!/usr/bin/env bash
# Fetches the libraries of `make workloads` into .cache/workloads, checks each against jars.sha256 and compiles the
# programs here against them. Idempotent; asks nobody when all is there. `fetch.sh --record` writes jars.sha256 anew.
set -euo pipefail
cd "$(dirname "$0")"
cache=$PWD/../../.cache/workloads
mkdir -p "$cache/classes"
cache=$(cd "$cache" && pwd)

checked() { [[ -d $cache/jars ]] && (cd "$cache/jars" && sha256sum --quiet --strict -c "$OLDPWD/jars.sha256"); }

# -C: an artifact whose checksum is not the registry's fails.
fetch() {
  rm -rf "$cache/jars"
  echo "fetching the libraries of the workloads"
  mvn -q -B -C org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies -DoutputDirectory="$cache/jars" -DincludeScope=runtime
}

if [[ ${1:-} == --record ]]; then
  fetch
  (cd "$cache/jars" && sha256sum -- *.jar) >jars.sha256
elif ! checked 2>/dev/null; then
  fetch
  checked || { echo "fetch.sh: what Maven brought is not what jars.sha256 names" >&2 && exit 1; }
fi
# One that is not in the list would run unchecked.
(cd "$cache/jars" && for jar in *.jar; do grep -qF "  $jar" "$OLDPWD/jars.sha256" || { echo "fetch.sh: $jar is not in jars.sha256" >&2 && exit 1; }; done)

javac -Werror -Xlint:all,-classfile,-path,-processing,-serial -proc:none --release 17 -cp "$cache/jars/*" -d "$cache/classes" src/*/*.java ../clients/java/src/main/java/Client.java
cp src/log4j2.xml "$cache/classes/"
