#!/usr/bin/env bash
# Looks whether what byokd is built of, Go's standard library included, has known vulnerabilities that byokd's code can reach.
# The database is the newest golang.org/x/vulndb, which comes as modules do, checked against their checksums: whoever can build
# byokd can look. The Go looked at is that of go.mod's toolchain line, with which releases are built.
set -euo pipefail
cd "$(dirname "$0")/.."
export GOEXPERIMENT='' # govulncheck does not know files that an experiment adds

database=$PWD/.cache/vulndb
download=$(cd / && go mod download -json golang.org/x/vulndb@latest) ||
  { echo "the vulnerability database cannot be fetched: $download" >&2 && exit 1; }
field() { sed -n "s/^[[:space:]]*\"$1\": \"\(.*\)\",*\$/\1/p" <<<"$download"; }
if [[ $(cat "$database/version" 2>/dev/null) != "$(field Version)" ]]; then
  rm -rf "$database"
  (cd "$(field Dir)" && GOTOOLCHAIN=auto go run ./cmd/indexdb -vulns data/osv -out "$database")
  field Version >"$database/version"
fi
echo "known vulnerabilities as of $(field Version)"

GOTOOLCHAIN=$(awk '$1 == "toolchain" { print $2 }' go.mod)
export GOTOOLCHAIN
for module in . deploy/image test/chart test/kube; do
  echo "$module:"
  (cd "$module" && go run "${GOVULNCHECK:?}" -db "file://$database" ./...)
done
