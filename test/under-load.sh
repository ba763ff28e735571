#!/usr/bin/env bash
# Runs test files RUNS (3) times beside LOOPS (4) busy loops: a flaky test fails here first.
#
#   test/under-load.sh [FILE…]     all test files by default
set -uo pipefail
cd "$(dirname "$0")/.."

npm run --silent transpile
trap 'kill $(jobs -p)' EXIT
for _ in $(seq "${LOOPS:-4}"); do
  (while :; do :; done) &
done
failures=0
log=$(mktemp)
[ $# -gt 0 ] || set -- test/*.test.ts
for file in "$@"; do
  for run in $(seq "${RUNS:-3}"); do
    node --import tsx/esm "$file" >"$log" 2>&1 && continue
    echo "$file: run $run failed"
    grep -A 20 '^ *not ok' "$log"
    failures=$((failures + 1))
  done
done
echo "$failures runs failed"
[ "$failures" = 0 ]
